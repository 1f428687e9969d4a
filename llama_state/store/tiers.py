"""Several places as one, nearest first: memory, a disk of this machine, a shared folder."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final, TypeVar

from .._io.buffers import flat
from .lookup import DamagedError
from .objects import Name
from .places.backend import Backend, Stored
from .reading import Reader
from .troubles import Troubles

if TYPE_CHECKING:
    from .._io import Buffer

T = TypeVar("T")

# So long what did not work in a place is not tried there again.
_REST_SECONDS: Final = 60.0


class Tier:
    """One of the places, and what is known of it for a while.

    Args:
        backend: The place.

    Attributes:
        refused: Objects that it had no room for.
        kept: Objects that were found further away and copied to it.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.refused = 0
        self.kept = 0
        self._full_until = 0.0
        # What is damaged and could not be taken out of the way, until it is looked at again.
        self._hidden: dict[Name, float] = {}

    @property
    def has_room(self) -> bool:
        """Whether it can be written to, and has refused nothing of late."""
        return not self.backend.readonly and time.monotonic() >= self._full_until

    def hides(self, name: Name) -> bool:
        """Return whether an object is to be taken as not there."""
        until = self._hidden.get(name)
        if until is not None and time.monotonic() >= until:
            self._hidden.pop(name, None)
            until = None
        return until is not None

    def has(self, name: Name) -> bool:
        """Return whether an object is there, and not hidden."""
        return not self.hides(name) and self.backend.has(name)

    def put(self, name: Name, parts: Sequence[Buffer]) -> bool:
        """Write an object; where there is no room for it, that is counted."""
        written = self.backend.put(name, parts)
        if not written and not self.backend.readonly and not self.backend.has(name):
            self.refused += 1
            self._full_until = time.monotonic() + _REST_SECONDS
        return written

    def set_aside(self, name: Name, reader: Reader) -> None:
        """Take an object out of the way, or hide it; not one that is sound."""
        if not self.has(name):
            return
        self._hidden[name] = time.monotonic() + _REST_SECONDS
        sound = reader.is_sound(name)
        if not sound:
            self.backend.set_aside(name)
        if sound or not self.backend.has(name):
            self._hidden.pop(name, None)


