"""The prefix store in asyncio: the event loop never waits, and what is cancelled is whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state.aio import AsyncContext, AsyncPrefixStore
from llama_state.store import PrefixStore
from llama_state.store.places.folder import FolderBackend
from tests.context.test_aio import Make, busy

pytestmark = pytest.mark.libllama

CHUNK = 16
PROMPT = [3 + i % 90 for i in range(100)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    """A store in a folder."""
    with PrefixStore(tmp_path, capacity_bytes=1 << 30, chunk_tokens=CHUNK) as store:
        yield store


@pytest.fixture
def ctx(make: Make) -> ls.Context:
    """An empty context."""
    return make(n_seq_max=2, kv_unified=True)


def test_the_same_as_without(ctx: ls.Context, store: PrefixStore) -> None:
    """Each coroutine gives what the method of its name gives."""

    async def main() -> None:
        async with AsyncContext(ctx) as actx, AsyncPrefixStore(store) as astore:
            reports: list[tuple[int, int]] = []
            first = await astore.prefill(
                actx, PROMPT, progress=lambda done, total: reports.append((done, total))
            )
            assert first.n_past == 0
            assert reports == [(min(i, 100), 100) for i in range(CHUNK, 100 + CHUNK, CHUNK)]
            assert (await astore.find(actx, [*PROMPT, 1])).n_tokens == 100
            assert (await astore.recall(actx, [*PROMPT, 1], 1)).n_past == 100
            await actx.decode([1, 2], 1)
            remembered = await astore.remember(actx, [*PROMPT, 1, 2], 1, wait=False)
            assert remembered.n_tokens == 102
            assert await astore.flush(30)
            assert await astore.pin(actx, PROMPT, ttl=60) == 96
            assert await astore.forget(actx, [*PROMPT, 1, 2]) > 0
            assert (await astore.find(actx, [*PROMPT, 1])).n_tokens == 96
            with pytest.raises(ls.SequenceIdError):
                await astore.recall(actx, PROMPT, 9)
            with pytest.raises(TypeError):
                await astore.recall(actx, ["a"])  # type: ignore[list-item]
        with pytest.raises(ls.ClosedError):
            await astore.find(actx, PROMPT)

    asyncio.run(main())


def test_the_event_loop_goes_on(
    ctx: ls.Context, store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a disk takes its time, or another thread has the context, other tasks run."""
    put = FolderBackend.put

    def slow(backend: FolderBackend, *arguments: Any) -> bool:
        time.sleep(0.05)
        return put(backend, *arguments)

    monkeypatch.setattr(FolderBackend, "put", slow)

    async def main() -> None:
        actx, astore = AsyncContext(ctx), AsyncPrefixStore(store)
        loop = asyncio.get_running_loop()
        longest, before = 0.0, loop.time()
        work = asyncio.ensure_future(astore.prefill(actx, PROMPT))
        ticks = 0
        while not work.done():
            await asyncio.sleep(0.001)
            longest, before = max(longest, loop.time() - before), loop.time()
            ticks += 1
        await work
        assert ticks > 20
        with busy(ctx):
            task = asyncio.ensure_future(astore.find(actx, PROMPT))
            await asyncio.sleep(0.05)
            assert not task.done()
        assert (await task).n_tokens == 99
        await actx.decode([1])
        start = loop.time()
        await astore.remember(actx, [*PROMPT, 1], wait=False)
        assert loop.time() - start < 0.05  # no longer than one object takes
        assert await astore.flush(30)

    asyncio.run(main())


def test_cancelled(ctx: ls.Context, store: PrefixStore) -> None:
    """A prefill stops at a chunk, the sequence is whole, and what waits does not begin."""

    async def main() -> None:
        actx, astore = AsyncContext(ctx), AsyncPrefixStore(store)
        reached = asyncio.Event()
        loop = asyncio.get_running_loop()

        def report(done: int, total: int) -> None:
            loop.call_soon_threadsafe(reached.set)
            time.sleep(0.05)

        prefill = asyncio.ensure_future(astore.prefill(actx, PROMPT, progress=report))
        waiting = asyncio.ensure_future(astore.prefill(actx, PROMPT, 1))
        await reached.wait()
        waiting.cancel()
        prefill.cancel()
        for task in (prefill, waiting):
            with suppress(asyncio.CancelledError):
                await task
            assert task.cancelled()
        n_past = await actx.n_past()
        assert 0 < n_past < 100
        assert n_past % CHUNK == 0
        assert await actx.n_past(1) == 0
        assert (await astore.prefill(actx, PROMPT)).n_past == n_past
        whole = await actx.logits()
        await astore.recall(actx, PROMPT, 1)
        await actx.decode(PROMPT[await actx.n_past(1) :], 1)
        assert max(abs(a - b) for a, b in zip(whole, await actx.logits(), strict=True)) < 1e-3

    asyncio.run(main())
    assert store.verify().ok


def test_several_contexts(make: Make, store: PrefixStore) -> None:
    """Contexts use one store at once, each in its own thread."""
    contexts = [make() for _ in range(4)]

    async def main() -> None:
        astore = AsyncPrefixStore(store)
        actxs = [AsyncContext(ctx) for ctx in contexts]
        prompts = [[*PROMPT[:50], *[60 + i] * 20] for i in range(4)]
        for _ in range(2):
            await asyncio.gather(
                *(astore.prefill(a, p) for a, p in zip(actxs, prompts, strict=True))
            )
            await asyncio.gather(*(actx.clear() for actx in actxs))
        pairs = zip(actxs, prompts, strict=True)
        found = await asyncio.gather(*(astore.recall(actx, prompt) for actx, prompt in pairs))
        assert [each.n_past for each in found] == [69] * 4

    asyncio.run(main())
    assert not store.stats().failures
