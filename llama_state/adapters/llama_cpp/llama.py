"""A ``llama_cpp.Llama``: its context as a handle, and its own bookkeeping, kept true.

A ``Llama`` counts the tokens of sequence 0 in ``n_tokens``, lists them in ``input_ids`` and, in
versions that sample a cached prompt without decoding, says in ``_requires_eval`` that it must
not. It cuts lazily: ``n_tokens`` may be smaller than what the cache holds until the next ``eval``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..._llama import calls
from ..._llama._llama_cffi import ffi
from ..._llama.discovery import load_library
from ..._llama.handles import Call, Handle, Resource, context_handle
from ..._llama.library import Library
from ...context.identity import ROPE_SETTINGS, Origin, scalar_text
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


def origin_of(llm: Any) -> Origin:
    """Return what a ``Llama`` says about its model and settings."""
    params = llm.context_params
    overrides = llm.kv_overrides or {}
    return Origin(
        str(Path(llm.model_path).absolute()),
        overrides={key: scalar_text(value) for key, value in sorted(overrides.items())},
        rope={name: getattr(params, name) for name in ROPE_SETTINGS},
        adapters=[(llm.lora_path, llm.lora_scale)] if llm.lora_path else [],
    )


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
        self._address = address_of(owner())
        if not self._address:
            raise ClosedError(_CLOSED)
        own = library_of_llama_cpp()
        if library not in (None, own):
            raise StateError(f"this Llama is of {own.path}, not of {library and library.path}")
        ptr = ffi.cast("struct llama_context *", self._address)
        plain = context_handle(own, ptr, owned=False, keep=None)
        super().__init__(own, plain.resource, plain.shared, "context")
        self._depth = 0

    @property
    def llm(self) -> Any:
        """The ``Llama``.

        Raises:
            ClosedError: It, or this attachment, was closed.
        """
        if self._owner is None:
            raise ClosedError("the attachment was closed")
        llm = self._owner()
        if llm is None or address_of(llm) != self._address:
            raise ClosedError(_CLOSED)
        return llm

    @property
    def closed(self) -> bool:
        """Whether the ``Llama`` or this attachment was closed."""
        try:
            return self.llm is None
        except ClosedError:
            return True

    @property
    def resource(self) -> Resource:
        """What keeps the handle's lock; the pointer is the ``Llama``'s.

        Raises:
            ClosedError: The ``Llama``, or this attachment, was closed.
        """
        _ = self.llm
        return super().resource

    @contextmanager
    def use(self) -> Iterator[Call]:
        """As :meth:`Handle.use`, with what the ``Llama`` has cut lazily cut at once."""
        with super().use() as call:
            depth = self._depth
            try:
                self._depth = depth + 1
                if depth == 0:
                    self._settle(call)
                yield call
            finally:
                self._depth = depth  # right wherever the block was interrupted

    def close(self) -> None:
        """Let go of the ``Llama`` once no call runs on it. Safe to call again."""
        super().close()
        self._owner = None

    def _settle(self, call: Call) -> None:
        n_tokens = self.llm.n_tokens
        if calls.positions(call, 0).last >= n_tokens:
            calls.remove(call, 0, *((n_tokens, -1) if n_tokens else (-1, -1)))
