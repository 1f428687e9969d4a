"""A ``llama_cpp.Llama``: its context as a handle, and its own bookkeeping, kept true.

A ``Llama`` counts the tokens of sequence 0 in ``n_tokens``, lists them in ``input_ids`` and, in
versions that sample a cached prompt without decoding, says in ``_requires_eval`` that it must
not. It cuts lazily: ``n_tokens`` may be smaller than what the cache holds until the next ``eval``.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..._llama import calls
from ..._llama._llama_cffi import ffi
from ..._llama.discovery import load_library
from ..._llama.handles import Call, Handle, borrowed_context
from ..._llama.library import Library
from ...context.identity import ROPE_SETTINGS, Origin, Reading, scalar_text, stamped
from ...errors import ClosedError, StateError

_CLOSED = "the Llama was closed"


def library_of_llama_cpp() -> Library:
    """Return the library that ``llama_cpp`` itself has loaded; its log callback stays."""
    return load_library(sys.modules["llama_cpp.llama_cpp"]._lib._name)


def check_llama(llm: Any) -> None:
    """Raise TypeError for what is no ``llama_cpp.Llama``."""
    llama_cpp = sys.modules.get("llama_cpp")
    if llama_cpp is None or not isinstance(llm, llama_cpp.Llama):
        raise TypeError(f"llm must be a llama_cpp.Llama, not {type(llm).__name__}")


def address_of(llm: Any) -> int:
    """Where the context of a ``Llama`` is; 0 when it was closed."""
    ctx: Any = getattr(getattr(llm, "_ctx", None), "ctx", None)
    return ctypes.cast(ctx, ctypes.c_void_p).value or 0


def origin_of(handle: LlamaHandle) -> Origin:
    """Return what a ``Llama`` says about its model and settings."""
    llm = handle.llm
    params = llm.context_params
    overrides = llm.kv_overrides or {}
    return Origin(
        *stamped(llm.model_path),
        overrides={key: scalar_text(value) for key, value in sorted(overrides.items())},
        rope={name: getattr(params, name) for name in ROPE_SETTINGS},
        adapters=LoraReader(handle),
    )


class LoraReader:
    """Reads which LoRA adapter a ``Llama`` says it has: it can be swapped after it was made.

    What was set by llama.cpp's own functions alone cannot be read: that must be declared.
    """

    def __init__(self, handle: LlamaHandle) -> None:
        self._handle = handle
        # Where the adapter of each path was: another place is another adapter.
        self._places: dict[str, int | None] = {}
        self()

    def __call__(self) -> Reading:
        """Return what the ``Llama`` says now."""
        llm = self._handle.llm
        path, scale = llm.lora_path, llm.lora_scale
        adapter = getattr(llm, "_lora_adapter", None)
        place = ctypes.cast(adapter, ctypes.c_void_p).value if adapter else None
        key = path, scale, place
        if not path:
            why = "the Llama has an adapter without a lora_path: declare it" if place else ""
            return Reading(key, None if place else (), why)
        if self._places.setdefault(path, place) != place:
            why = "the Llama's adapter was swapped, its lora_path was not: declare it"
            return Reading(key, None, why)
        return Reading(key, [(path, scale)])


def new_llama_state(llm: Any, blob: bytes, tokens: Sequence[int]) -> Any:
    """Return a ``llama_cpp.LlamaState`` of *blob*, with nothing in its ``scores``."""
    listed = np.zeros(len(llm.input_ids), np.intc)
    listed[: len(tokens)] = tokens
    return sys.modules["llama_cpp"].LlamaState(
        input_ids=listed,
        scores=np.zeros((1, 1), np.single),  # its shape does not matter
        n_tokens=len(tokens),
        llama_state=blob,
        llama_state_size=len(blob),
        seed=llm._seed,
    )


class LlamaCall(Call):
    """A call that sees when its ``Llama`` is closed in the middle of it.

    Args:
        call: What it is based on.
        handle: Of the ``Llama``.
    """

    def __init__(self, call: Call, handle: LlamaHandle) -> None:
        self.api: Any = call.api
        self.log: Callable[[], tuple[str, ...]] = call.log
        self._handle = handle

    @property
    def ptr(self) -> Any:
        """The pointer.

        Raises:
            ClosedError: The ``Llama`` was closed meanwhile.
        """
        self._handle.check_in_use()
        return self._handle.pointer.ptr


class LlamaHandle(Handle):
    """The context of a ``Llama``, as long as the ``Llama`` is open.

    Args:
        owner: Gives the ``Llama``, or None when it is gone.
        library: The one it must be of; None for whichever it is.

    Raises:
        ClosedError: The ``Llama`` was closed.
        StateError: It is of another library.
    """

    def __init__(self, owner: Callable[[], Any], library: Library | None = None) -> None:
        self._owner: Callable[[], Any] | None = owner
        check_llama(owner())
        address = address_of(owner())
        if not address:
            raise ClosedError(_CLOSED)
        own = library_of_llama_cpp()
        if library not in (None, own):
            raise StateError(f"this Llama is of {own.path}, not of {library and library.path}")
        ptr = ffi.cast("struct llama_context *", address)
        made_by = owner()._ctx
        super().__init__(borrowed_context(own, ptr, made_by, keep=False), "context")
        self._made_by = weakref.ref(made_by)
        self._in_use: Any = None  # the Llama during a call, which keeps it alive

    @property
    def llm(self) -> Any:
        """The ``Llama``.

        Raises:
            ClosedError: It, or this attachment, was closed.
        """
        if self._owner is None:
            raise ClosedError("the attachment was closed")
        return self._checked(self._owner())

    @property
    def closed(self) -> bool:
        """Whether the ``Llama`` or this attachment was closed."""
        try:
            return self.llm is None
        except ClosedError:
            return True

    @contextmanager
    def use(self) -> Iterator[Call]:
        """As :meth:`Handle.use`, with what the ``Llama`` has cut lazily cut at once.

        The ``Llama`` is kept alive, but nothing can keep it from being closed in the block.
        """
        with super().use() as call:
            in_use = self._in_use
            try:
                self._in_use = self.llm
                checked = LlamaCall(call, self)
                if in_use is None:
                    self._settle(checked)
                yield checked
            finally:
                self._in_use = in_use  # right wherever the block was interrupted

    def check_in_use(self) -> None:
        """Raise ClosedError where the ``Llama`` was closed in the block under :meth:`use`."""
        self._checked(self._in_use)

    def _checked(self, llm: Any) -> Any:
        # At the same address there may be another context by now.
        if llm is None or getattr(llm, "_ctx", None) is not self._made_by() or not address_of(llm):
            raise ClosedError(_CLOSED)
        return llm

    def close(self) -> None:
        """Let go of the ``Llama`` once no call runs on it. Safe to call again."""
        super().close()
        self._owner = None

    def _settle(self, call: Call) -> None:
        n_tokens = self._in_use.n_tokens
        if calls.positions(call, 0).last >= n_tokens:
            calls.remove(call, 0, *((n_tokens, -1) if n_tokens else (-1, -1)))
