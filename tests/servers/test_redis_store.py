"""A prefix store in Redis with real contexts: whatever the server does, no generation fails."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import llama_state as ls
from llama_state.store import PrefixStore
from llama_state.testing.conformance import nmse
from llama_state.testing.models import write_benchmark_model
from tests.context.oracle import LIMIT
from tests.libllama import LIBRARY, MODELS
from tests.servers.redis_places import MIB, server, shared
from tests.servers.redis_server import RedisServer, cluster, program, running

__all__ = ["server", "shared"]

pytestmark = pytest.mark.libllama

CHUNK = 64
N = 200
DEADLINE = 0.5
GRACE = 0.5  # and the decoding
LLAMA = MODELS["llama-dense"]


@pytest.fixture
def ctx() -> Iterator[ls.Context]:
    with LLAMA.context(n_ctx=1024) as ctx:
        yield ctx


def tokens(n: int = N, seed: int = 0) -> list[int]:
    """Some tokens."""
    random = Random(seed)
    return [random.randrange(3, 127) for _ in range(n)]


def stored(*where: Any, **options: Any) -> PrefixStore:
    """A store with small chunks, which reads whatever there is."""
    return PrefixStore(list(where), chunk_tokens=CHUNK, min_gain=None, **options)


def url(server: RedisServer, **options: object) -> str:
    return server.url(**{"deadline": f"{DEADLINE}s", **options})


def prefilled(store: PrefixStore, prompt: list[int], model: ls.Model = LLAMA) -> tuple[int, float]:
    """Prefill a prompt in a new context: tokens evaluated, and how far the logits are off."""
    with model.context(n_ctx=1024, n_batch=1024) as ctx, model.context(n_ctx=1024) as fresh:
        found = store.prefill(ctx, prompt)
        assert ctx.n_past() == len(prompt)
        fresh.decode(prompt)
        return len(prompt) - len(found.tokens), nmse(fresh.logits(), ctx.logits())


def test_another_process(server: RedisServer) -> None:
    """What two processes have in common is evaluated by the first of them alone."""
    system = tokens(4 * CHUNK)
    code = (
        "import sys, llama_state as ls\n"
        "from llama_state.store import PrefixStore\n"
        "tokens = [int(each) for each in sys.argv[3:]]\n"
        "model = ls.Model(sys.argv[1])\n"
        "with PrefixStore(sys.argv[2], chunk_tokens=64, min_gain=None) as store:\n"
        "    with model.context(n_ctx=1024) as ctx:\n"
        "        print(len(tokens) - len(store.prefill(ctx, tokens).tokens))\n"
    )
    counts = []
    for n in (10, 20):
        prompt = [*system, *tokens(n, seed=n)]
        command = [sys.executable, "-c", code, str(LLAMA.path), url(server), *map(str, prompt)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        counts.append(int(done.stdout))
    assert counts == [len(system) + 10, 20]


def test_every_kind(server: RedisServer, model: ls.Model) -> None:
    """What comes back from the server is what was there, for every kind of memory."""
    prompt = [token % model.n_vocab for token in tokens()]
    with model.context(n_ctx=320) as one, model.context(n_ctx=320) as other:
        with stored(url(server)) as store:
            store.prefill(one, prompt)
        with stored(url(server)) as store:
            found = store.prefill(other, prompt)
            assert not store.stats().failures
        assert found.n_past in (N, N - 1), found
        assert nmse(one.logits(), other.logits()) < LIMIT


def test_cluster(tmp_path: Path, ctx: ls.Context) -> None:
    """A chain lies at several nodes of a cluster; without one of them it ends before."""
    prompt = tokens(12 * CHUNK)
    with cluster(tmp_path, program("redis")) as servers:
        where = url(servers[0], cluster=1)
        with stored(where) as store:
            assert prefilled(store, prompt)[0] == len(prompt)
            (entry,) = store.entries()
            assert entry.n_tokens == len(prompt)
            assert store.verify().ok
        with stored(where) as store:
            assert prefilled(store, [*prompt, 1])[0] == 1
        assert all(one.client.dbsize() for one in servers)
        servers[2].kill()
        with stored(where) as store:
            began = time.monotonic()
            assert prefilled(store, [*prompt, 1])[1] < LIMIT
            assert time.monotonic() - began < DEADLINE + GRACE + 1


def test_killed_while_generating(tmp_path: Path) -> None:
    """A server that goes and comes back empty costs evaluations, and nothing else."""
    prompts = [[*tokens(3 * CHUNK, seed=n % 4), n] for n in range(40)]
    with running(tmp_path, program("redis")) as server, stored(url(server)) as store:
        guard: Any = store._backend.tiers[0].backend
        guard._rest = 0.05
        evaluated = []
        for n, prompt in enumerate(prompts):
            if n in (10, 30):
                threading.Timer(0.002, server.kill).start()
            if n == 20:
                server.start()
                time.sleep(0.1)
            n_evaluated, wrong = prefilled(store, prompt)
            assert wrong < LIMIT
            evaluated.append(n_evaluated)
        assert sum(evaluated[4:9]) == 5, "it was there"
        assert evaluated[12:20] == [3 * CHUNK + 1] * 8, "it was not"
        assert sum(evaluated[24:29]) == 5, "it was there again"
        stats = store.stats()
        assert stats.places[0].trips >= 2
        assert stats.failures
        assert stats.damaged == 0


def test_silent(server: RedisServer, ctx: ls.Context) -> None:
    """A server that takes connections and answers nothing costs its deadline once."""
    with stored("memory:?size=1GiB", url(server)) as store:
        store.prefill(ctx, tokens())
        assert store.flush(30)
        with server.silent():
            times = []
            for n in range(4):
                ctx.clear()
                began = time.monotonic()
                assert store.prefill(ctx, [*tokens(), n]).n_past == N
                times.append(time.monotonic() - began)
            assert times[0] < DEADLINE + GRACE, times
            assert max(times[1:]) < DEADLINE, times
            assert store.stats().places[1].trips == 1


def test_full_and_refuses(server: RedisServer, ctx: ls.Context) -> None:
    """A full server that lets go of nothing: what it refuses is counted, and evaluated."""
    with stored(url(server)) as store:
        assert prefilled(store, tokens())[0] == N
        server.client.config_set("maxmemory-policy", "noeviction")
        server.client.config_set("maxmemory", 1)
        for n in range(3):
            n_evaluated, wrong = prefilled(store, [*tokens(), *tokens(CHUNK, seed=9), n])
            assert (n_evaluated, wrong < LIMIT) == (CHUNK + 1, True)
        stats = store.stats()
        assert any("OSError" in kind for kind in stats.failures), stats.failures
        assert stats.places[0].trips == 0, "it can be read"
        server.client.config_set("maxmemory", 0)


def test_evicts_under_load(server: RedisServer, tmp_path: Path) -> None:
    """A server that evicts on its own makes shorter hits, and never a wrong one."""
    path = write_benchmark_model(
        tmp_path / "large.gguf", text=True, n_layer=8, n_head_kv=8, head_dim=128, n_ctx=2048
    )
    server.client.config_set("maxmemory-policy", "allkeys-lru")
    server.client.config_set("maxmemory", 64 * MIB)
    random = Random(0)
    prompts = [tokens(5 * CHUNK, seed=n) for n in range(12)]  # of 10 MiB each
    with ls.Model(path, LIBRARY) as model, stored(url(server, deadline="20s")) as store:
        expected = []
        with model.context(n_ctx=1024) as fresh:
            for prompt in prompts:
                fresh.clear()
                fresh.decode([*prompt, 40])
                expected.append(bytes(memoryview(fresh.logits())))
        hits: list[int] = []
        with model.context(n_ctx=1024) as ctx:
            for turn in range(600):
                # What goes is a matter of chance: until both were seen.
                seen = any(CHUNK <= hit < 5 * CHUNK for hit in hits) and 5 * CHUNK in hits
                if turn >= 60 and seen:
                    break
                n = turn if turn < len(prompts) else random.randrange(len(prompts))
                ctx.clear()
                found = store.prefill(ctx, [*prompts[n], 40])
                hits.append(found.n_past)
                assert ctx.n_past() == 5 * CHUNK + 1
                assert found.tokens == tuple([*prompts[n], 40][: found.n_past])
                assert nmse(memoryview(expected[n]).cast("f"), ctx.logits()) < LIMIT
        stats = store.stats()
        assert server.client.info()["evicted_keys"] > 0
        assert any(CHUNK <= hit < 5 * CHUNK for hit in hits), "no chain was cut"
        assert any(hit == 5 * CHUNK for hit in hits), "no chain was whole"
        assert stats.holes > 0
        assert (stats.damaged, stats.failures) == (0, {})
        server.client.config_set("maxmemory", 0)
