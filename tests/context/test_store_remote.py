"""A store with a place that is far away: slow, dead, not worth it, written to later."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

import llama_state as ls
from llama_state.store import Place, PrefixStore
from llama_state.store.places.guard import Guard
from llama_state.store.places.memory import MemoryBackend
from llama_state.store.places.remote import RemoteBackend
from llama_state.testing.conformance import nmse
from tests.context.oracle import LIMIT
from tests.libllama import MODELS
from tests.store.engines import LocalEngine

pytestmark = pytest.mark.libllama

CHUNK = 64
N = 200
DEADLINE = 0.5
GRACE = 0.2
LARGE = 1 << 30
LLAMA = MODELS["llama-dense"]


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    """A server."""
    engine = LocalEngine()
    yield engine
    engine.go_on()


@pytest.fixture
def ctx() -> Iterator[ls.Context]:
    """A context."""
    with LLAMA.context(n_ctx=1024) as ctx:
        yield ctx


def tokens(n: int = N, seed: int = 0) -> list[int]:
    """Some tokens."""
    random = Random(seed)
    return [random.randrange(LLAMA.n_vocab) for _ in range(n)]


def far(engine: LocalEngine, rest: float = 60.0) -> Guard:
    """A place on that server."""
    return Guard(RemoteBackend(engine, LARGE), DEADLINE, rest)


def stored(*places: Any, **options: Any) -> PrefixStore:
    """A store in these places."""
    return PrefixStore(places, chunk_tokens=CHUNK, **options)


def remember(store: PrefixStore, prompt: list[int]) -> None:
    """Store a prompt, from a context of its own."""
    with LLAMA.context(n_ctx=1024) as other:
        store.prefill(other, prompt)
        assert store.flush(30)


def test_back_end_of_ones_own(engine: LocalEngine, ctx: ls.Context) -> None:
    """A back end that is open is a place, alone and behind others."""
    with PrefixStore(RemoteBackend(engine, LARGE), chunk_tokens=CHUNK) as store:
        remember(store, tokens())
        assert store.recall(ctx, [*tokens(), 1]).n_past == N
    ctx.clear()
    with stored(MemoryBackend(LARGE), far(engine)) as store:
        assert store.recall(ctx, [*tokens(), 1]).n_past == N


def test_every_kind(engine: LocalEngine, model: ls.Model) -> None:
    """What a server gives back is what it was given, for every kind of memory."""
    prompt = [token % model.n_vocab for token in tokens()]
    with model.context(n_ctx=320) as one, model.context(n_ctx=320) as other:
        with stored(far(engine)) as store:
            store.prefill(one, prompt)
        with stored(far(engine)) as store:
            found = store.prefill(other, prompt)
        assert found.n_past in (N, N - 1), found
        assert nmse(one.logits(), other.logits()) < LIMIT


def test_asks_for_all_at_once(engine: LocalEngine, ctx: ls.Context) -> None:
    """A longer prompt takes more objects, and no more questions."""
    counts = {}
    for n in (2 * CHUNK, 12 * CHUNK):
        with stored(far(engine)) as store:
            remember(store, tokens(n))
        with stored(far(engine)) as store:
            before = engine.n_requests
            assert store.find(ctx, tokens(n)).n_tokens >= n - CHUNK
            counts[n] = engine.n_requests - before
    assert counts[12 * CHUNK] == counts[2 * CHUNK] <= 4


def test_dead(engine: LocalEngine, ctx: ls.Context) -> None:
    """A server that answers no more costs its deadline once; the near place serves."""
    with stored(MemoryBackend(LARGE), far(engine)) as store:
        remember(store, tokens())
        engine.hang()
        times = []
        for n in range(4):
            began = time.monotonic()
            found = store.prefill(ctx, [*tokens(), n])
            times.append(time.monotonic() - began)
            assert found.n_past == N
            ctx.clear()
        assert times[0] < DEADLINE + GRACE + 0.3, times  # and the decoding
        assert max(times[1:]) < DEADLINE / 2, times
        stats = store.stats()
        assert stats.places[1].trips == 1
        assert stats.places[1].resting_seconds > 0
        assert any("TimeoutError" in kind for kind in stats.failures), stats.failures
        engine.go_on()


def test_dead_alone(engine: LocalEngine, ctx: ls.Context) -> None:
    """With no other place generation goes on without the store."""
    with stored(far(engine)) as store:
        remember(store, tokens())
        engine.hang()
        for n in range(3):
            began = time.monotonic()
            found = store.prefill(ctx, [*tokens(), n])
            assert time.monotonic() - began < DEADLINE + GRACE + 0.3
            assert (found.n_past, found.why.reason) == (0, "failed"), found
            assert ctx.n_past() == N + 1
            ctx.clear()
        engine.go_on()


@pytest.mark.parametrize("when", [1, 2, 3, 4, 5, 6, 8, 11])
def test_dies_in_the_middle(engine: LocalEngine, ctx: ls.Context, when: int) -> None:
    """Whenever it dies the sequence is what the result says, and the next logits are right."""
    prompt = [*tokens(12 * CHUNK), 1]
    with LLAMA.context(n_ctx=1024) as fresh, stored(far(engine)) as store:
        remember(store, prompt)
        fresh.decode(prompt)
        begin, request = engine.n_requests, engine._request

        def dies(nbytes: int = 0) -> None:
            if engine.n_requests - begin >= when:
                engine.error = ConnectionResetError(errno.ECONNRESET, "it is gone")
            request(nbytes)

        engine._request = dies  # type: ignore[method-assign]
        found = store.recall(ctx, prompt)
        assert ctx.n_past() == found.n_past == len(found.tokens)
        ctx.decode(prompt[found.n_past :])
        assert nmse(fresh.logits(), ctx.logits()) < 1e-5
        assert store.stats().places[0].trips == 1


def test_evicts_in_the_middle(engine: LocalEngine, ctx: ls.Context) -> None:
    """A server that lets go of objects makes holes: the hit ends there, and it is counted."""
    prompt = [*tokens(8 * CHUNK), 1]
    with stored(far(engine)) as store:
        remember(store, prompt)
    rows = sorted((n for n in engine.objects if n.kind == "R"), key=lambda n: n.key)
    for gone in rows:
        kept = dict(engine.objects)
        with stored(far(engine)) as store:
            store.find(ctx, prompt)
            del engine.objects[gone]  # after it was listed
            found = store.recall(ctx, prompt)
            assert found.n_past % CHUNK == 0
            assert found.n_past < 8 * CHUNK + 1
            ctx.clear()
        engine.objects = kept


def test_too_little_gain(engine: LocalEngine, ctx: ls.Context) -> None:
    """What takes longer to read than to decode is decoded; why says so."""
    prompt = [*tokens(8 * CHUNK), 1]
    with stored(far(engine)) as store:
        remember(store, prompt)
    near = MemoryBackend(LARGE)
    with stored(near) as store:
        remember(store, prompt[: 2 * CHUNK])
    engine.bytes_per_second = 1e6
    for min_gain, expected in ((0.0, 2 * CHUNK), (None, 8 * CHUNK), (-60.0, 8 * CHUNK)):
        place = far(engine)
        place.deadline = 60
        with stored(MemoryBackend(LARGE), place, min_gain=min_gain) as store:
            # Measures both: what another prompt takes to decode, and what reading takes.
            store.prefill(ctx, tokens(CHUNK, seed=5))
            ctx.clear()
            store._backend.tiers[0].backend.evict(0)
            place.pace.read(1_000_000, 1.0)
            for name, data in near._objects.items():
                store._backend.tiers[0].backend.put(name, [data])
            found = store.recall(ctx, prompt)
            assert found.n_past == expected, (min_gain, found)
            if min_gain == 0.0:
                assert found.why.reason == "too little gain"
                assert store.stats().tokens_lost["too little gain"] == len(prompt) - expected
            ctx.clear()


def test_written_behind(engine: LocalEngine, ctx: ls.Context) -> None:
    """A call does not wait for a place that is written to later; another process finds it there."""
    engine.bytes_per_second = 2e6
    place = Place(far(engine), write="behind")
    with stored(MemoryBackend(LARGE), place) as store:
        began = time.monotonic()
        store.prefill(ctx, tokens())
        took = time.monotonic() - began
        assert not [each for each in engine.objects if each.kind == "R"] or took < 0.2
        assert store.flush(30)
        assert sum(each.kind == "R" for each in engine.objects) == -(-N // CHUNK)
        kept = store.stats().places[1].kept
        store.prefill(ctx, [*tokens(), 3])
        assert store.flush(30)
        assert store.stats().places[1].kept > kept
    ctx.clear()
    with stored(far(engine), min_gain=None) as store:
        assert store.recall(ctx, [*tokens(), 1]).n_past >= N - CHUNK


def test_admitted_on_second_sight(engine: LocalEngine, ctx: ls.Context) -> None:
    """A prompt that comes once stays near; one that comes again goes to the far place, too."""
    place = Place(far(engine), admit="second")
    with stored(MemoryBackend(LARGE), place) as store:
        for prompt in (tokens(), tokens(seed=1)):
            store.prefill(ctx, prompt)
            ctx.clear()
        assert store.flush(30)
        assert not [each for each in engine.objects if each.kind == "R"]
        store.prefill(ctx, tokens())
        assert store.flush(30)
        assert sum(each.kind == "R" for each in engine.objects) == -(-N // CHUNK)


def test_never_written(engine: LocalEngine, ctx: ls.Context) -> None:
    """A place that is only read gets nothing."""
    with stored(far(engine)) as store:
        remember(store, tokens())
    before = dict(engine.objects)
    reading = Guard(RemoteBackend(engine, LARGE, readonly=True))
    with stored(MemoryBackend(LARGE), reading) as store:
        assert store.prefill(ctx, [*tokens(), 4]).n_past == N
        assert store.flush(30)
        assert store.stats().places[0].kept > 0
    assert engine.objects == before


def test_prometheus(engine: LocalEngine, ctx: ls.Context) -> None:
    """The figures as text, which a parser of Prometheus reads."""
    with stored(MemoryBackend(LARGE), far(engine)) as store:
        store.prefill(ctx, tokens())
        store.prefill(ctx, [*tokens(), 1])
        text = store.stats().prometheus()
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in samples}
    assert values['llama_state_store_recalls_total{result="hit"}'] == 1
    assert values["llama_state_store_tokens_asked_total"] == 2 * N + 1
    assert values["llama_state_store_tokens_recalled_total"] == N
    assert values['llama_state_store_used_bytes{place="local:"}'] > 0
    assert len(values) == len(samples), "no sample twice"


def test_log_lines(engine: LocalEngine, ctx: ls.Context, caplog: pytest.LogCaptureFixture) -> None:
    """What was done is logged at DEBUG, with figures that a program can read."""
    with caplog.at_level("DEBUG", "llama_state.store"), stored(far(engine)) as store:
        store.prefill(ctx, tokens())
        store.recall(ctx, [*tokens(), 1])
    facts = [record.facts for record in caplog.records if hasattr(record, "facts")]
    assert [each["doing"] for each in facts] == ["recall", "remember", "recall"]
    assert facts[1]["new_tokens"] == N
    assert facts[2]["why"] == "held"
    assert "new_tokens=200" in caplog.text
