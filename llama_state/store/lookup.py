"""Find the longest prefix of a prompt that is stored, and can be gone on from."""

from __future__ import annotations

import errno
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from .. import layout
from ..errors import FormatError, StateError, TruncatedError
from .objects import MAX_WORDS, Header, Kind, Name, end_of, head_size, parse
from .places.backend import Backend
from .prompt import Prompt, common
from .trust import Domain, Trust

if TYPE_CHECKING:
    from .._io import Buffer
    from .behind import Target

# Headers are small, and change only where an object was evicted and written again: so many are
# kept.
_MOST_HEADERS: Final = 1 << 16
DAMAGE: Final = frozenset({errno.EIO, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO})
"""Errors that say that something is wrong with one object, which is then set aside.

All others may pass: too many files are open, say, or a server does not answer.
"""


class _OtherShareError(FormatError):
    """An object that is sound, and of a store with another length of the shared part.

    It is not used, and not in the way: its name is not that of any object of this store.
    """


class DamagedError(StateError):
    """An object cannot be had: the hit has to be a shorter one.

    Attributes:
        name: The object.
        position: Where its tokens begin, as far as that is known.
        gone: It is not there, or was written anew, or cannot be read now; it is not damaged.
        cause: Why it cannot be read now.
        changed: It was written anew since its header was read.
    """

    def __init__(
        self,
        name: Name,
        position: int,
        *,
        gone: bool,
        cause: OSError | None = None,
        changed: bool = False,
    ) -> None:
        super().__init__(f"an object at position {position} is {'gone' if gone else 'damaged'}")
        self.name = name
        self.position = position
        self.gone = gone
        self.cause = cause
        self.changed = changed

    @classmethod
    def of(cls, name: Name, position: int, error: OSError | FormatError) -> DamagedError:
        """Return what an error at reading an object says of it."""
        if isinstance(error, (FileNotFoundError, _OtherShareError)):
            return cls(name, position, gone=True)
        if isinstance(error, OSError) and error.errno not in DAMAGE:
            return cls(name, position, gone=True, cause=error)
        return cls(name, position, gone=False)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a kind of memory needs to go on from a position.

    Attributes:
        rows: Whether there are rows.
        window: Whether there are rows of a window.
        state: Whether something is needed that only a restore point has.
        span: The window; None where there is none, or it is not known.
    """

    rows: bool
    window: bool
    state: bool
    span: layout.Window | None = None

    @classmethod
    def of(cls, traits: layout.Traits) -> Needs:
        """Return what the memory of *traits* needs."""
        groups = layout.groups_of(traits.module)
        return cls("R" in groups, "W" in groups, "S" in groups, traits.window)

    def chunk(self, size: int) -> int:
        """Return *size*, or what a chunk may have so that no row of a window in it is cut off."""
        return min(size, self.span.size) if self.window and self.span is not None else size

    def first_of_window(self, end: int) -> int:
        """Return the first position whose window rows a sequence has that goes on at *end*.

        One more than a token there needs: so many llama.cpp keeps.
        """
        if self.span is None:
            return 0
        if self.span.kind == "standard":
            return max(end - self.span.size, 0)
        return end // self.span.size * self.span.size


@dataclass(frozen=True, slots=True)
class Link:
    """A chunk of a chain, with the objects that are there.

    Attributes:
        header: Of any of its objects: key, tokens, positions.
        kinds: What is there.
    """

    header: Header
    kinds: dict[Kind, Name]

    @property
    def key(self) -> bytes:
        """The key of the prefix that ends with it."""
        return self.header.name.key


@dataclass(frozen=True, slots=True)
class Hit:
    """A prefix that can be gone on from.

    Attributes:
        links: Its chunks.
        end: Its positions; inside of the last chunk where memory can be cut.
        n_tokens: Its tokens.
    """

    links: tuple[Link, ...] = ()
    end: int = 0
    n_tokens: int = 0

    @property
    def has_logits(self) -> bool:
        """Whether the logits of its last token are stored."""
        if not self.links or self.links[-1].header.end != self.end:
            return False
        return "L" in self.links[-1].kinds


@dataclass(slots=True)
class Found:
    """All that a walk along a prompt finds.

    Attributes:
        links: The longest chain of chunks that the prompt begins with.
        points: Chains that end at a restore point, and with a whole chunk.
        partial: A chain that ends with a chunk that the prompt shares a beginning of, and how many
            words of that; the one with the most.
        damaged: What was met and cannot be had.
    """

    links: list[Link] = field(default_factory=list)
    points: list[tuple[Link, ...]] = field(default_factory=list)
    partial: tuple[tuple[Link, ...], int] | None = None
    damaged: dict[Name, DamagedError] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The position behind the longest chain."""
        return self.links[-1].header.end if self.links else 0

    def shares(self, links: tuple[Link, ...], shared: int) -> None:
        """Note a chunk, the last of *links*, of which *shared* words are those of the prompt."""
        now = self.partial and self.partial[0][-1].header.start + self.partial[1]
        if now is None or links[-1].header.start + shared > now:
            self.partial = links, shared


