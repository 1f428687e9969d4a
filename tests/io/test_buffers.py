"""Buffers that are lent and taken back, and buffers of others."""

from __future__ import annotations

import ctypes
import gc
import mmap
import subprocess
import sys
import threading
from array import array
from multiprocessing.shared_memory import SharedMemory
from types import FrameType
from typing import Any

import numpy as np
import pytest

from llama_state._io.buffers import Pool, flat
from tests.many_threads import together

MIB = 1 << 20


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def lent_at(pool: Pool, nbytes: int) -> int:
    with pool.lend(nbytes) as view:
        assert len(view) == nbytes
        assert not view.readonly
        return address(view)


def test_what_comes_back_is_lent_again() -> None:
    """The same memory, from the beginning of a page, also for somewhat more or less."""
    pool = Pool(16 * MIB)
    first = lent_at(pool, 4 * MIB)
    assert first % mmap.PAGESIZE == 0
    assert [lent_at(pool, n) for n in (4 * MIB + 100, 3 * MIB, 1)] == [first] * 3


def test_what_is_lent_is_nobody_elses() -> None:
    """Two loans at once are two buffers, and both are kept."""
    pool = Pool(16 * MIB)
    with pool.lend(MIB) as a, pool.lend(MIB) as b:
        assert pool.idle == 0
        assert abs(address(a) - address(b)) >= MIB
    assert pool.idle >= 2 * MIB


def test_no_more_are_kept_than_were_lent_at_once() -> None:
    """A state that grows leaves one buffer behind, not one of each size."""
    pool = Pool(1 << 40)
    for n in (1, 2, 4, 8, 16):
        lent_at(pool, n * MIB)
    assert 16 * MIB <= pool.idle < 20 * MIB


def test_what_is_kept_is_bounded_and_let_go() -> None:
    """Not more than asked is kept, and nothing after trim()."""
    pool = Pool(3 * MIB)
    lent_at(pool, 4 * MIB)
    assert pool.idle == 0
    with pool.lend(MIB), pool.lend(MIB), pool.lend(MIB):
        pass
    assert MIB <= pool.idle <= 3 * MIB
    kept = pool.idle
    assert pool.trim() == kept
    assert pool.idle == pool.trim() == 0


def test_an_exception_brings_the_buffer_back() -> None:
    """Whatever happens in the block, the loan ends."""
    pool = Pool(16 * MIB)
    with pytest.raises(KeyError), pool.lend(MIB):
        raise KeyError
    assert pool.idle >= MIB


def test_a_limit_holds_for_its_thread() -> None:
    """More than the limit is a MemoryError, or pages of a file where those will do."""
    pool = Pool(16 * MIB)
    with pool.limited(MIB):
        lent_at(pool, MIB)
        with (
            pytest.raises(MemoryError, match="1048577 bytes; the limit is 1048576"),
            pool.lend(MIB + 1),
        ):
            pass
        with pool.lend(3 * MIB, spill=True) as view:
            view[:] = b"x" * len(view)
            assert bytes(view[-3:]) == b"xxx"
        thread = threading.Thread(target=lent_at, args=(pool, 2 * MIB))
        thread.start()
        thread.join()
        with pool.limited(None):
            lent_at(pool, 2 * MIB)
        with pytest.raises(MemoryError), pool.lend(2 * MIB):
            pass
    lent_at(pool, 2 * MIB)


@pytest.mark.parametrize("spill", [False, True])
def test_more_than_there_is(spill: bool) -> None:
    """What neither memory nor disk can hold is a MemoryError, and what was kept is let go."""
    pool = Pool(16 * MIB)
    lent_at(pool, MIB)
    with pytest.raises(MemoryError), pool.lend(1 << 60, spill=spill):
        pass
    assert pool.idle == 0


def test_many_threads() -> None:
    """No two threads ever write to the same buffer."""
    pool = Pool(4 * MIB)
    wrong = []

    def work(n: int) -> None:
        for turn in range(200):
            size = 1000 + 977 * ((n + turn) % 7)
            with pool.lend(size) as view:
                view[:] = bytes([n]) * size
                if bytes(view) != bytes([n]) * size:
                    wrong.append(n)

    together(8, work)
    assert wrong == []
    assert pool.idle <= 4 * MIB


def test_flat_takes_any_contiguous_buffer() -> None:
    """Any format, shape and order, read-only or not, and none of it copied."""
    numbers = np.arange(24, dtype="<f2")
    for buffer in (
        bytearray(48),
        array("d", [1.0] * 6),
        (ctypes.c_int32 * 12)(),
        numbers,
        numbers.reshape(4, 6),
        np.asfortranarray(numbers.reshape(4, 6)),
        np.zeros(6, dtype=[("a", "<i4"), ("b", "<f4")]),
        memoryview(bytearray(48)).cast("B", (4, 12)),
        mmap.mmap(-1, 48),
    ):
        view = flat(buffer)
        assert (view.format, view.ndim, len(view)) == ("B", 1, 48)
        view[7] = 99
        assert flat(buffer)[7] == 99
    assert flat(bytes(48)).readonly
    shared = SharedMemory(create=True, size=48)
    try:
        flat(shared.buf)[3] = 5
        assert shared.buf[3] == 5
    finally:
        shared.close()
        shared.unlink()


def test_flat_views_can_be_garbage() -> None:
    """Python before 3.12.6 crashes where a memoryview that others are views of is in a loop."""
    code = (
        "import gc\n"
        "from itertools import permutations\n"
        "from llama_state._io.buffers import flat\n"
        "class Holder: pass\n"
        "for order in permutations(range(3)):\n"
        "    first = memoryview(bytearray(100))\n"
        "    views = [first, flat(first), flat(flat(first)).toreadonly()]\n"
        "    ring = [Holder() for _ in order]\n"
        "    for index in order:\n"
        "        ring[index].view, ring[index].next = views[order[index]], ring[index - 1]\n"
        "    del first, views, ring\n"
        "    gc.collect()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("wrong", [memoryview(bytes(8))[::2], np.zeros((4, 4))[:, :2], "text", 3])
def test_flat_refuses_the_rest(wrong: object) -> None:
    """What has holes, or is no buffer, is a TypeError."""
    with pytest.raises(TypeError):
        flat(wrong)  # type: ignore[arg-type]


class _Cycle:
    """Refers to itself, so that only the collector finds it."""

    def __init__(self, lent: object) -> None:
        self.me, self.lent = self, lent


def test_a_buffer_that_the_collector_returns() -> None:
    """It comes back in the middle of anything, also of the borrowing of another one."""
    pool = Pool(8 << 20)

    def leave() -> None:
        lent = pool.lend(1 << 16)
        lent.__enter__()
        _Cycle(lent)

    def collect(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code is Pool._take.__code__:
            gc.collect()
            leave()
        return collect

    def borrow() -> None:
        leave()
        sys.settrace(collect)
        with pool.lend(1 << 16):
            pass

    gc.disable()
    try:
        thread = threading.Thread(target=borrow, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    finally:
        gc.enable()
