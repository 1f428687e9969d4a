"""Every call of the system that a store makes fails once: no generation breaks of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.store import PrefixStore
from llama_state.testing.conformance import nmse
from tests.io.faults import failing_calls
from tests.libllama import MODELS

pytestmark = pytest.mark.libllama

KINDS = [kind for kind in ("llama-dense", "gemma3-dense", "jamba-dense") if kind in MODELS]
PROMPT = [*range(3, 43), 7, 7]
OTHER = [*range(3, 38), 9, 9, 9]
LIMIT = 1e-7


@pytest.fixture(params=KINDS)
def contexts(request: pytest.FixtureRequest) -> Iterator[tuple[ls.Context, ls.Context]]:
    """A context to fill in, and one that has decoded the prompt from nothing."""
    model = MODELS[request.param]
    options = {"n_ctx": 256, "kv_unified": True, "n_seq_max": 2, "flash_attn": False}
    with model.context(**options) as ctx, model.context(**options) as fresh:  # type: ignore[arg-type]
        fresh.decode(PROMPT)
        yield ctx, fresh


def failures(error: Callable[[], OSError], act: Callable[[], None]) -> int:
    """Let the first, the second, ... call of the system fail; the number of calls."""
    turn = 0
    while True:
        with failing_calls(turn, error) as countdown:
            act()
        if not countdown.raised:
            return turn
        turn += 1


def error(number: int) -> Callable[[], OSError]:
    """Make an error of the system."""
    return lambda: OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.ENOENT])
def test_prefill(contexts: tuple[ls.Context, ls.Context], tmp_path: Path, number: int) -> None:
    """Whatever fails, the prompt is there, its logits are right, and the store stays usable."""
    ctx, fresh = contexts
    store = PrefixStore(tmp_path, capacity_bytes=1 << 22, chunk_tokens=16)

    def fill() -> None:
        store.prefill(ctx, PROMPT)
        assert ctx.n_past() == len(PROMPT)
        assert nmse(ctx.logits(), fresh.logits()) < LIMIT
        ctx.clear()

    def fill_anew() -> None:
        fill()
        with failing_calls(1 << 30, error(number)):  # nothing fails: what was written goes
            store.evict(0)

    store.prefill(ctx, OTHER)
    assert failures(error(number), fill) > 5
    assert failures(error(number), fill_anew) > 5
    assert store.stats().failures
    fill()
    assert store.recall(ctx, PROMPT).n_past >= len(PROMPT) - 16
    store.verify(repair=True)
    assert store.verify().ok


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_looking_after_it(
    contexts: tuple[ls.Context, ls.Context], tmp_path: Path, number: int
) -> None:
    """What serves no generation tells its troubles by figures too, but for a verification."""
    ctx, _ = contexts
    store = PrefixStore(tmp_path, capacity_bytes=1 << 22, chunk_tokens=16)
    store.prefill(ctx, PROMPT)

    def look() -> None:
        store.stats()
        store.entries()
        store.find(ctx, PROMPT)
        store.pin(ctx, PROMPT, ttl=0)
        store.evict(1 << 21)

    failures(error(number), look)
    assert store.find(ctx, PROMPT).n_tokens > 0
