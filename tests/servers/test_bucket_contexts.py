"""Prompts in a bucket: they come back, and whatever fails there, generation goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count

import pytest

import llama_state as ls
from llama_state.store import PrefixStore
from llama_state.testing.conformance import nmse
from tests.context.oracle import LIMIT
from tests.context.test_prefix_store import CHUNK, tokens
from tests.servers.ports import free_port
from tests.servers.proxy import Proxy, proxy
from tests.servers.s3_server import S3Server

pytestmark = [pytest.mark.libllama, pytest.mark.usefixtures("credentials")]

N = 200
"""Tokens of the prompt that is shared; its own part has 20 more."""

DEADLINE = 3.0

_NUMBERS = count()


@pytest.fixture
def between(bucket: S3Server) -> Iterator[Proxy]:
    with proxy(bucket.port) as between:
        yield between


def store_at(endpoint: str, prefix: str, deadline: float = 5) -> PrefixStore:
    """A store in the bucket."""
    url = f"s3://kept/{prefix}?endpoint={endpoint}&deadline={deadline}"
    return PrefixStore(url, chunk_tokens=CHUNK)


def test_comes_back(model: ls.Model, bucket: S3Server) -> None:
    """Every kind of memory: another store finds what one wrote, and decoding goes on the same."""
    prefix = f"kinds-{next(_NUMBERS)}"
    with model.context(n_ctx=320) as writer, store_at(bucket.endpoint, prefix) as store:
        base = tokens(1, N, writer.n_vocab)
        writer.decode(base)
        assert store.remember(writer, base).n_tokens == N
        assert not store.stats().failures
        prompt = [*base, *tokens(2, 20, writer.n_vocab)]
        writer.decode(prompt[N:])
        expected = writer.logits()
    with model.context(n_ctx=320) as reader, store_at(bucket.endpoint, prefix) as store:
        recalled = store.recall(reader, prompt)
        assert recalled.n_past == N, recalled.why
        reader.decode(prompt[N:])
        assert nmse(expected, reader.logits()) <= LIMIT
        assert not store.stats().failures
        assert store.stats().tokens_recalled == N


@contextmanager
def _paused(bucket: S3Server, between: Proxy) -> Iterator[None]:
    bucket.pause()
    try:
        yield
    finally:
        bucket.resume()


@contextmanager
def _silent(bucket: S3Server, between: Proxy) -> Iterator[None]:
    between.silent = True
    try:
        yield
    finally:
        between.silent = False


@contextmanager
def _cut(bucket: S3Server, between: Proxy) -> Iterator[None]:
    between.limit = 9000  # a listing and a head pass; an object does not
    try:
        yield
    finally:
        between.limit = None


@contextmanager
def _emptied(bucket: S3Server, between: Proxy) -> Iterator[None]:
    bucket.kill()
    bucket.start()
    yield
    bucket.make_bucket("kept")


Fault = Callable[[S3Server, Proxy], AbstractContextManager[None]]


@pytest.mark.parametrize("fault", [_paused, _silent, _cut, _emptied])
def test_faults(llama: ls.Model, fault: Fault) -> None:
    """All tokens are evaluated again, what follows is the same, and the trouble is counted."""
    evaluated, logits = [], []
    with S3Server() as server, proxy(server.port) as between:
        server.make_bucket("kept")
        first, later = (store_at(between.endpoint, "a", deadline=DEADLINE) for _ in range(2))
        blocks = (nullcontext(), nullcontext(), fault(server, between), nullcontext())
        with first, later:
            # After a fault a store leaves the bucket alone for a while: another one does not.
            for block, store in zip(blocks, (first, first, first, later), strict=True):
                with llama.context(n_ctx=320) as ctx:
                    base = tokens(1, N, ctx.n_vocab)
                    prompt = [*base, *tokens(2, 20, ctx.n_vocab)]
                    with block:
                        began = time.monotonic()
                        n_past = store.recall(ctx, prompt).n_past
                        assert time.monotonic() - began < DEADLINE + 0.5
                        if n_past < N:
                            ctx.decode(prompt[n_past:N])
                        began = time.monotonic()
                        store.remember(ctx, base)
                        assert time.monotonic() - began < DEADLINE + 0.5
                    evaluated.append(N - n_past)
                    ctx.decode(prompt[N:])
                    logits.append(ctx.logits())
            # Nothing was removed for it; what was lost is written again.
            assert evaluated == [N, 0, N, N if fault is _emptied else 0]
            assert first.stats().failures
            assert not first.stats().damaged
            assert not later.stats().failures
    assert all(nmse(logits[0], each) <= LIMIT for each in logits[1:])


@pytest.mark.parametrize(
    "url",
    [
        "s3://missing?endpoint={endpoint}&deadline=1",
        "s3://kept?endpoint=http://127.0.0.1:{port}&deadline=1",
    ],
)
def test_never_there(llama: ls.Model, bucket: S3Server, url: str) -> None:
    """A store that cannot be reached from the start is one that finds nothing."""
    url = url.format(endpoint=bucket.endpoint, port=free_port())
    with PrefixStore(url, chunk_tokens=CHUNK) as store, llama.context(n_ctx=320) as ctx:
        base = tokens(1, N, ctx.n_vocab)
        assert store.recall(ctx, base).n_past == 0
        ctx.decode(base)
        store.remember(ctx, base)
        assert ctx.n_past() == N
        assert store.stats().failures
