"""Write behind: a thread writes what was copied, while the generation goes on."""

from __future__ import annotations

import atexit
import time
import weakref
from _thread import start_new_thread
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from .._io.buffers import flat
from .._io.locks import Lock
from .._io.platform.processes import in_each_child
from .._io.threads import POLL_SECONDS
from .counting import counting
from .objects import Name
from .troubles import Troubles

if TYPE_CHECKING:
    from .._io import Buffer


class Target(Protocol):
    """Where objects go: a place, or what waits for one."""

    def has(self, name: Name) -> bool:
        """Return whether an object is there."""

    def lacks(self, name: Name) -> bool:
        """Return whether an object should be written."""

    def children(self, parent: bytes) -> Sequence[Name]:
        """Return the names of all objects that go on from *parent*."""

    def head(self, name: Name, nbytes: int) -> bytes:
        """Return the first bytes of an object; raise FileNotFoundError where it is gone."""

    def put(self, name: Name, parts: Iterable[Buffer]) -> bool:
        """Write an object; False where there is one, or no room."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What the thread is to do: write an object, or anything that comes after that."""

    data: bytes
    run: Callable[[], object]


class WriteBehind:
    """Copies of objects that wait to be written to one place: a :class:`Target`.

    They are written in the order in which they came, by a thread that is there only while
    something waits. Python waits for it at its end. What they share no signal can break, see
    :mod:`llama_state._io.threads`.

    What waits is not found by anything that reads the place. A process that was forked has none.

    Args:
        backend: The place.
        troubles: Counts what cannot be written.
        pending_bytes: The most that may wait; what is more is dropped.

    Attributes:
        dropped: Objects that were dropped.
        refused: Objects that there was no room for in the place.
    """

    def __init__(self, backend: Target, troubles: Troubles, pending_bytes: int) -> None:
        self._backend = backend
        self._troubles = troubles
        self._limit = pending_bytes
        self._lock = Lock()
        self._begin()
        self.dropped: int = 0
        self.refused: int = 0
        self._lost_before = 0
        _ALL.add(self)

    def _begin(self) -> None:
        """Begin with nothing that waits, and no thread."""
        self._jobs: dict[object, _Job] = {}  # in order; the first one may be under way
        self._broken: dict[bytes, Name] = {}  # rows that could not be written, by key
        self._is_working = False

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait."""
        with self._lock:
            return self._waiting()

    def has(self, name: Name) -> bool:
        """Return whether an object is in the place, or waits."""
        return name in self._jobs or self._backend.has(name)

    def lacks(self, name: Name) -> bool:
        """Return whether an object should be written, and does not wait for it."""
        return name not in self._jobs and self._backend.lacks(name)

    def children(self, parent: bytes) -> Sequence[Name]:
        """Return the names of all objects that go on from *parent*, in the place or waiting."""
        with self._lock:
            jobs = list(self._jobs)
        waiting = [name for name in jobs if isinstance(name, Name) and name.parent == parent]
        return list(dict.fromkeys([*self._backend.children(parent), *waiting]))

    def head(self, name: Name, nbytes: int) -> bytes:
        """Return the first bytes of an object in the place, or of one that waits."""
        job = self._jobs.get(name)
        return job.data[:nbytes] if job else self._backend.head(name, nbytes)

    def put(self, name: Name, parts: Iterable[Buffer]) -> bool:
        """Copy an object and let it wait; False where it need not be written, or is dropped."""
        if not self.lacks(name):
            return False
        views = [flat(part) for part in parts]
        nbytes = sum(map(len, views))
        if self.pending_bytes + nbytes <= self._limit:  # else it need not be copied
            with suppress(MemoryError, RuntimeError):  # no memory, no thread
                data = b"".join(views)
                if self._add(name, _Job(data, lambda: self._write(name, data))):
                    return True
        with counting():
            self.dropped += 1
        return False

    def afterwards(self, run: Callable[[], object]) -> None:
        """Call *run* in the thread, after all that waits now; not at all where there is none."""
        with suppress(RuntimeError):
            self._add(object(), _Job(b"", run))

    def settle(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits; False where *timeout* seconds were not enough."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._jobs:
            if end is not None and time.monotonic() >= end:
                return False
            try:
                with self._lock:
                    self._ensure_thread()
            except RuntimeError:  # none can be started, as when Python ends
                self._work()
            time.sleep(POLL_SECONDS)
        return True

    def flush(self, timeout: float | None = None) -> bool:
        """Wait, and return whether all is written that came since the last call.

        False where *timeout* seconds were not enough, or something was dropped, refused or could
        not be written.
        """
        if not self.settle(timeout):
            return False
        with counting():
            lost = self.dropped + self.refused
            whole, self._lost_before = lost == self._lost_before, lost
        return whole

    def _waiting(self) -> int:
        return sum(len(job.data) for job in self._jobs.values())

    def _add(self, key: object, job: _Job) -> bool:
        """Let a job wait; False where other threads have used up the room meanwhile."""
        with self._lock:
            if job.data and self._waiting() + len(job.data) > self._limit:
                return False
            # First the thread: what is added and then interrupted does not wait for ever.
            self._ensure_thread()
            self._jobs.setdefault(key, job)
            return True

    def _ensure_thread(self) -> None:
        if not self._is_working:
            start_new_thread(self._work, ())

    def _work(self) -> None:
        """Do what waits, until nothing does, unless another thread does."""
        with self._lock:
            if self._is_working:
                return
            self._is_working = True
        try:
            self._do_all()
        except BaseException:  # no thread could be started, and this one was interrupted
            self._is_working = False
            raise

    def _do_all(self) -> None:
        while (first := self._first()) is not None:
            self._do(*first)
            del first

    def _do(self, key: object, job: _Job) -> None:
        try:
            with self._troubles.tolerated("write behind"):
                job.run()
        except Exception as error:  # there is nobody else to tell
            self._troubles.failed("write behind", error)
        finally:
            with self._lock:
                self._jobs.pop(key, None)

    def _first(self) -> tuple[object, _Job] | None:
        """Return what waits longest; where nothing does, the work is done."""
        with self._lock:
            first = next(iter(self._jobs.items()), None)
            self._is_working = first is not None
            return first

    def _write(self, name: Name, data: bytes) -> None:
        """Write an object; nothing that would go on from what was not written."""
        written = False
        try:
            if not self._is_apart(name):
                written = self._backend.put(name, [data]) or self._backend.has(name)
        finally:
            if written:
                self._broken.pop(name.key, None)
            else:
                with counting():
                    self.refused += 1
                if name.kind in ("R", "N"):
                    self._broken[name.key] = name

    def _is_apart(self, name: Name) -> bool:
        """Tell whether rows are missing that an object is of no use without."""
        needed = (self._broken.get(key) for key in (name.key, name.parent))
        return any(rows and rows != name and not self._backend.has(rows) for rows in needed)


_ALL: Final[weakref.WeakSet[WriteBehind]] = weakref.WeakSet()


def _renew() -> None:
    """Begin anew in a forked process: what waits is written by the one that it comes from."""
    for each in _ALL:
        each._begin()


def _settle_all() -> None:
    """Write what waits before Python ends."""
    for each in list(_ALL):
        each.settle()


in_each_child(_renew)
atexit.register(_settle_all)
