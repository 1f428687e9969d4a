"""Several places as one, nearest first: memory, a disk of this machine, a shared folder."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final, TypeVar

from .._io.buffers import flat
from .counting import counting
from .lookup import DamagedError
from .objects import Name
from .places.backend import Place, Stored
from .places.guard import Guard
from .reading import Reader
from .troubles import Troubles

if TYPE_CHECKING:
    from .._io import Buffer
    from .places.backend import Backend

T = TypeVar("T")

# What was asked for once is known until so many other objects were.
_MOST_SEEN: Final = 1 << 16
# So long what did not work in a place is not tried there again.
_REST_SECONDS: Final = 60.0


class Tier:
    """One of the places, and what is known of it for a while.

    Args:
        place: The place.

    Attributes:
        later: It is written to from a nearer place, after a call.
        second: It is given what the store is asked to remember a second time.
        refused: Objects that it had no room for.
        kept: Objects that were found in another place and copied to it.
    """

    def __init__(self, place: Place) -> None:
        self.backend: Backend = place.backend
        self.later: bool = place.write == "behind" or place.admit == "second"
        self.second: bool = place.admit == "second"
        self.refused: int = 0
        self.kept = 0
        self._full_until = 0.0
        # What is damaged and could not be taken out of the way, until it is looked at again.
        self._hidden: dict[Name, float] = {}

    @property
    def guard(self) -> Guard | None:
        """What keeps its deadline, if it has one."""
        return self.backend if isinstance(self.backend, Guard) else None

    @property
    def resting(self) -> bool:
        """Whether it is left alone, since it failed."""
        return self.guard is not None and self.guard.resting > 0

    @property
    def has_room(self) -> bool:
        """Whether it can be written to, and has refused nothing of late."""
        if self.backend.readonly or self.resting:
            return False
        return time.monotonic() >= self._full_until

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
            with counting():
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
        self, places: Sequence[Place], troubles: Troubles, reader: Reader, *, readonly: bool
    ) -> None:
        self.tiers: tuple[Tier, ...] = tuple(map(Tier, places))
        self.location: str = ", ".join(place.backend.location for place in places)
        self.capacity_bytes: int = sum(place.backend.capacity_bytes for place in places)
        self.remote: bool = any(place.backend.remote for place in places)
        self.readonly = readonly
        self._troubles = troubles
        self._reader = reader
        self._read_far: set[Name] = set()
        self._seen: dict[Name, int] = {}

    # -- reading

    def expect(self, parents: Sequence[bytes]) -> None:
        """See :class:`Backend`: those that are far away get ready."""
        far = [tier for tier in self.tiers if tier.backend.remote and not tier.resting]
        with suppress(OSError):  # what is asked for next fails, too, and says so
            for _ in self._answers("look into", lambda t: t.backend.expect(parents), far):
                pass

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
        roomy = [tier for tier in reversed(self.tiers) if tier.has_room and not tier.later]
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
        """See :class:`Backend`: to all places but those that are written to later.

        False where none has written it.
        """
        if self.readonly:
            return False
        views = [flat(part) for part in parts]
        now = [tier for tier in self.tiers if not tier.later]
        return any([*self._answers("write to", lambda tier: tier.put(name, views), now)])

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

    # -- copies from place to place

    @property
    def passes_on(self) -> bool:
        """Whether there are places that are written to later."""
        return not self.readonly and any(tier.later for tier in self.tiers)

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
        self._copy(names, lambda tier, nearest: not nearest)

    def pass_on(self, names: Iterable[Name]) -> None:
        """Copy objects to the places that are written to later; see :meth:`keep_nearer`.

        Args:
            names: The objects; what others go on from comes first.
        """
        listed = list(names)
        twice = {name for name in listed if self._seen.get(name, 0)}
        for name in listed:
            self._seen.pop(name, None)  # the last seen comes last
            self._seen[name] = 1
        for name in [*self._seen][:-_MOST_SEEN]:
            del self._seen[name]
        for tier in self.tiers:
            if tier.later:
                wanted = [name for name in listed if not tier.second or name in twice]
                self._copy(wanted, lambda each, _, to=tier: each is to)  # type: ignore[misc]

    def _copy(self, names: Iterable[Name], is_wanted: Callable[[Tier, bool], bool]) -> None:
        """Copy objects to the places for which *is_wanted*, also told if a nearer one has it."""
        full: set[Tier] = set()
        for name in names:
            with suppress(DamagedError):
                self._copy_one(name, is_wanted, full)

    def _copy_one(
        self, name: Name, is_wanted: Callable[[Tier, bool], bool], full: set[Tier]
    ) -> None:
        source: Tier | None = None
        targets: list[Tier] = []
        for tier, there in self._answers("look into", lambda tier: (tier, tier.has(name))):
            if there:
                source = source or tier
            elif tier not in full and not tier.backend.readonly and not tier.hides(name):
                targets += [tier] if is_wanted(tier, source is not None) else []
        if source is None or not targets:
            return
        with self._reader.at(source.backend).whole(name) as (view, _):
            for to in targets:
                try:
                    if to.put(name, [view]):
                        with counting():
                            to.kept += 1
                    there = to.has(name)
                except OSError as error:
                    self._failed("write to", to, error)
                    there = False
                if not there:
                    full.add(to)

    def seconds_to_read(self, objects: Sequence[tuple[Name, int]]) -> tuple[float, set[Name]]:
        """Return what reading objects from far away will take, and which of them lie there.

        Args:
            objects: Names, and bytes. What a place on this machine has takes no time.
        """
        far: dict[Guard, list[int]] = {}
        names: set[Name] = set()
        for name, nbytes in objects:
            where = self._answers("look into", lambda tier: (tier, tier.has(name)))  # noqa: B023
            tier = next((tier for tier, there in where if there), None)
            if tier is not None and tier.guard is not None:
                far.setdefault(tier.guard, []).append(nbytes)
                names.add(name)
        return sum(guard.pace.seconds(sizes) for guard, sizes in far.items()), names

    # -- asking the places

    def _nearest(self, name: Name, read: Callable[[Backend], T]) -> tuple[Tier, T]:
        """Return what *read* gives for the nearest copy of an object, and where that is.

        Raises:
            FileNotFoundError: No place has it.
            OSError: One may have it, and failed.
        """
        failed: OSError | None = None
        for tier in self._awake(self.tiers):
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
        for tier in self._awake(self.tiers if tiers is None else tiers):
            try:
                answer = ask(tier)
            except OSError as error:
                failed = self._failed(doing, tier, error)
            else:
                answered = True
                yield answer
        if failed and not answered:
            raise failed

    def _awake(self, tiers: Sequence[Tier]) -> Sequence[Tier]:
        """Return the places that are not left alone; of those that all are, the first."""
        return [tier for tier in tiers if not tier.resting] or tiers[:1]

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
