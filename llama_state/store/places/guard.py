"""A place that can be slow or dead: a deadline for what it costs, and rest after it failed."""

from __future__ import annotations

import errno
import time
from _thread import start_new_thread
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from ..._io.buffers import flat
from ..counting import counting
from ..objects import Name
from .backend import Backend, Stored

if TYPE_CHECKING:
    from ..._io import Buffer

T = TypeVar("T")

DEADLINE_SECONDS: Final = 5.0
REST_SECONDS: Final = 30.0
# Share of a new measurement in what is expected.
_NEW: Final = 0.25
# What says something of one object, or of the room there is, and not that a place is dead.
_ALIVE: Final = frozenset({errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_CALL_BEGAN: ContextVar[float | None] = ContextVar("call of a store", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """All that the block asks of a guarded place is one call: it has one deadline.

    By the clock, whatever else the block does: nothing may be decoded in it.
    """
    before = _CALL_BEGAN.get()
    try:
        _CALL_BEGAN.set(time.monotonic())
        yield
    finally:
        _CALL_BEGAN.set(before)


class RestingError(OSError):
    """A place is left alone for a while, since it failed."""


class Guard:
    """A :class:`Backend` that another one cannot keep waiting.

    What it is asked is done by a thread of its own, so that the deadline holds whatever the other
    waits for: a name server, a connection, a byte. What comes too late is dropped.

    After a failure it is left alone for a while: every method raises :class:`RestingError`.

    Looking after a place (entries, evict, used_bytes) takes as long as it takes.

    Args:
        backend: The place.
        deadline: Seconds that it may cost a call of the store, see :func:`one_call`.
        rest: Seconds that it is left alone after a failure.

    Attributes:
        trips: How often it failed, and was left alone from then on.
    """

    def __init__(
        self, backend: Backend, deadline: float = DEADLINE_SECONDS, rest: float = REST_SECONDS
    ) -> None:
        self.backend = backend
        self.location: str = backend.location
        self.capacity_bytes: int = backend.capacity_bytes
        self.readonly: bool = backend.readonly
        self.remote: bool = backend.remote
        self.deadline = deadline
        self.trips: int = 0
        self.pace: Pace = Pace()
        self._rest = rest
        self._rests_until = 0.0

    def over(self, backend: Backend) -> Guard:
        """Return a guard of another back end, with the same deadline."""
        return Guard(backend, self.deadline, self._rest)

    @property
    def resting(self) -> float:
        """Seconds for which it is still left alone; 0 where it is not."""
        return max(self._rests_until - time.monotonic(), 0.0)

    # -- within the deadline

    def expect(self, parents: Sequence[bytes]) -> None:
        """See :class:`Backend`."""
        self._timed(lambda: self.backend.expect(parents))

    def children(self, parent: bytes) -> Sequence[Name]:
        """See :class:`Backend`."""
        return self._within(lambda: self.backend.children(parent))

    def has(self, name: Name) -> bool:
        """See :class:`Backend`."""
        return self._within(lambda: self.backend.has(name))

    def head(self, name: Name, nbytes: int) -> bytes:
        """See :class:`Backend`."""
        return self._within(lambda: self.backend.head(name, nbytes))

    @contextmanager
    def open(self, name: Name, nbytes: int) -> Iterator[memoryview]:
        """See :class:`Backend`."""

        def opened() -> _Opened:
            with ExitStack() as stack:
                view = stack.enter_context(self.backend.open(name, nbytes))
                return _Opened(stack.pop_all(), view)

        began = time.monotonic()
        found = self._within(opened)
        self.pace.read(nbytes, time.monotonic() - began)
        with found.held:
            yield found.view
            del found

    def put(self, name: Name, parts: Iterable[Buffer]) -> bool:
        """See :class:`Backend`: of a copy, since the buffers are the caller's when time is up."""
        data = b"".join(map(flat, parts))
        return self._within(lambda: self.backend.put(name, [data]))

    def touch(self, names: Iterable[Name], when: float | None = None) -> None:
        """See :class:`Backend`."""
        listed = list(names)
        self._within(lambda: self.backend.touch(listed, when))

    def remove(self, name: Name) -> int:
        """See :class:`Backend`."""
        return self._within(lambda: self.backend.remove(name))

    def set_aside(self, name: Name) -> None:
        """See :class:`Backend`."""
        self._within(lambda: self.backend.set_aside(name))

    # -- looking after it

    def entries(self) -> Iterator[Stored]:
        """See :class:`Backend`."""
        yield from self._unhurried(self.backend.entries)

    def evict(self, to_bytes: int) -> int:
        """See :class:`Backend`."""
        return self._unhurried(lambda: self.backend.evict(to_bytes))

    def used_bytes(self) -> int:
        """See :class:`Backend`."""
        return self._unhurried(self.backend.used_bytes)

    # -- the deadline

    def _timed(self, act: Callable[[], object]) -> None:
        began = time.monotonic()
        self._within(act)
        self.pace.asked(time.monotonic() - began)

    def _within(self, act: Callable[[], T]) -> T:
        """Act in another thread, until the time of the call is up."""
        self._check_awake()
        began = _CALL_BEGAN.get()
        now = time.monotonic()
        left = self.deadline - (0.0 if began is None else now - began)
        task = _Task(act)
        try:
            start_new_thread(task.run, ())
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from error
        try:
            return task.result(max(left, 0.0))
        except OSError as error:
            if error.errno not in _ALIVE:
                self._trip()
            raise
        except Empty:
            self._trip()
            message = f"no answer within {self.deadline:g} s: it is left alone for {self._rest:g} s"
            raise TimeoutError(errno.ETIMEDOUT, message, self.location) from None

    def _unhurried(self, act: Callable[[], T]) -> T:
        self._check_awake()
        try:
            return act()
        except OSError as error:
            if error.errno not in _ALIVE:
                self._trip()
            raise

    def _check_awake(self) -> None:
        if self.resting:
            message = f"it failed, and is left alone for {self.resting:.0f} s"
            raise RestingError(errno.EHOSTDOWN, message, self.location)

    def _trip(self) -> None:
        with counting():
            self.trips += not self.resting  # of several calls at once the first one counts
            self._rests_until = time.monotonic() + self._rest


class Pace:
    """How fast a place has answered: what reading from it will take.

    Attributes:
        latency: Seconds until an answer; None where it is not known.
        bytes_per_second: None where it is not known.
    """

    def __init__(self) -> None:
        self.latency: float | None = None
        self.bytes_per_second: float | None = None

    def asked(self, seconds: float) -> None:
        """Note how long an answer without data took."""
        self.latency = _mixed(self.latency, seconds)

    def read(self, nbytes: int, seconds: float) -> None:
        """Note how long an object took."""
        if nbytes:
            rate = nbytes / max(seconds - (self.latency or 0.0), 1e-9)
            self.bytes_per_second = _mixed(self.bytes_per_second, rate)

    def seconds(self, sizes: Sequence[int]) -> float:
        """Return how long it will take to read objects; 0 where nothing is known."""
        if not self.bytes_per_second:
            return 0.0
        return len(sizes) * (self.latency or 0.0) + sum(sizes) / self.bytes_per_second


def _mixed(known: float | None, new: float) -> float:
    return new if known is None else (1 - _NEW) * known + _NEW * new


class _Opened:
    """An object that is open."""

    def __init__(self, held: ExitStack, view: memoryview) -> None:
        self.held = held
        self.view = view


class _Task(Generic[T]):
    """What a thread does, and who gets what comes of it: who waits, or nobody.

    What the two share is changed by single calls of C, see :mod:`llama_state._io.threads`.
    """

    def __init__(self, act: Callable[[], T]) -> None:
        self._act = act
        self._open = [None]  # who takes this out decides what becomes of the result
        self._came: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run(self) -> None:
        """Do it; in the thread."""
        value: T | None = None
        error: BaseException | None = None
        try:
            value = self._act()
        except BaseException as raised:
            error = raised
        del self._act
        if self._is_mine():
            self._came.put((value, error))
        else:
            _close(value)

    def result(self, timeout: float) -> T:
        """Wait for it, and return what came of it, or raise that.

        Raises:
            Empty: The time is up. What comes later is dropped.
        """
        try:
            value, error = self._came.get(timeout=timeout)
        except Empty:
            if self._is_mine():
                raise
            value, error = self._came.get()  # it came in that very moment
        except BaseException:  # a signal's
            if not self._is_mine():
                _close(self._came.get()[0])
            raise
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _is_mine(self) -> bool:
        try:
            self._open.pop()
        except IndexError:
            return False
        return True


def _close(value: object) -> None:
    """Close an object that nobody waits for any more."""
    if isinstance(value, _Opened):
        value.held.close()
