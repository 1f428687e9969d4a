"""Bring the longest stored prefix of a prompt back into a sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from .. import layout
from ..errors import FormatError, StateError
from .lookup import Hit, Lookup, Needs
from .objects import Name, Seal, payload
from .pieces import Given, SequenceMemory

if TYPE_CHECKING:
    from .backend import Backend

_AHEAD: Final = 2  # pieces that are in memory at once: the one that llama.cpp copies and the next


class DamagedError(StateError):
    """An object is gone or damaged: the hit has to be a shorter one."""

    def __init__(self, name: Name, position: int, *, gone: bool) -> None:
        super().__init__(f"an object at position {position} is {'gone' if gone else 'damaged'}")
        self.name = name
        self.position = position
        self.gone = gone


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
        seal: Digests objects.
    """

    def __init__(self, backend: Backend, lookup: Lookup, seal: Seal) -> None:
        self._backend = backend
        self._lookup = lookup
        self._seal = seal

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
        with ExitStack() as kept, ThreadPoolExecutor(1, "llama_state-verify") as pool:
            in_turn = memory.appends(seq_id)
            pieces = self._ahead(pool, objects, None if in_turn else kept)
            memory.put(seq_id, pieces, end=hit.end, keep=keep, tokens=tokens, logits=logits)
        return sum(self._nbytes(each.name) for each in objects)

    def read(self, name: Name) -> bytes:
        """Return the payload of an object.

        Raises:
            DamagedError: It is gone or damaged.
        """
        with self._verified(name) as view:
            return bytes(view[8:])

    def _nbytes(self, name: Name) -> int:
        header = self._lookup.header(name)
        return header.nbytes if header else 0

    def _ahead(
        self, pool: ThreadPoolExecutor, objects: list[Wanted], kept: ExitStack | None
    ) -> Iterator[Given]:
        """Yield pieces, of which the next is verified while llama.cpp copies one.

        Each is valid as long as *kept* is open; without it, until the next one is taken.
        """
        coming: deque[tuple[Wanted, Future[_Open]]] = deque()
        rest = iter(objects)
        try:
            for each in islice(rest, _AHEAD):
                coming.append((each, pool.submit(self._open, each.name)))
            while coming:
                yield from self._taken(*coming.popleft(), kept)
                for following in islice(rest, 1):
                    coming.append((following, pool.submit(self._open, following.name)))
        finally:
            for _, future in coming:
                future.add_done_callback(_closed)

    def _taken(
        self, each: Wanted, future: Future[_Open], kept: ExitStack | None
    ) -> Iterator[Given]:
        """Yield one piece; what it was in goes with this call, before another is opened."""
        held, data, version = future.result()
        piece = Given(each.group, data, version, each.start, each.end, each.whole)
        if kept is not None:
            kept.callback(held.close)
            yield piece
        else:
            with held:
                yield piece

    def _open(self, name: Name) -> _Open:
        header = self._lookup.header(name)
        with ExitStack() as stack:
            data = stack.enter_context(self._verified(name))
            return _Open(stack.pop_all(), data, header.session_version if header else 0)

    @contextmanager
    def _verified(self, name: Name) -> Iterator[memoryview]:
        with self.whole(name) as (_, data):
            yield data

    @contextmanager
    def whole(self, name: Name) -> Iterator[tuple[memoryview, memoryview]]:
        """Yield a whole object, and the payload in it, both verified.

        Raises:
            DamagedError: It is gone or damaged.
        """
        header = self._lookup.header(name)
        if header is None:
            raise DamagedError(name, 0, gone=not self._backend.has(name))
        opened: AbstractContextManager[memoryview] = self._backend.open(name)
        with ExitStack() as stack:
            try:
                view = stack.enter_context(opened)
                data = payload(view, header, self._seal)
            except FileNotFoundError:
                raise DamagedError(name, header.start, gone=True) from None
            except (FormatError, OSError) as error:
                raise DamagedError(name, header.start, gone=False) from error
            yield view, data


class _Open(NamedTuple):
    """An object that is open and verified."""

    held: ExitStack
    data: memoryview
    session_version: int


def _closed(future: Future[_Open]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().held.close()
