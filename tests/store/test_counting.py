"""What several threads count at once is counted exactly, and what bounds them bounds them."""

from __future__ import annotations

from llama_state.store.places.guard import Guard
from llama_state.store.places.memory import MemoryBackend
from tests.many_threads import together
from tests.store.test_behind import OBJECTS, SIZE, Gated, behind
from tests.store.test_tiers import LARGE, NAMES, as_one, put_all

THREADS = 8


def test_what_is_kept_nearer() -> None:
    """Every object that was copied is counted once."""
    for _ in range(30):
        far = MemoryBackend(LARGE)
        put_all(far)
        both = as_one([MemoryBackend(LARGE), far])
        together(THREADS, lambda n, both=both: both.keep_nearer(NAMES[n : n + 1]))  # type: ignore[misc]
        assert both.tiers[0].kept == len(NAMES[:THREADS])


def test_what_waits_is_bounded() -> None:
    """Threads that write behind at once do not let more wait than is allowed."""
    for _ in range(30):
        backend = Gated()
        to = behind(backend, 2 * SIZE)
        together(THREADS, lambda n, to=to: to.put(*OBJECTS[n % len(OBJECTS)]))  # type: ignore[misc]
        assert to.pending_bytes <= 2 * SIZE
        backend.gate.set()
        to.flush(30)


def test_a_place_that_fails_for_many_is_one_failure() -> None:
    """Of several calls at once the first counts."""
    for _ in range(200):
        guard = Guard(MemoryBackend(1 << 20))
        together(THREADS, lambda n, guard=guard: guard._trip())  # type: ignore[misc]
        assert guard.trips == 1
