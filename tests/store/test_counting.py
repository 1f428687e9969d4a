"""What several threads count at once is counted exactly, and what bounds them bounds them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from llama_state.store.places.guard import Guard
from llama_state.store.places.memory import MemoryBackend
from tests.store.test_behind import OBJECTS, SIZE, Gated, behind
from tests.store.test_tiers import LARGE, NAMES, as_one, put_all

THREADS = 8


@pytest.fixture(autouse=True)
def hasty() -> Iterator[None]:
    """Threads are changed all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[int], object]) -> None:
    """Do it in all threads, which begin at once."""
    gate = threading.Barrier(THREADS)

    def one(n: int) -> None:
        gate.wait()
        work(n)

    threads = [threading.Thread(target=one, args=[n]) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_what_is_kept_nearer() -> None:
    """Every object that was copied is counted once."""
    for _ in range(30):
        far = MemoryBackend(LARGE)
        put_all(far)
        both = as_one([MemoryBackend(LARGE), far])
        together(lambda n, both=both: both.keep_nearer(NAMES[n : n + 1]))  # type: ignore[misc]
        assert both.tiers[0].kept == len(NAMES[:THREADS])


def test_what_waits_is_bounded() -> None:
    """Threads that write behind at once do not let more wait than is allowed."""
    for _ in range(30):
        backend = Gated()
        to = behind(backend, 2 * SIZE)
        together(lambda n, to=to: to.put(*OBJECTS[n % len(OBJECTS)]))  # type: ignore[misc]
        assert to.pending_bytes <= 2 * SIZE
        backend.gate.set()
        to.flush(30)


def test_a_place_that_fails_for_many_is_one_failure() -> None:
    """Of several calls at once the first counts."""
    for _ in range(200):
        guard = Guard(MemoryBackend(1 << 20))
        together(lambda n, guard=guard: guard._trip())  # type: ignore[misc]
        assert guard.trips == 1
