"""Prompts in a bucket: they come back, and whatever fails there, generation goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from textwrap import dedent

import pytest

import llama_state as ls
from llama_state.store import PrefixStore
from llama_state.testing.conformance import nmse
from tests.context.oracle import LIMIT
from tests.context.test_prefix_store import CHUNK, tokens
from tests.servers.proxy import Proxy, proxy
from tests.servers.s3_server import S3Server, free_port

pytestmark = pytest.mark.libllama

N = 200
"""Tokens of the prompt that is shared; its own part has 20 more."""

_NUMBERS = count()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        server.make_bucket("kept")
        yield server


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def between(server: S3Server) -> Iterator[Proxy]:
    with proxy(server.port) as between:
        yield between


def store_at(endpoint: str, prefix: str, deadline: float = 5) -> PrefixStore:
    """A store in the bucket."""
    url = f"s3://kept/{prefix}?endpoint={endpoint}&deadline={deadline}"
    return PrefixStore(url, chunk_tokens=CHUNK)


def test_comes_back(model: ls.Model, server: S3Server) -> None:
    """Every kind of memory: another store finds what one wrote, and decoding goes on the same."""
    prefix = f"kinds-{next(_NUMBERS)}"
    with model.context(n_ctx=320) as writer, store_at(server.endpoint, prefix) as store:
        base = tokens(1, N, writer.n_vocab)
        writer.decode(base)
        assert store.remember(writer, base).n_tokens == N
        assert not store.stats().failures
        prompt = [*base, *tokens(2, 20, writer.n_vocab)]
        writer.decode(prompt[N:])
        expected = writer.logits()
    with model.context(n_ctx=320) as reader, store_at(server.endpoint, prefix) as store:
        recalled = store.recall(reader, prompt)
        assert recalled.n_past == N, recalled.why
        reader.decode(prompt[N:])
        assert nmse(expected, reader.logits()) <= LIMIT
        assert not store.stats().failures
        assert store.stats().tokens_recalled == N


@contextmanager
def _paused(server: S3Server, between: Proxy) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


@contextmanager
def _silent(server: S3Server, between: Proxy) -> Iterator[None]:
    between.silent = True
    try:
        yield
    finally:
        between.silent = False


@contextmanager
def _cut(server: S3Server, between: Proxy) -> Iterator[None]:
    between.limit = 9000  # a listing and a head pass; an object does not
    try:
        yield
    finally:
        between.limit = None


@contextmanager
def _emptied(server: S3Server, between: Proxy) -> Iterator[None]:
    server.kill()
    server.start()
    yield
    server.make_bucket("kept")


Fault = Callable[[S3Server, Proxy], AbstractContextManager[None]]


@pytest.mark.parametrize("fault", [_paused, _silent, _cut, _emptied])
def test_faults(llama: ls.Model, fault: Fault) -> None:
    """All tokens are evaluated again, what follows is the same, and the trouble is counted."""
    evaluated, logits = [], []
    with S3Server() as server, proxy(server.port) as between:
        server.make_bucket("kept")
        with store_at(between.endpoint, "a", deadline=0.5) as store:
            for block in (nullcontext(), nullcontext(), fault(server, between), nullcontext()):
                with llama.context(n_ctx=320) as ctx:
                    base = tokens(1, N, ctx.n_vocab)
                    prompt = [*base, *tokens(2, 20, ctx.n_vocab)]
                    with block:
                        began = time.monotonic()
                        n_past = store.recall(ctx, prompt).n_past
                        if n_past < N:
                            ctx.decode(prompt[n_past:N])
                        store.remember(ctx, base)
                        assert time.monotonic() - began < 10
                    evaluated.append(N - n_past)
                    ctx.decode(prompt[N:])
                    logits.append(ctx.logits())
            assert evaluated[:3] == [N, 0, N]
            # Nothing was removed for it; what was lost was written again.
            assert evaluated[3] == (N if fault is _emptied else 0)
            assert store.stats().failures
            assert not store.stats().damaged
    assert all(nmse(logits[0], each) <= LIMIT for each in logits[1:])


@pytest.mark.parametrize(
    "url",
    [
        "s3://missing?endpoint={endpoint}&deadline=1",
        "s3://kept?endpoint=http://127.0.0.1:{port}&deadline=1",
    ],
)
def test_never_there(llama: ls.Model, server: S3Server, url: str) -> None:
    """A store that cannot be reached from the start is one that finds nothing."""
    url = url.format(endpoint=server.endpoint, port=free_port())
    with PrefixStore(url, chunk_tokens=CHUNK) as store, llama.context(n_ctx=320) as ctx:
        base = tokens(1, N, ctx.n_vocab)
        assert store.recall(ctx, base).n_past == 0
        ctx.decode(base)
        store.remember(ctx, base)
        assert ctx.n_past() == N
        assert store.stats().failures


_OTHER = """
    import sys
    import llama_state as ls
    from llama_state.store import PrefixStore
    from tests.context.test_prefix_store import CHUNK, tokens
    from tests.libllama import MODELS

    with MODELS["llama-dense"].context(n_ctx=320) as ctx, PrefixStore(
        sys.argv[1], chunk_tokens=CHUNK
    ) as store:
        prompt = [*tokens(1, 192, ctx.n_vocab), *tokens(int(sys.argv[2]), 20, ctx.n_vocab)]
        n_past = store.recall(ctx, prompt).n_past
        ctx.decode(prompt[n_past:])
        print(len(prompt) - n_past)
        store.remember(ctx, prompt)
        assert not store.stats().failures
"""


def test_processes_share(server: S3Server) -> None:
    """A system prompt is evaluated by the first process; the others evaluate their own part."""
    url = f"s3://kept/shared?endpoint={server.endpoint}"
    evaluated = []
    for n in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", dedent(_OTHER), url, str(10 + n)],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, done.stderr
        evaluated.append(int(done.stdout.split()[-1]))
    assert evaluated == [212, 20]
