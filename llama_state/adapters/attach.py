"""The API on a context that another binding made."""

from __future__ import annotations

import ctypes
import reprlib
import sys
from typing import Any

from .._io import StrPath
from .._io.arguments import checked
from .._llama._llama_cffi import ffi
from .._llama.handles import Handle, borrowed_context
from .._llama.library import Library
from ..context.context import Context
from ..context.identity import Origin, stamped
from ..errors import ClosedError, StateError

# Nothing is ever in the first page of memory.
_LOWEST = 4096


@checked
def attach(
    obj: Any, library: Library | None = None, *, model_path: StrPath | None = None
) -> Context:
    """Return the whole API on a context that another binding made.

    The context is borrowed: it is never freed here, and *obj* is kept alive. Every attachment
    of one context shares one lock; the other binding's own calls do not take it, so do not
    decode with it in one thread while another is in a call of ours.

    Args:
        obj: A ``llama_cpp.Llama``; or the address of a ``llama_context``: an int, a ctypes
            pointer, or a cffi pointer of any module.
        library: The library whose ``llama_context`` it is, from
            ``load_library(path_of_the_shared_object)``. A pointer given to another library is
            memory corruption, so it is never guessed; of a ``Llama`` it is known.
        model_path: The file that the context's model was loaded from, for its
            :attr:`~llama_state.Context.fingerprint`; of a ``Llama`` it is known.

    Returns:
        A context; of a ``Llama`` a :class:`llama_state.adapters.llama_cpp.LlamaContext`, which
        keeps the ``Llama``'s own bookkeeping true.

    Raises:
        ClosedError: A null pointer, or a ``Llama`` that was closed.
        StateError: No *library*, or another one than the ``Llama``'s, a *model_path* for a
            ``Llama``, or an object that is no pointer.
    """
    # Whoever has a Llama has imported the package.
    llama_cpp = sys.modules.get("llama_cpp")
    if llama_cpp is not None and isinstance(obj, getattr(llama_cpp, "Llama", ())):
        from .llama_cpp import LlamaContext

        if model_path is not None:
            raise StateError("the model_path of a Llama is known: do not give it")
        return LlamaContext(obj, library)
    address = _address(obj)
    if not address:
        raise ClosedError("the context pointer is null: was the context closed?")
    if library is None:
        raise StateError(
            "attach() needs the library that made the pointer: "
            "attach(pointer, library=load_library('/path/to/libllama.so'))"
        )
    ptr = ffi.cast("struct llama_context *", address)
    handle = Handle(borrowed_context(library, ptr, obj), "context")
    if model_path is None:
        return Context(handle)
    return Context(handle, origin=Origin(*stamped(model_path)))


def _address(obj: Any) -> int:
    if isinstance(obj, (bool, str, bytes, float)):
        raise StateError(f"not a llama_context pointer: {reprlib.repr(obj)}")
    if isinstance(obj, int):
        if (obj and not _LOWEST <= obj <= sys.maxsize) or obj % ctypes.sizeof(ctypes.c_void_p):
            raise StateError(f"not the address of a llama_context: {obj}")
        return obj
    if isinstance(obj, ctypes.c_void_p):
        return obj.value or 0
    if isinstance(obj, ctypes._Pointer):
        return ctypes.cast(obj, ctypes.c_void_p).value or 0
    try:
        return int(ffi.cast("uintptr_t", obj))
    except TypeError as error:
        raise StateError(f"not a llama_context pointer: {reprlib.repr(obj)}") from error
