"""Snapshots into, and restores from, whatever memory the caller has: not copied on the way."""

from __future__ import annotations

import ctypes
import mmap
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_state as ls
from llama_state._io.buffers import POOL

pytestmark = pytest.mark.libllama

Make = Callable[..., ls.Context]

KINDS = {
    "bytearray": bytearray,
    "memoryview of rows": lambda n: memoryview(bytearray(n)).cast("B", (n // 4, 4)),
    "array of float": lambda n: array("f", bytes(n)),
    "ctypes array": lambda n: (ctypes.c_int32 * (n // 4))(),
    "numpy": lambda n: np.zeros(n // 2, dtype="<f2"),
    "numpy, by columns": lambda n: np.zeros((2, n // 4), dtype="<f2", order="F"),
    "mmap": lambda n: mmap.mmap(-1, n),
}


@pytest.fixture
def ctx(make: Make) -> ls.Context:
    ctx = make()
    ctx.decode([i % ctx.n_vocab for i in range(200)])
    return ctx


@pytest.fixture(params=[*KINDS, "shared memory", "mapped file"])
def buffer(request: pytest.FixtureRequest, ctx: ls.Context, tmp_path: Path) -> Iterator[Any]:
    """Each kind of writable buffer, somewhat larger than the state."""
    size = ctx.state_size() // 4 * 4 + 64
    if request.param in KINDS:
        yield KINDS[request.param](size)
    elif request.param == "shared memory":
        shared = SharedMemory(create=True, size=size)
        yield shared.buf
        shared.close()
        shared.unlink()
    else:
        path = tmp_path / "mapped"
        path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            yield mmap.mmap(file.fileno(), size)


def traced(work: Callable[[], Any]) -> int:
    """The peak of what Python allocates in *work*."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_snapshot_fills_and_restore_reads_the_callers_memory(ctx: ls.Context, buffer: Any) -> None:
    """Whole state and sequence come and go through any buffer, and no other memory is taken."""
    ctx.restore(ctx.snapshot())  # what is learned of a context once
    ls.trim_buffers()
    for take, put in ((ctx.snapshot, ctx.restore), (ctx.seq_snapshot, ctx.seq_restore)):
        blob = take()
        views: list[memoryview] = []
        assert traced(lambda take=take, views=views: views.append(take(out=buffer))) < 50_000
        view = views.pop()
        assert view == blob
        ctx.clear()
        assert traced(lambda put=put, view=view: put(view)) < 50_000 < len(blob)
        assert take() == blob
    assert POOL.idle == 0
    view.release()


def test_read_only_buffers(ctx: ls.Context) -> None:
    """They can be restored from, and not be filled."""
    blob = ctx.snapshot()
    for source in (blob, memoryview(blob), np.frombuffer(blob, "u1")):
        ctx.clear()
        ctx.restore(source)
        assert ctx.snapshot() == blob
        with pytest.raises((BufferError, TypeError, ValueError)):
            ctx.snapshot(out=source)
        assert ctx.snapshot() == blob


def test_saves_borrow_and_give_back(ctx: ls.Context, tmp_path: Path) -> None:
    """A save keeps its buffer for the next one; trim_buffers() returns it to the system."""
    ls.trim_buffers()
    ctx.save_state(tmp_path / "state", durable=False)
    kept = POOL.idle
    assert kept >= ctx.state_size()
    ctx.seq_save_state(tmp_path / "sequence", durable=False)
    assert POOL.idle == kept
    assert ls.trim_buffers() == kept
    assert POOL.idle == 0


def test_a_large_snapshot(make: Make) -> None:
    """Bytes that are worth huge pages hold what a buffer of the caller's gets."""
    ctx = make(n_ctx=4096, n_batch=2048)
    ctx.decode([i % ctx.n_vocab for i in range(3000)])
    blob = ctx.snapshot()
    assert len(blob) > 4 << 20
    assert ctx.snapshot(out=bytearray(len(blob))) == blob
    assert ctx.seq_restore(ctx.seq_snapshot()).sequences[0].n_past == 3000
