"""Whatever call of the system fails in a store, no generation breaks of it, and nothing is wrong.

Each test runs one thing again and again, in the same folder made anew: the first call of the system
fails, then the second, and so on; then all from the first on, from the second, and so on.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from llama_state._io import lease
from llama_state.store import PrefixStore, Recalled, Remembered
from llama_state.testing.conformance import nmse
from tests.io.faults import FILES, descriptors, failing_calls
from tests.libllama import MODELS

# A file whose owner met an error is closed when the owner goes, which Python remarks upon.
pytestmark = [
    pytest.mark.libllama,
    pytest.mark.linux,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

KINDS = [kind for kind in ("llama-dense", "gemma3-dense", "jamba-dense") if kind in MODELS]
PROMPT = [*range(3, 43), 7, 7]
OTHER = [*range(3, 38), 9, 9, 9]
LIMIT = 1e-6
SHARES = {"soak": 1, "whole": 1}
SHARE = 23
"""Of how many calls one fails, in which profile and in the others."""

T = TypeVar("T")

OPTIONS = {"n_ctx": 256, "kv_unified": True, "n_seq_max": 2, "flash_attn": False, "n_threads": 1}
NUMBERS = {
    "llama-dense": (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE),
    "gemma3-dense": (errno.EIO,),
    "jamba-dense": (errno.ENOSPC,),
}


def error(number: int) -> Callable[[], OSError]:
    """Make an error of the system."""
    return lambda: OSError(number, os.strerror(number))


class Bench:
    """A context, what a prompt must give in it, and a folder that is made anew for each turn."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = folder / "kv"
        self.origin = folder / "origin"
        self.ctx, self.fresh = (MODELS[kind].context(**OPTIONS) for _ in range(2))  # type: ignore[arg-type]
        with PrefixStore(self.origin, capacity_bytes=1 << 30, chunk_tokens=16) as store:
            store.prefill(self.fresh, OTHER)
            store.prefill(self.ctx, PROMPT)
            used = store.stats().used_bytes
            store.forget(self.ctx, PROMPT)
        # Not all of the prompt has room beside the other: something is evicted.
        self.capacity = used - 1
        self.fresh.clear()
        self.fresh.decode(PROMPT)

    def open(self) -> PrefixStore:
        """Open the store."""
        return PrefixStore(self.folder, capacity_bytes=self.capacity, chunk_tokens=16)

    def turns(
        self, number: int, act: Callable[[PrefixStore], T], *, lasting: bool
    ) -> Iterator[tuple[PrefixStore, T]]:
        """Let the first, the second, ... call fail; yield the store and what *act* returned.

        Few of them, but in the profiles "whole" and "soak"; others for each error.
        """
        step = SHARES.get(os.environ.get("HYPOTHESIS_PROFILE", "quick"), SHARE)
        turn = number % step
        before = descriptors()
        while True:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.copytree(self.origin, self.folder)
            self.ctx.clear()
            with self.open() as store:
                with failing_calls(turn, error(number), FILES, lasting=lasting) as countdown:
                    result = act(store)
                assert descriptors() == before, countdown.place
                yield store, result
                self.check_later(store)
            if not countdown.raised:
                break
            turn += step
        assert turn > 5

    def check_prompt(self) -> None:
        """The prompt is there, and its logits are right."""
        assert self.ctx.n_past() == len(PROMPT)
        assert nmse(self.ctx.logits(), self.fresh.logits()) < LIMIT

    def check_rows(self, n_past: int) -> None:
        """The sequence is as if it had decoded the first tokens of the prompt, or empty."""
        assert self.ctx.n_past() == n_past
        if n_past:
            self.ctx.decode(PROMPT[n_past:])
            self.check_prompt()

    def check_later(self, store: PrefixStore) -> None:
        """The store goes on, what it holds is right, and it is sound when it is opened."""
        files = [path.stat() for path in self.folder.rglob("*") if path.is_file()]
        sizes = {info.st_ino: info.st_size for info in files}  # once, whatever names it has
        assert sum(sizes.values()) <= self.capacity
        self.ctx.clear()
        store.prefill(self.ctx, PROMPT)
        self.check_prompt()
        again = self.open()
        assert not list(self.folder.rglob(".*.part"))
        again.verify(repair=True)
        found = again.verify()
        assert found.ok
        assert not found.foreign
        self.ctx.clear()
        assert again.recall(self.ctx, PROMPT).n_past >= 16
        assert not again.stats().failures


@pytest.fixture(params=[(kind, number) for kind in KINDS for number in NUMBERS[kind]], ids=str)
def bench(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Bench, int]]:
    """A bench for a kind of model, and an error."""
    kind, number = request.param
    monkeypatch.setattr(lease, "_WORTH_MAPPING", 1)
    made = Bench(kind, tmp_path)
    with made.ctx, made.fresh:
        yield made, number


@pytest.mark.parametrize("lasting", [False, True])
def test_prefill(bench: tuple[Bench, int], *, lasting: bool) -> None:
    """The prompt is there with its logits, whatever could be recalled or remembered."""
    made, number = bench
    failures = 0
    for store, recalled in made.turns(
        number, lambda store: store.prefill(made.ctx, PROMPT), lasting=lasting
    ):
        made.check_prompt()
        assert recalled.tokens == tuple(PROMPT[: recalled.n_past])
        failures += bool(store.stats().failures)
    assert failures


@pytest.mark.parametrize("lasting", [False, True])
def test_recall(bench: tuple[Bench, int], *, lasting: bool) -> None:
    """The sequence holds what the result says: the right prefix, or nothing."""
    made, number = bench

    def recall(store: PrefixStore) -> Recalled:
        made.ctx.decode([5, 5])  # goes, whatever happens
        return store.recall(made.ctx, PROMPT)

    found = set()
    for _, recalled in made.turns(number, recall, lasting=lasting):
        found.add(recalled.n_past)
        assert recalled.tokens == tuple(PROMPT[: recalled.n_past])
        made.check_rows(recalled.n_past)
    assert max(found) >= 32


@pytest.mark.parametrize("lasting", [False, True])
def test_remember(bench: tuple[Bench, int], *, lasting: bool) -> None:
    """The sequence is what it was; what is said to be stored is."""
    made, number = bench

    def remember(store: PrefixStore) -> Remembered:
        made.ctx.decode(PROMPT)
        return store.remember(made.ctx, PROMPT)

    for store, remembered in made.turns(number, remember, lasting=lasting):
        made.check_prompt()
        if remembered.n_tokens == len(PROMPT):
            assert store.find(made.ctx, [*PROMPT, 1]).n_tokens == len(PROMPT)


@pytest.mark.parametrize("lasting", [False, True])
def test_looking_after_it(bench: tuple[Bench, int], *, lasting: bool) -> None:
    """What serves no generation tells its troubles by figures too, but for a verification."""
    made, number = bench

    def look(store: PrefixStore) -> None:
        store.stats()
        store.entries()
        store.find(made.ctx, PROMPT)
        store.pin(made.ctx, PROMPT, ttl=0)
        store.evict(made.capacity // 2)
        store.forget(made.ctx, OTHER)
        with suppress(OSError):
            store.verify(repair=True)

    for _ in made.turns(number, look, lasting=lasting):
        pass
