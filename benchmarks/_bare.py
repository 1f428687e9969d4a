"""llama.cpp's state functions and nothing else: no lock, no log, no check."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import llama_state as ls
from llama_state._llama._llama_cffi import ffi, lib

_SAVE: list[Any] = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
_LOAD = [*_SAVE, ctypes.c_void_p]
_SEQ_SAVE = [*_SAVE[:2], ctypes.c_int32, *_SAVE[2:]]
_SEQ_LOAD = [*_LOAD[:2], ctypes.c_int32, *_LOAD[2:]]


class Bare:
    """The C functions on one context.

    Args:
        ctx: The context; it must stay open.
        n_tokens: Tokens that its files list.
    """

    def __init__(self, ctx: ls.Context, n_tokens: int) -> None:
        self._api = ctx.library.api
        self._ptr = ffi.cast("struct llama_context *", ctx.pointer)
        self._address = ctx.pointer
        # Of the file functions the binding has only what it learns versions from.
        self._library = ctypes.CDLL(os.fspath(ctx.library.path))
        self._tokens = (ctypes.c_int32 * n_tokens)()
        self._count = ctypes.c_size_t()

    # -- memory

    def get(self, out: bytearray) -> None:
        """llama_state_get_data into *out*."""
        target = ffi.from_buffer("uint8_t[]", out)
        _check(lib.llama_state_get_data(self._api, self._ptr, target, len(out)))

    def set(self, blob: bytes | bytearray) -> None:
        """llama_state_set_data of *blob*."""
        source = ffi.from_buffer("uint8_t[]", blob)
        _check(lib.llama_state_set_data(self._api, self._ptr, source, len(blob)))

    def seq_get(self, out: bytearray) -> None:
        """llama_state_seq_get_size and llama_state_seq_get_data of sequence 0 into *out*."""
        size = lib.llama_state_seq_get_size(self._api, self._ptr, 0)
        target = ffi.from_buffer("uint8_t[]", out)
        _check(lib.llama_state_seq_get_data(self._api, self._ptr, target, size, 0))

    def seq_set(self, blob: bytes) -> None:
        """llama_state_seq_set_data of *blob* into sequence 0."""
        source = ffi.from_buffer("uint8_t[]", blob)
        _check(lib.llama_state_seq_set_data(self._api, self._ptr, source, len(blob), 0))

    def seq_get_range(self, out: bytearray, start: int, end: int) -> None:
        """Copy positions of sequence 0 into *out*, through sequence 1, which is empty."""
        memory = lib.llama_get_memory(self._api, self._ptr)
        lib.llama_memory_seq_cp(self._api, memory, 0, 1, start, end)
        size = lib.llama_state_seq_get_size(self._api, self._ptr, 1)
        target = ffi.from_buffer("uint8_t[]", out)
        _check(lib.llama_state_seq_get_data(self._api, self._ptr, target, size, 1))
        lib.llama_memory_seq_rm(self._api, memory, 1, -1, -1)

    # -- files

    def save_file(self, path: Path) -> None:
        """llama_state_save_file."""
        self._file("llama_state_save_file", _SAVE, path)

    def load_file(self, path: Path) -> None:
        """llama_state_load_file."""
        self._file("llama_state_load_file", _LOAD, path, count=True)

    def seq_save_file(self, path: Path) -> None:
        """llama_state_seq_save_file of sequence 0."""
        self._file("llama_state_seq_save_file", _SEQ_SAVE, path, 0)

    def seq_load_file(self, path: Path) -> None:
        """llama_state_seq_load_file into sequence 0."""
        self._file("llama_state_seq_load_file", _SEQ_LOAD, path, 0, count=True)

    def _file(
        self, name: str, types: list[Any], path: Path, *seq_id: int, count: bool = False
    ) -> None:
        function = getattr(self._library, name)
        # A bool leaves the upper bytes of the register undefined, a size fills them all.
        function.restype = ctypes.c_size_t if seq_id else ctypes.c_bool
        function.argtypes = types
        listed = [ctypes.byref(self._count)] if count else []
        name_of_file = os.fsencode(path)
        _check(
            function(self._address, name_of_file, *seq_id, self._tokens, len(self._tokens), *listed)
        )


def _check(done: int) -> None:
    if not done:
        raise RuntimeError("llama.cpp refused it")
