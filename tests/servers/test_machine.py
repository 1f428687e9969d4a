"""The machine of the store on four places: memory, a folder, Redis, and a bucket.

Beside all that can happen to a folder, the near places are emptied, so that what is far away has to
serve; Redis lets go of what it likes; and either server is silent for a while.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from llama_state.store import Place, PrefixStore
from llama_state.store.places.guard import Guard
from llama_state.store.places.urls import open_place
from tests.context.test_store_machine import CHUNK, Machine
from tests.kinds import examples
from tests.libllama import MODELS
from tests.servers.redis_server import RedisServer, program, running
from tests.servers.s3_server import S3Server

pytestmark = [pytest.mark.libllama, pytest.mark.usefixtures("credentials")]

DEADLINE = 5.0
SHORT = 0.1
REST = 0.05
_NUMBERS = count()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis"), program("redis")) as server:
        yield server


class Far(Machine):
    """One context, four places, and what can happen to all of them."""

    redis: ClassVar[RedisServer]
    bucket: ClassVar[S3Server]

    def store(self, capacity: int) -> PrefixStore:
        """A store in four places; those of one example have the same, and no other."""
        if not hasattr(self, "number"):
            self.number = next(_NUMBERS)
        far = (
            self.redis.url(prefix=f"machine-{self.number}"),
            f"s3://kept/machine-{self.number}?endpoint={self.bucket.endpoint}",
        )
        return PrefixStore(
            [
                f"memory:?size={min(capacity, 1 << 26)}",
                f"file://{self.folder.name}?size={capacity}",
                *map(guarded, far),
            ],
            chunk_tokens=CHUNK,
            min_gain=None,
        )

    @rule(share=st.sampled_from([0.0, 0.5, 0.9]))
    def evict(self, share: float) -> None:
        """Some of it goes, from places that are awake."""
        self._wake()
        super().evict(share)

    @rule()
    def repair(self) -> None:
        """After a repair all is sound: to tell, each place must be awake."""
        self._wake()
        super().repair()

    def _wake(self) -> None:
        for store in self.stores:
            while any(tier.resting for tier in store._backend.tiers):
                time.sleep(REST)

    @rule(which=st.integers(0, 1), n=st.integers(1, 3))
    def empty_near(self, which: int, n: int) -> None:
        """The nearest places lose all that they have."""
        self.stores[which].flush()
        self._wake()
        for tier in self.stores[which]._backend.tiers[:n]:
            tier.backend.evict(0)

    @rule(digits=st.sampled_from(["0", "1", "2"]))
    def redis_evicts(self, digits: str) -> None:
        """Redis lets go of pieces, and of what names them."""
        self.redis.evict(digits)
        self.redis.evict(f"{digits}}}:i")

    @rule(prompt=st.lists(st.integers(2, 5), min_size=1, max_size=40), redis=st.booleans())
    def silent(self, prompt: list[int], *, redis: bool) -> None:
        """A server is silent while a prompt is filled in."""
        with ExitStack() as stack:
            for guard in (tier.guard for tier in self.stores[0]._backend.tiers if tier.guard):
                stack.callback(setattr, guard, "deadline", guard.deadline)
                guard.deadline = SHORT
            if redis:
                stack.enter_context(self.redis.silent())
            else:
                self.bucket.pause()
                stack.callback(self.bucket.resume)
            self.prefill(prompt, 0, 0)


def guarded(url: str) -> Place:
    """A place on a server, that is left alone for a moment only."""
    place = open_place(url, None, durable=False, readonly=False)
    assert isinstance(place, Guard)
    return Place(Guard(place.backend, DEADLINE, REST))


KINDS = ("deepseek4-moe", "gemma3-dense", "jamba-dense", "llama-dense")
"""One of each way to go on: a whole state, a window, restore points, any token."""


@pytest.mark.parametrize("kind", KINDS)
def test_any_order(kind: str, redis: RedisServer, bucket: S3Server) -> None:
    """Whatever the order, and whatever happens to the places."""
    model = MODELS[kind]
    machine = type("Machine", (Far,), {"model": model, "redis": redis, "bucket": bucket})
    run_state_machine_as_test(machine, settings=examples(model.arch, slowest=True))
