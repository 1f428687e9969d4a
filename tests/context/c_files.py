"""llama.cpp's own file functions, called through ctypes past everything of ours.

They are given real token buffers and count pointers: without those they crash, or load nothing.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import llama_state as ls

CAPACITY = 8192

Tokens = tuple[int, ...]


class Native:
    """llama.cpp's own file functions."""

    def __init__(self, library: ls.Library) -> None:
        lib = ctypes.CDLL(str(library.path))
        # A context, a path, sometimes a sequence id, then tokens, their number or room for
        # them, and, to load, where their number goes.
        ctx, path, seq_id = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
        tokens, size = ctypes.POINTER(ctypes.c_int32), ctypes.c_size_t
        count = ctypes.POINTER(ctypes.c_size_t)
        self._save = lib.llama_state_save_file
        self._save.argtypes, self._save.restype = [ctx, path, tokens, size], ctypes.c_bool
        self._load = lib.llama_state_load_file
        self._load.argtypes, self._load.restype = [ctx, path, tokens, size, count], ctypes.c_bool
        self._seq_save = lib.llama_state_seq_save_file
        self._seq_save.argtypes, self._seq_save.restype = [ctx, path, seq_id, tokens, size], size
        self._seq_load = lib.llama_state_seq_load_file
        self._seq_load.argtypes = [ctx, path, seq_id, tokens, size, count]
        self._seq_load.restype = size

    def save(self, ctx: ls.Context, path: Path, tokens: Tokens) -> None:
        assert self._save(ctx.pointer, os.fsencode(path), _array(tokens), len(tokens))

    def load(self, ctx: ls.Context, path: Path) -> Tokens:
        room, count = _array(()), ctypes.c_size_t()
        assert self._load(ctx.pointer, os.fsencode(path), room, CAPACITY, count)
        return tuple(room[: count.value])

    def seq_save(self, ctx: ls.Context, path: Path, seq_id: int, tokens: Tokens) -> int:
        array = _array(tokens)
        return self._seq_save(ctx.pointer, os.fsencode(path), seq_id, array, len(tokens))

    def seq_load(self, ctx: ls.Context, path: Path, seq_id: int) -> tuple[int, Tokens]:
        room, count = _array(()), ctypes.c_size_t()
        name = os.fsencode(path)
        nbytes = self._seq_load(ctx.pointer, name, seq_id, room, CAPACITY, count)
        return nbytes, tuple(room[: count.value])


def _array(tokens: Tokens) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * CAPACITY)(*tokens)
