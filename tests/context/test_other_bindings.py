"""What another binding does to a context behind our back, where it can only be stated."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

import llama_state as ls

pytestmark = pytest.mark.libllama


def test_a_deferred_shift_is_not_in_a_state(make: Callable[..., ls.Context]) -> None:
    """llama.cpp moves positions at once and rotates the keys at its next decode.

    A state saved in between has new positions and old keys; nothing in it says so.
    """
    moved, restored, control = make(), make(), make()
    for ctx in (moved, control):
        ctx.decode(range(20))
        shift(ctx, 7)
    control.decode([30])  # the keys are rotated
    control.seq_rm(0, 27)
    restored.seq_restore(moved.seq_snapshot())
    assert restored.n_past() == control.n_past() == 27
    for ctx in (moved, restored, control):
        ctx.decode([31])
    assert distance(moved, control) < 1e-3
    assert distance(restored, control) > 10 * distance(moved, control)
    # After a decode there is nothing deferred: the same state is restored whole.
    restored.seq_restore(moved.seq_snapshot())
    for ctx in (moved, restored):
        ctx.decode([32])
    assert distance(restored, moved) < 1e-3


def shift(ctx: ls.Context, delta: int) -> None:
    """Move all positions of sequence 0, as another binding does."""
    c = ctypes.CDLL(str(ctx.library.path))
    c.llama_get_memory.restype = ctypes.c_void_p
    c.llama_get_memory.argtypes = [ctypes.c_void_p]
    position = ctypes.c_int32
    c.llama_memory_seq_add.argtypes = [ctypes.c_void_p, *4 * [position]]
    c.llama_memory_seq_add.restype = None
    c.llama_memory_seq_add(c.llama_get_memory(ctx.pointer), 0, -1, -1, delta)


def distance(one: ls.Context, other: ls.Context) -> float:
    """Return the largest difference of two contexts' logits."""
    return float(np.abs(np.subtract(one.logits(), other.logits())).max())