class Lookup:
    """Walks along the chains of one place.

    Args:
        backend: The place.
        trust: The keys.
    """

    def __init__(self, backend: Backend, trust: Trust) -> None:
        self._backend = backend
        self.trust = trust
        self._headers: dict[Name, Header] = {}

    def walk(self, root: bytes, prompt: Prompt, without: Container[Name] = ()) -> Found:
        """Follow the chunks that *prompt* begins with, as if nothing of *without* were there."""
        found = Found()
        pending: list[tuple[bytes, tuple[Link, ...]]] = [(root, ())]
        while pending:  # where several are whole, what goes on from each
            at, links = pending.pop()
            start = links[-1].header.end if links else 0
            if start > found.end:
                found.links = list(links)
            index = prompt.index(start)
            at = self.trust.onward(at, start, prompt)
            for link in self.children(at, start, found.damaged, without):
                words = link.header.words
                shared = common(words, prompt.words(index, index + len(words) // 4))
                whole = 4 * shared == len(words)
                if whole and "S" in link.kinds:
                    found.points.append((*links, link))
                if whole and "R" in link.kinds:
                    pending.append((link.key, (*links, link)))
                if shared and "R" in link.kinds:
                    found.shares((*links, link), shared)
        return found

    def best(self, found: Found, prompt: Prompt, needs: Needs, most: int) -> Hit:
        """Return the longest hit of at most *most* positions."""
        hits = self._points(found) if needs.state else self._rows(found, prompt, most)
        usable = (hit for hit in hits if hit.end <= most and self._covered(hit, needs, found))
        longest = max(usable, key=lambda hit: hit.end, default=Hit())
        tokens = prompt.index(longest.end)
        return Hit(longest.links, longest.end, tokens)

    def header(self, name: Name) -> Header | None:
        """Return the header of an object, verified; None where it cannot be had."""
        try:
            return self.read(name)
        except DamagedError:
            return None

    def read(self, name: Name, position: int = 0, at: Target | None = None) -> Header:
        """Return the header of an object, verified.

        Args:
            name: The object.
            position: Where its tokens begin, for the error.
            at: What waits to be written to the place, to look there too.

        Raises:
            DamagedError: It cannot be had; it may be that of another key.
        """
        known = self._headers.get(name)
        if known is not None:
            return known
        try:
            header = self._at_head(name, at or self._backend)
        except (FormatError, OSError) as error:
            raise DamagedError.of(name, position, error) from error
        if at is None:  # of what waits another process can write other bytes first
            if len(self._headers) >= _MOST_HEADERS:
                self._headers.clear()
            self._headers[name] = header
        return header

    def _at_head(self, name: Name, place: Backend | Target) -> Header:
        likely = head_size(4 * min(name.n_positions, MAX_WORDS))
        try:
            return self.parsed(name, place.head(name, likely))
        except TruncatedError as error:
            if error.need <= likely:
                raise
            need = error.need  # media have more words than positions
        return self.parsed(name, place.head(name, need))

    def parsed(self, name: Name, data: Buffer) -> Header:
        """Return the header that the bytes of an object begin with.

        Raises:
            FormatError: It is damaged, of another object, or of another key.
        """
        end = end_of(data) or 0
        try:
            return self._of_domain(name, data, self.trust.at(end))
        except FormatError:
            if not self._is_of(name, data, self.trust.other(end)):
                raise
            raise _OtherShareError("another store shares more, or less", offset=24) from None

    def _is_of(self, name: Name, data: Buffer, domain: Domain | None) -> bool:
        try:
            return domain is not None and bool(self._of_domain(name, data, domain))
        except FormatError:
            return False

    def _of_domain(self, name: Name, data: Buffer, domain: Domain) -> Header:
        header = parse(data, domain.seal, keyed=self.trust.keyed)
        if header.name != name or not domain.names(header):
            raise FormatError("an object of another name", offset=32)
        return header

    def at(self, backend: Backend) -> Lookup:
        """Return what walks along the chains of another place, and knows nothing of it yet."""
        return Lookup(backend, self.trust)

    def forget(self, name: Name) -> None:
        """Forget the header of an object that may be another one now."""
        self._headers.pop(name, None)

    def children(
        self,
        parent: bytes,
        start: int,
        damaged: dict[Name, DamagedError] | None = None,
        without: Container[Name] = (),
        at: Target | None = None,
    ) -> Iterator[Link]:
        """Yield the chunks that go on from *parent*, at position *start*.

        Args:
            parent: A key.
            start: A position.
            damaged: Takes what was met and cannot be had.
            without: What counts as not there.
            at: What waits to be written to the place, to look there too.
        """
        grouped: dict[bytes, dict[Kind, Name]] = {}
        for name in (at or self._backend).children(parent):
            if name.kind != "P" and name not in without:
                grouped.setdefault(name.key, {})[name.kind] = name
        met: dict[Name, DamagedError] = {} if damaged is None else damaged
        for kinds in grouped.values():
            names = list(kinds.values())
            header = next((h for name in names if (h := self._noted(name, start, met, at))), None)
            if header is not None and header.start == start:
                yield Link(header, {kind: name for kind, name in kinds.items() if name not in met})

    def _noted(
        self,
        name: Name,
        position: int,
        met: dict[Name, DamagedError],
        at: Target | None = None,
    ) -> Header | None:
        try:
            return self.read(name, position, at)
        except DamagedError as error:
            met[name] = error
            return None

    def _points(self, found: Found) -> Iterator[Hit]:
        for links in found.points:
            yield Hit(links, links[-1].header.end)

    def _rows(self, found: Found, prompt: Prompt, most: int) -> Iterator[Hit]:
        links = tuple(found.links)
        for n in range(len(links), 0, -1):
            yield Hit(links[:n], links[n - 1].header.end)
        # Inside of a chunk: of the last one, and of one that goes on behind the most.
        ends = [(links[: n + 1], len(link.header.words) // 4) for n, link in enumerate(links)]
        for chain, shared in [*ends, *([found.partial] if found.partial else [])]:
            start = chain[-1].header.start
            index = prompt.index(start)
            end = prompt.position(index + prompt.tokens_in(index, shared))
            end = min(end, chain[-1].header.end, prompt.position(prompt.index(most)))
            if start < end:
                yield Hit(chain, end)

    def _covered(self, hit: Hit, needs: Needs, found: Found) -> bool:
        """Tell whether all is there that a hit needs."""
        if needs.rows and not all("R" in link.kinds for link in hit.links):
            return False
        if not needs.window:
            return True
        need = needs.first_of_window(hit.end)
        for link in hit.links:
            if link.header.end <= need:
                continue
            name = link.kinds.get("W")
            window = self._noted(name, link.header.start, found.damaged) if name else None
            if window is None or window.first > max(need, window.start):
                return False
        return True
