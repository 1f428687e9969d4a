"""A place that is slow or dead costs its deadline once, and nothing that comes late does harm."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from llama_state.store.places.backend import Backend
from llama_state.store.places.folder import FolderBackend
from llama_state.store.places.guard import Guard, RestingError, one_call
from llama_state.store.places.remote import RemoteBackend
from llama_state.testing.stores import BackendTests, name
from tests.interruptions import signalled
from tests.store.engines import LocalEngine

MOST = 1 << 30
DEADLINE = 0.3
REST = 0.4
GRACE = 0.2


class TestGuardedFolder(BackendTests):
    """What a folder can do it can do behind a guard."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return Guard(FolderBackend(tmp_path / "store", MOST))


class TestRemote(BackendTests):
    """What all servers share, over an engine in this process."""

    @pytest.fixture
    def backend(self) -> Backend:
        return Guard(RemoteBackend(LocalEngine(), MOST), rest=0)

    @contextmanager
    def unreachable(self, backend: Backend) -> Iterator[None]:
        """Each request fails."""
        assert isinstance(backend, Guard)
        assert isinstance(backend.backend, RemoteBackend)
        engine = backend.backend.engine
        assert isinstance(engine, LocalEngine)
        engine.error = ConnectionError(errno.ECONNREFUSED, "nobody is there")
        yield
        engine.error = None


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    """A server."""
    engine = LocalEngine()
    yield engine
    engine.go_on()


@pytest.fixture
def guard(engine: LocalEngine) -> Guard:
    """It, with a deadline."""
    return Guard(RemoteBackend(engine, MOST), DEADLINE, REST)


CALLS: dict[str, Callable[[Guard], object]] = {
    "expect": lambda guard: guard.expect([b"k" * 32]),
    "children": lambda guard: guard.children(b"k" * 32),
    "has": lambda guard: guard.has(name("a")),
    "head": lambda guard: guard.head(name("a"), 5),
    "open": lambda guard: _read(guard),
    "put": lambda guard: guard.put(name("b"), [b"new"]),
    "touch": lambda guard: guard.touch([name("a")]),
    "remove": lambda guard: guard.remove(name("c")),
    "set_aside": lambda guard: guard.set_aside(name("c")),
}


def _read(guard: Guard) -> bytes:
    with guard.open(name("a"), 5) as view:
        return bytes(view)


@pytest.mark.parametrize("call", CALLS)
def test_hangs(engine: LocalEngine, guard: Guard, call: str) -> None:
    """The deadline once, then nothing for a while, then all is well again."""
    guard.put(name("a"), [b"there"])
    engine.hang()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=f"no answer within {DEADLINE:g} s"):
        CALLS[call](guard)
    assert DEADLINE - 0.05 <= time.monotonic() - began < DEADLINE + GRACE
    asked = engine.n_requests
    for each in CALLS.values():
        began = time.monotonic()
        with pytest.raises(RestingError, match="is left alone for"):
            each(guard)
        assert time.monotonic() - began < GRACE
    assert engine.n_requests == asked
    assert guard.trips == 1
    engine.go_on()
    time.sleep(REST)
    assert _read(guard) == b"there"


def test_slow(engine: LocalEngine, guard: Guard) -> None:
    """Many answers that each come in time are one call, with one deadline."""
    engine.latency = DEADLINE / 4
    began = time.monotonic()
    with one_call(), pytest.raises(TimeoutError):
        for _ in range(20):
            guard.has(name("a"))
    assert time.monotonic() - began < DEADLINE + GRACE
    time.sleep(REST)
    for _ in range(8):  # each has its own
        guard.has(name("a"))


@pytest.mark.parametrize(
    ("number", "trips"),
    [
        (errno.ECONNRESET, True),
        (errno.EACCES, True),
        (errno.EIO, True),
        (errno.ENOSPC, False),
        (errno.ENOENT, False),
    ],
)
def test_fails(engine: LocalEngine, guard: Guard, number: int, *, trips: bool) -> None:
    """A place that fails is left alone; one that has no room can be read."""
    engine.error = OSError(number, "it fails")
    with pytest.raises(OSError, match="it fails"):
        guard.has(name("a"))
    assert (guard.resting > 0) is trips


def test_late_objects_are_closed(engine: LocalEngine, guard: Guard) -> None:
    """What comes after the deadline gives its buffer back."""
    closed: list[str] = []
    inner = guard.backend

    @contextmanager
    def opened(each: object, nbytes: int) -> Iterator[memoryview]:
        engine._goes_on.wait()
        try:
            yield memoryview(b"there")
        finally:
            closed.append("closed")

    inner.open = opened  # type: ignore[method-assign, assignment]
    engine.hang()
    with pytest.raises(TimeoutError):
        _read(guard)
    assert not closed
    engine.go_on()
    _until(lambda: closed == ["closed"])


def test_late_writes_are_of_a_copy(engine: LocalEngine, guard: Guard) -> None:
    """The caller writes over its buffer when time is up; what is written then is what it was."""
    buffer = bytearray(b"right")
    engine.hang()
    with pytest.raises(TimeoutError):
        guard.put(name("b"), [memoryview(buffer)])
    buffer[:] = b"wrong"
    engine.go_on()
    _until(lambda: engine.objects.get(name("b")) == b"right")


def test_interrupted(engine: LocalEngine, guard: Guard) -> None:
    """Ctrl-C ends a call at once, and the next one is answered."""
    guard.put(name("a"), [b"there"])
    engine.hang()
    guard.deadline = 30
    for each in CALLS.values():
        began = time.monotonic()
        error = signalled(partial(each, guard), 0.05)
        assert isinstance(error, KeyboardInterrupt)
        assert time.monotonic() - began < guard.deadline / 2
    engine.go_on()
    assert _read(guard) == b"there"
    assert guard.trips == 0


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
