"""Bring the longest stored prefix of a prompt back into a sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from .. import layout
from .._io.threads import Answer, Threads
from ..errors import FormatError
from .lookup import DamagedError, Hit, Lookup, Needs
from .objects import Header, Name, payload
from .pieces import Given, SequenceMemory

if TYPE_CHECKING:
    from .places.backend import Backend

_AHEAD: Final = 2  # pieces that are in memory at once: the one that llama.cpp copies and the next
# Where some may come from a server, which answers several questions at once.
_FAR_AHEAD: Final = 4


@dataclass(frozen=True, slots=True)
class Wanted:
    """An object that is to be read, and what of it.

    Attributes:
        name: The object.
        group: What it holds.
        start, end: Positions that are wanted.
        whole: Whether these are all that it has.
    """

    name: Name
    group: layout.Group
    start: int
    end: int
    whole: bool


def wanted(hit: Hit, lookup: Lookup, needs: Needs, keep: int) -> list[Wanted]:
    """Return the objects of a hit: rows, rows of the window, the state; behind *keep*."""
    if not hit.links:
        return []
    rows: list[Wanted] = []
    windows: list[Wanted] = []
    first = max(needs.first_of_window(hit.end), keep)
    for link in hit.links:
        header = link.header
        if header.end <= keep:
            continue
        end = min(header.end, hit.end)
        if needs.rows:
            start = max(header.start, keep)
            whole = (start, end) == (header.start, header.end)
            rows.append(Wanted(link.kinds["R"], "R", start, end, whole))
        if needs.window and header.end > first:
            window = lookup.header(link.kinds["W"])
            begin = window.first if window else header.start
            start = max(begin, first)
            whole = (start, end) == (begin, header.end)
            windows.append(Wanted(link.kinds["W"], "W", start, end, whole))
    states: list[Wanted] = []
    if needs.state:
        states.append(Wanted(hit.links[-1].kinds["S"], "S", hit.end, hit.end, whole=True))
    return [*rows, *windows, *states]


class Reader:
    """Reads objects of one place, verified.

    Args:
        backend: The place.
        lookup: Knows the headers.
    """

    def __init__(self, backend: Backend, lookup: Lookup) -> None:
        self._backend = backend
        self._lookup = lookup
        self._most = _FAR_AHEAD if backend.remote else _AHEAD

    def load(
        self,
        memory: SequenceMemory,
        seq_id: int,
        hit: Hit,
        objects: list[Wanted],
        *,
        keep: int,
        tokens: tuple[int, ...] | None,
        logits: memoryview[float] | None = None,
    ) -> int:
        """Put a hit into a sequence, and return the bytes that were read.

        Raises:
            DamagedError: An object is; the sequence is empty.
            StateError: llama.cpp refused a piece; the sequence is empty.
        """
        with ExitStack() as kept, Threads(self._most - 1) as threads:
            in_turn = memory.appends(seq_id)
            # Closed at once: what it holds open would wait for whoever holds an error.
            with closing(self._ahead(threads, objects, None if in_turn else kept)) as pieces:
                memory.put(seq_id, pieces, end=hit.end, keep=keep, tokens=tokens, logits=logits)
        return sum(self.nbytes(each.name) for each in objects)

    def read(self, name: Name) -> bytes:
        """Return the payload of an object.

        Raises:
            DamagedError: It is gone or damaged.
        """
        with self.whole(name) as (_, data):
            return bytes(data[8:])

    def check(self, objects: list[Wanted], sound: set[Name]) -> None:
        """Verify objects, but those that are known as *sound*, to which they are added.

        Raises:
            DamagedError: One cannot be had.
        """
        for each in objects:
            if each.name not in sound:
                with self._verified(each.name, each.start):
                    sound.add(each.name)

    def is_sound(self, name: Name) -> bool:
        """Return whether an object is sound, or gone.

        Raises:
            OSError: It cannot be read now.
        """
        try:
            with self.whole(name):
                return True
        except DamagedError as error:
            if error.cause is not None:
                raise error.cause from error
            return error.gone

    def can_parse(self, name: Name) -> bool:
        """Return whether the header of an object can be read: not of another key, nor damaged."""
        return self._lookup.header(name) is not None

    def at(self, backend: Backend) -> Reader:
        """Return what reads another place, and knows nothing of it yet."""
        return Reader(backend, self._lookup.at(backend))

    def nbytes(self, name: Name) -> int:
        """Return the bytes of the payload of an object; 0 where it cannot be had."""
        header = self._lookup.header(name)
        return header.nbytes if header else 0

    def _ahead(
        self, threads: Threads, objects: list[Wanted], kept: ExitStack | None
    ) -> Generator[Given, None, None]:
        """Yield pieces, of which the next is verified while llama.cpp copies one.

        Each is valid as long as *kept* is open; without it, until the next one is taken.
        """
        coming: deque[tuple[Wanted, Answer[_Open]]] = deque()
        try:
            yield from self._in_turn(threads, iter(objects), coming, kept)
        finally:
            for _, answer in coming:
                if (opened := answer.give_up()) is not None:
                    opened.held.close()

    def _in_turn(
        self,
        threads: Threads,
        rest: Iterator[Wanted],
        coming: deque[tuple[Wanted, Answer[_Open]]],
        kept: ExitStack | None,
    ) -> Iterator[Given]:
        for each in islice(rest, self._most):
            coming.append((each, threads.ask(partial(self._open, each))))
        while coming:
            yield from self._taken(*coming[0], kept)
            coming.popleft()
            for following in islice(rest, 1):
                coming.append((following, threads.ask(partial(self._open, following))))

    def _taken(
        self, each: Wanted, answer: Answer[_Open], kept: ExitStack | None
    ) -> Iterator[Given]:
        """Yield one piece; what it was in goes with this call, before another is opened."""
        held, data, version = answer.result()
        piece = Given(each.group, data, version, each.start, each.end, each.whole)
        if kept is not None:
            kept.callback(held.close)
            yield piece
        else:
            with held:
                yield piece

    def _open(self, wanted: Wanted) -> _Open:
        with ExitStack() as stack:
            opened = self._verified(wanted.name, wanted.start)
            header, _, data = stack.enter_context(opened)
            return _Open(stack.pop_all(), data, header.session_version)

    @contextmanager
    def whole(self, name: Name) -> Iterator[tuple[memoryview, memoryview]]:
        """Yield a whole object as it is now, and the payload in it, both verified.

        Raises:
            DamagedError: It cannot be had.
        """
        self._lookup.forget(name)
        with self._verified(name) as (_, view, data):
            yield view, data

    @contextmanager
    def _verified(
        self, name: Name, position: int = 0
    ) -> Iterator[tuple[Header, memoryview, memoryview]]:
        """Yield the header of an object, all of it, and its payload.

        Raises:
            DamagedError: It cannot be had, or is not what its header said when that was read.
        """
        header = self._lookup.read(name, position)
        with ExitStack() as stack:
            try:
                view = stack.enter_context(self._backend.open(name, header.whole))
                found = self._lookup.parsed(name, view)
                data = payload(view, found, self._lookup.trust.at(found.end).seal)
            except (FormatError, OSError) as error:
                self._lookup.forget(name)
                now = self._lookup.read(name, position)
                if now != header:
                    raise DamagedError(name, position, gone=True, changed=True) from error
                raise DamagedError.of(name, position, error) from error
            if found != header:  # another one, of another run: written anew, or in another place
                self._lookup.forget(name)
                if found.first != header.first:  # it has other rows of the window
                    raise DamagedError(name, position, gone=True, changed=True)
            yield found, view, data


class _Open(NamedTuple):
    """An object that is open and verified."""

    held: ExitStack
    data: memoryview
    session_version: int