class Tiers:
    """A :class:`Backend` made of places, nearest first.

    What one place has is there. What is read comes from the nearest that has it, and can be kept
    nearer then; what is written goes to all. A place that fails does not keep the others from it:
    that is counted and logged. An OSError is raised where no place could do a thing.

    A chain can lie in several places: its beginning in memory, its end on the disk.

    Args:
        places: The places.
        troubles: Counts what fails in one of several places.
        reader: Reads objects; used for each place on its own.
        readonly: Nothing is written but what memory keeps nearer.
    """

    def __init__(
        self, places: Sequence[Backend], troubles: Troubles, reader: Reader, *, readonly: bool
    ) -> None:
        self.tiers = tuple(map(Tier, places))
        self.location = ", ".join(place.location for place in places)
        self.capacity_bytes = sum(place.capacity_bytes for place in places)
        self.readonly = readonly
        self._troubles = troubles
        self._reader = reader
        self._read_far: set[Name] = set()

    # -- reading

    def children(self, parent: bytes) -> Sequence[Name]:
        """See :class:`Backend`: those of all places."""

        def listed(tier: Tier) -> list[Name]:
            return [name for name in tier.backend.children(parent) if not tier.hides(name)]

        found = self._answers("look into", listed)
        return list(dict.fromkeys(name for names in found for name in names))

    def has(self, name: Name) -> bool:
        """See :class:`Backend`: whether any place has it."""
        return any(self._answers("look into", lambda tier: tier.has(name)))

    def lacks(self, name: Name) -> bool:
        """Return whether an object should be written.

        The furthest place that has room decides: what a nearer one has let go of is there, and
        what could not be written to it before is written now.
        """
        roomy = [tier for tier in reversed(self.tiers) if tier.has_room]
        for there in self._answers("look into", lambda tier: tier.has(name), roomy):
            return not there
        return not self.has(name)

    def head(self, name: Name, nbytes: int) -> bytes:
        """See :class:`Backend`: of the nearest copy."""
        return self._nearest(name, lambda place: place.head(name, nbytes))[1]

    @contextmanager
    def open(self, name: Name, nbytes: int) -> Iterator[memoryview]:
        """See :class:`Backend`: the nearest copy."""
        with ExitStack() as stack:
            tier, view = self._nearest(
                name, lambda place: stack.enter_context(place.open(name, nbytes))
            )
            if tier is not self.tiers[0]:
                self._read_far.add(name)
            yield view

    def entries(self) -> Iterator[Stored]:
        """See :class:`Backend`: each object once, as the place says that used it last."""
        found: dict[Name, Stored] = {}

        def listed(tier: Tier) -> list[Stored]:
            return [each for each in tier.backend.entries() if not tier.hides(each.name)]

        for stored in self._answers("list", listed):
            for each in stored:
                known = found.get(each.name)
                if known is None or known.used < each.used:
                    found[each.name] = each
        yield from found.values()

    def used_bytes(self) -> int:
        """See :class:`Backend`: of all places together."""
        return sum(self._answers("count", lambda tier: tier.backend.used_bytes()))

    # -- writing

    def put(self, name: Name, parts: Iterable[Buffer]) -> bool:
        """See :class:`Backend`: to all places; False where none has written it."""
        if self.readonly:
            return False
        views = [flat(part) for part in parts]
        return any([*self._answers("write to", lambda tier: tier.put(name, views))])

    def touch(self, names: Iterable[Name], when: float | None = None) -> None:
        """See :class:`Backend`: in all places."""
        listed = list(names)
        self._all("write to", lambda tier: tier.backend.touch(listed, when))

    def remove(self, name: Name) -> int:
        """See :class:`Backend`: from all places; the bytes of all copies."""
        if self.readonly:
            return 0
        return sum(self._answers("remove from", lambda tier: tier.backend.remove(name)))

    def set_aside(self, name: Name) -> None:
        """See :class:`Backend`: the copies that are damaged; a sound one is read from then on."""
        self._all("set aside in", lambda t: t.set_aside(name, self._reader.at(t.backend)))

    def evict(self, to_bytes: int) -> int:
        """See :class:`Backend`: each place on its own, down to as many bytes."""
        if self.readonly:
            return 0
        return sum(self._answers("evict from", lambda tier: tier.backend.evict(to_bytes)))

    # -- keeping nearer

    def take_far(self, names: Iterable[Name]) -> list[Name]:
        """Return which of these objects were read, and not from the nearest place."""
        far = [name for name in names if name in self._read_far]
        self._read_far.difference_update(far)
        return far

    def keep_nearer(self, names: Iterable[Name]) -> None:
        """Copy objects to all places that are nearer than the nearest copy.

        Each is read again, and verified, so that nothing has to stay open until then. A place
        that has no room for one of them gets no more: they would go on from it.

        Args:
            names: The objects; what others go on from comes first.
        """
        full: set[Tier] = set()
        for name in names:
            with suppress(DamagedError):
                self._keep_nearer(name, full)

    def _keep_nearer(self, name: Name, full: set[Tier]) -> None:
        nearer: list[Tier] = []
        for tier, there in self._answers("look into", lambda tier: (tier, tier.has(name))):
            if there:
                break
            if tier not in full and not tier.backend.readonly and not tier.hides(name):
                nearer.append(tier)
        else:
            return  # it is gone
        if not nearer:
            return
        with self._reader.at(tier.backend).whole(name) as (view, _):
            for to in nearer:
                try:
                    to.kept += to.put(name, [view])
                    there = to.has(name)
                except OSError as error:
                    self._failed("write to", to, error)
                    there = False
                if not there:
                    full.add(to)

    # -- asking the places

    def _nearest(self, name: Name, read: Callable[[Backend], T]) -> tuple[Tier, T]:
        """Return what *read* gives for the nearest copy of an object, and where that is.

        Raises:
            FileNotFoundError: No place has it.
            OSError: One may have it, and failed.
        """
        failed: OSError | None = None
        for tier in self.tiers:
            if not tier.hides(name):
                try:
                    return tier, read(tier.backend)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    failed = self._failed("read from", tier, error)
        raise failed or _gone(name)

    def _answers(
        self, doing: str, ask: Callable[[Tier], T], tiers: Sequence[Tier] | None = None
    ) -> Iterator[T]:
        """Yield the answers of the places that give one, nearest first.

        Raises:
            OSError: None does.
        """
        failed: OSError | None = None
        answered = False
        for tier in self.tiers if tiers is None else tiers:
            try:
                answer = ask(tier)
            except OSError as error:
                failed = self._failed(doing, tier, error)
            else:
                answered = True
                yield answer
        if failed and not answered:
            raise failed

    def _all(self, doing: str, tell: Callable[[Tier], None]) -> None:
        """Tell all places something."""
        for _ in self._answers(doing, tell):
            pass

    def _failed(self, doing: str, tier: Tier, error: OSError) -> OSError:
        if len(self.tiers) > 1:
            self._troubles.failed(f"{doing} {tier.backend.location}", error)
        return error


def _gone(name: Name) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no such object", name.key.hex())
