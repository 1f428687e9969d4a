"""Interruptions of what a ``Llama`` shares: its list of tokens is what its cache holds.

That is known by content: for each list of tokens that may be there, the state that belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llama_state import MismatchWarning, StateError, attach
from llama_state.adapters.llama_cpp import PromptCache
from tests.interruptions import at_places, at_signals, is_free
from tests.layout.ggufs import adapter

from .llamas import models

pytestmark = pytest.mark.llama_cpp

A, B = list(b"The password of chat A"), list(b"Hello, I am chat B and longer")
MORE = list(b" goes on for more than one piece of sixteen tokens")


class Bench:
    """A ``Llama`` in state A with a cache, and state B in several forms."""

    def __init__(self, make: Callable[..., Any], kind: str) -> None:
        self.llm = make(kind, n_batch=16)
        self.ctx = attach(self.llm)
        self.lora = adapter(make.path(kind).with_name("lora.gguf"))
        self.cache = PromptCache(self.llm)
        self.llm.set_cache(self.cache)
        # The state of each list of tokens.
        self.truth = {(): self._evaluated([])}
        self.truth[tuple(B)] = self._evaluated(B)
        self.b = self.ctx.snapshot()
        self.seq_b = self.ctx.seq_snapshot(0)
        self.llama_b = self.ctx.to_llama_state(self.b, B)
        self.checkpoint_b = self.ctx.checkpoint(0)
        self.truth[tuple(A)] = self._evaluated(A)
        self.a = self.ctx.snapshot()

    def _evaluated(self, tokens: list[int]) -> bytes:
        self.ctx.clear()
        if tokens:
            self.ctx.decode(tokens)
        return self.ctx.seq_snapshot(0)

    def fresh(self) -> None:
        """Bring state A back, with A in the cache."""
        self.cache.declare(adapters=[])
        self.cache.store.evict(0)
        self.ctx.restore(self.a, tokens=A)
        self.cache.remember()

    def held(self) -> tuple[tuple[int, ...], bytes]:
        """What the ``Llama`` lists, and what its cache holds."""
        return self.ctx.tokens, self.ctx.seq_snapshot(0)

    def is_true(self) -> None:
        """What is listed is there, by content, here and for each cached prompt."""
        tokens, content = self.held()
        if tokens not in self.truth:
            self.truth[tokens] = self._evaluated(list(tokens))
        assert self.truth[tokens] == content, tokens
        self.cache.declare(adapters=[])  # all of it was kept under none
        for prompt in (A, B):
            self.ctx.clear()  # what the Llama holds itself is no hit
            recalled = self.cache.store.recall(self.ctx, [*prompt, 1])
            assert self.ctx.tokens == recalled.tokens
            # Of the memory that can be cut only what two prompts share may be there.
            if recalled.tokens in self.truth:
                assert self.ctx.seq_snapshot(0) == self.truth[recalled.tokens]


def _undone(bench: Bench) -> None:
    try:
        with bench.ctx.savepoint():
            bench.ctx.restore(bench.b, tokens=B)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


def _found(bench: Bench) -> None:
    """A lookup that hits, as ``create_completion`` does it."""
    bench.ctx.restore(bench.b, tokens=B)
    assert bench.cache[[*A, *MORE]].n_tokens == len(A)


def _kept(bench: Bench) -> None:
    bench.ctx.restore(bench.b, tokens=B)
    bench.cache[B] = bench.llm.save_state()


CALLS: dict[str, Callable[[Bench], object]] = {
    "restore": lambda b: b.ctx.restore(b.b, tokens=B),
    "restore unread": lambda b: b.ctx.restore(b.b, tokens=B, validate=False),
    "restore refused": lambda b: _refused(lambda: b.ctx.restore(b.b, tokens=A, validate=False)),
    "seq_restore": lambda b: b.ctx.seq_restore(b.seq_b, 0, tokens=B),
    "resume": lambda b: b.ctx.resume(b.checkpoint_b, check="warn"),
    "restore_llama_state": lambda b: b.ctx.restore_llama_state(b.llama_b),
    "decode": lambda b: b.ctx.decode(MORE),
    "seq_rm": lambda b: b.ctx.seq_rm(0),
    "clear": lambda b: b.ctx.clear(),
    "savepoint": _undone,
    "tokens": lambda b: b.ctx.tokens,
    "remember": lambda b: (b.ctx.restore(b.b, tokens=B), b.cache.remember()),
    "declare": lambda b: b.cache.declare(adapters=[(b.lora, 1.0)]),
    "a hit": _found,
    "a new prompt": _kept,
}


def _refused(call: Callable[[], object]) -> None:
    with pytest.raises(StateError):
        call()


@pytest.fixture(scope="module", params=["llama-dense", "gemma3-dense", "jamba-dense"])
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    with models(tmp_path_factory.mktemp("models")) as make:
        yield Bench(make, request.param)


ignored = pytest.mark.filterwarnings(f"ignore::{MismatchWarning.__module__}.MismatchWarning")


@ignored
@pytest.mark.parametrize("name", CALLS)
def test_interrupted_anywhere(bench: Bench, name: str) -> None:
    """What is listed is there, or nothing is, which was said; the next call works."""
    call = CALLS[name]
    bench.fresh()
    call(bench)
    after = bench.held()
    for place, said in at_places(name, lambda: call(bench), bench.fresh):
        assert is_free(bench.ctx), place
        tokens, _ = bench.held()
        # A lookup forgets what the prompt does not begin with.
        forgotten = name == "a hit" and not tokens
        known = (tuple(A), tuple(B), after[0])
        assert tokens in known or forgotten or "emptied" in said, (place, tokens)
        bench.is_true()
        bench.fresh()
        call(bench)
        assert bench.held() == after, place


@ignored
# A signal in a callback of ctypes, or in a finalizer, is dropped by Python.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CALLS)
def test_signals(bench: Bench, name: str) -> None:
    """The same for signals, swept over the call."""
    call = CALLS[name]
    for _ in at_signals(lambda: call(bench), bench.fresh):
        bench.is_true()
