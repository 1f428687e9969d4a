"""Contexts in asyncio: the event loop never waits, and what is cancelled is whole."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.aio import AsyncContext

pytestmark = pytest.mark.libllama

Make = Callable[..., ls.Context]


@pytest.fixture
def ctx(make: Make) -> ls.Context:
    ctx = make(n_seq_max=2, kv_unified=True)
    ctx.decode(range(100))
    return ctx


@contextmanager
def busy(ctx: ls.Context) -> Iterator[None]:
    """Somebody else has the context in the block."""
    taken, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with ctx._handle.use():
            taken.set()
            enough.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(30)
    try:
        yield
    finally:
        enough.set()
        thread.join()


async def cancelled(task: asyncio.Task[object]) -> bool:
    with suppress(asyncio.CancelledError):
        await task
    return task.cancelled()


def test_the_same_as_without(ctx: ls.Context, make: Make, tmp_path: Path) -> None:
    """Each coroutine gives what the method of its name gives."""

    async def main() -> None:
        async with AsyncContext(make(n_seq_max=2, kv_unified=True)) as actx:
            other = actx.context
            await actx.decode(range(100))
            assert await actx.n_past() == 100
            assert await actx.logits() == ctx.logits()
            assert await actx.state_size() == ctx.state_size()
            blob = await actx.snapshot()
            assert blob == ctx.snapshot() == await actx.snapshot(bytearray(len(blob)))
            assert await actx.seq_state_size() == ctx.seq_state_size()
            one = await actx.seq_snapshot()
            assert one == ctx.seq_snapshot() == await actx.seq_snapshot(0, out=bytearray(len(one)))
            await actx.seq_cp(0, 1)
            await actx.seq_rm(0, 50)
            assert (other.n_past(0), other.n_past(1)) == (50, 100)
            await actx.clear()
            assert (await actx.restore(blob)).sequences == ctx.restore(blob).sequences
            assert (await actx.seq_restore(one, 1)).sequences[1].n_past == 100
            path = tmp_path / "state"
            nbytes = await actx.save_state(path, [1, 2], durable=False)
            assert (await actx.load_state(path)).nbytes == nbytes
            await actx.seq_save_state(path, 1, (3,), durable=False)
            assert (await actx.seq_load_state(path)).tokens == (3,)
            if ctx.library.session_version > 9:  # that one has no such snapshots
                kept = await actx.seq_device_snapshot()
                await actx.decode([1])
                assert (await actx.run(kept.restore)).sequences[0].n_past == 100
            checkpoint = await actx.checkpoint(0, tokens=range(100))
            await actx.clear()
            assert (await actx.resume(checkpoint)).tokens == tuple(range(100))
            assert await actx.n_past() == 100
            with pytest.raises(ls.SequenceIdError):
                await actx.decode([1], 9)
            with pytest.raises(ls.FormatError):
                await actx.restore(b"nothing")
        with pytest.raises(ls.ClosedError):
            await actx.n_past()
        await actx.close()

    asyncio.run(main())


def test_calls_come_in_order(ctx: ls.Context) -> None:
    """Tasks that decode at once decode one after the other."""

    async def main() -> None:
        actx = AsyncContext(ctx)
        await asyncio.gather(*(actx.decode([n] * 3) for n in range(20)))
        assert await actx.n_past() == 160

    asyncio.run(main())


@pytest.mark.usefixtures("small_pieces")
def test_the_event_loop_goes_on(ctx: ls.Context, tmp_path: Path) -> None:
    """While a save takes its time, other tasks run: at least once for each of its steps."""
    ticks: list[int] = []

    async def tick() -> None:
        while True:
            ticks.append(0)
            await asyncio.sleep(0.001)

    async def main() -> None:
        ticking = asyncio.create_task(tick())
        seen: list[int] = []

        def progress(done: int, total: int) -> None:
            before = len(ticks)
            while len(ticks) == before:  # for ever, were the loop to wait for us
                time.sleep(0.001)
            seen.append(done)

        nbytes = await AsyncContext(ctx).save_state(
            tmp_path / "s", durable=False, progress=progress
        )
        assert seen[-1] == nbytes
        ticking.cancel()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("memory_limit", [None, 0])
def test_a_cancelled_save(ctx: ls.Context, memory_limit: int | None, tmp_path: Path) -> None:
    """It stops at the next step; the old file is there, nothing else, and the context is free."""
    path = tmp_path / "state"
    path.write_bytes(b"old")
    before = ctx.snapshot()

    async def main() -> None:
        actx = AsyncContext(ctx)
        loop, begun, steps = asyncio.get_running_loop(), asyncio.Event(), []

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.02)
            steps.append(done)

        task = asyncio.create_task(
            actx.save_state(path, durable=False, progress=progress, memory_limit=memory_limit)
        )
        await begun.wait()
        task.cancel()
        assert await cancelled(task)
        # It is over: no step comes any more.
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
        taken = len(steps)
        assert await actx.snapshot() == before
        assert len(steps) == taken < 5
        await actx.save_state(path, durable=False)

    asyncio.run(main())
    assert ctx.load_state(path).sequences[0].n_past == 100


@pytest.mark.usefixtures("small_pieces")
def test_a_cancelled_load(ctx: ls.Context, make: Make, tmp_path: Path) -> None:
    """While the file is read it stops, and the context is as it was."""
    path = tmp_path / "state"
    ctx.save_state(path, durable=False)
    other = make(n_seq_max=2, kv_unified=True)
    other.decode(range(30))
    before = other.snapshot()

    async def main() -> None:
        actx = AsyncContext(other)
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.02)

        task = asyncio.create_task(actx.load_state(path, progress=progress))
        await begun.wait()
        task.cancel()
        assert await cancelled(task)
        assert await actx.snapshot() == before

    asyncio.run(main())


def test_a_cancelled_restore(ctx: ls.Context, make: Make) -> None:
    """One that has begun is waited for, however often it is cancelled, and then it is done."""
    blob = ctx.snapshot()
    other = make(n_seq_max=2, kv_unified=True)
    other.decode(range(30))

    def late_failure() -> None:
        other.state_size()
        raise KeyError

    async def main() -> None:
        actx = AsyncContext(other)
        with busy(other):
            task: asyncio.Task[object] = asyncio.create_task(actx.restore(blob))
            for _ in range(3):
                await asyncio.sleep(0.02)
                task.cancel()
            assert not task.done()
        assert await cancelled(task)
        assert await actx.snapshot() == blob
        # What fails after it was cancelled is nobody's concern, and leaves the context too.
        with busy(other):
            task = asyncio.create_task(actx.run(late_failure))
            await asyncio.sleep(0.02)
            task.cancel()
        assert await cancelled(task)
        assert await actx.snapshot() == blob

    asyncio.run(main())


def test_what_has_not_begun_does_not_begin(ctx: ls.Context) -> None:
    """A cancelled call that waits for its turn changes nothing."""

    async def main() -> None:
        actx = AsyncContext(ctx)
        with busy(ctx):
            first = asyncio.create_task(actx.decode([1]))
            second = asyncio.create_task(actx.clear())
            await asyncio.sleep(0.02)
            second.cancel()
            assert await cancelled(second)
            assert not first.done()
        await first
        assert await actx.n_past() == 101

    asyncio.run(main())


def test_a_savepoint(ctx: ls.Context) -> None:
    """What the block does stays; what it does before it fails or is cancelled is undone."""

    async def main() -> None:
        actx = AsyncContext(ctx)
        async with actx.savepoint():
            await actx.decode([1])
        assert await actx.n_past() == 101
        with pytest.raises(KeyError):
            async with actx.savepoint(0):
                await actx.decode([1, 2])
                raise KeyError
        assert await actx.n_past() == 101
        inside = asyncio.Event()

        async def block() -> None:
            async with actx.savepoint():
                await actx.clear()
                inside.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(block())
        await inside.wait()
        task.cancel()
        assert await cancelled(task)
        assert await actx.n_past() == 101

    asyncio.run(main())


def test_cancelled_while_it_enters(ctx: ls.Context) -> None:
    """A block that never began undoes nothing, whatever is collected when."""

    async def main() -> None:
        actx = AsyncContext(ctx)

        async def block() -> None:
            async with actx.savepoint():
                raise AssertionError

        with busy(ctx):
            task = asyncio.create_task(block())
            await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.sleep(0.02)
        assert await cancelled(task)
        del task
        await actx.decode([1])
        gc.collect()
        assert await actx.n_past() == 101

    asyncio.run(main())


def test_cancelled_again_before_the_undo(ctx: ls.Context) -> None:
    """The undo of a block waits for its turn and cannot be cancelled away."""

    async def main() -> None:
        actx = AsyncContext(ctx)
        inside = asyncio.Event()

        async def block() -> None:
            async with actx.savepoint():
                await actx.decode([1, 2])
                inside.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(block())
        await inside.wait()
        with busy(ctx):
            other = asyncio.create_task(actx.n_past())
            await asyncio.sleep(0.02)
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0.02)
        assert await cancelled(task)
        assert await other == 102
        assert await actx.n_past() == 100

    asyncio.run(main())


def test_cancelled_at_any_step(ctx: ls.Context) -> None:
    """Whichever step of the loop it ends at: all of the block is there, or nothing of it."""

    async def main(steps: int) -> bool:
        actx = AsyncContext(ctx)
        blob = await actx.snapshot()

        async def block() -> None:
            async with actx.savepoint():
                await actx.decode([1])
                await actx.seq_cp(0, 1)
                await actx.decode([2])

        task = asyncio.create_task(block())
        for _ in range(steps):
            await asyncio.sleep(0 if steps % 2 else 0.0002)
        task.cancel()
        ended = not await cancelled(task)
        assert await actx.n_past() == (102 if ended else 100)
        assert await actx.n_past(1) == (101 if ended else 0)
        await actx.restore(blob)
        return ended

    ends = [asyncio.run(main(steps)) for steps in range(60)]
    assert True in ends
    assert False in ends


def test_a_cancelled_close(ctx: ls.Context) -> None:
    """The context is closed and its thread ends all the same."""
    threads = set(threading.enumerate())

    async def main() -> None:
        actx = AsyncContext(ctx)
        await actx.n_past()
        with busy(ctx):
            closing = asyncio.create_task(actx.close())
            await asyncio.sleep(0.02)
            closing.cancel()
            assert await cancelled(closing)

    asyncio.run(main())
    for _ in range(200):
        left = set(threading.enumerate()) - threads
        if not any("llama_state-aio" in thread.name for thread in left):
            break
        time.sleep(0.02)
    else:
        raise AssertionError("the thread is still there")
    assert "closed" in repr(ctx)


def test_closing(ctx: ls.Context) -> None:
    """It waits for the call that runs; what still waits then is a ClosedError."""

    async def main() -> None:
        actx = AsyncContext(ctx)
        with busy(ctx):
            closing = asyncio.create_task(actx.close())
            await asyncio.sleep(0.02)
            assert not closing.done()
        await closing
        with pytest.raises(ls.ClosedError):
            await actx.decode([1])

    asyncio.run(main())
