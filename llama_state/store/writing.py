"""Write the pieces of a sequence that a store does not have yet."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from .counting import counting
from .lookup import Found, Link, Lookup, Needs
from .objects import Kind, Name, pack
from .pieces import SequenceMemory, Taken
from .prompt import Prompt, common
from .results import Remembered

if TYPE_CHECKING:
    from .._io import Buffer
    from .behind import Target
    from .recall import Asked
    from .tiers import Tiers

# Where prompts part in less than this share of a chunk, a chunk of what they have in common does
# not pay: each has its own file, which costs as much to find and to open as a large one.
_PARTED: Final = 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a prompt.

    Attributes:
        parent: Key of what it goes on from.
        key: Key of the prefix that ends with it.
        words: Its tokens.
        first, last: Indices of its first token and of the one behind its last.
        start, end: Their positions.
        stored: Whether its rows are there.
    """

    parent: bytes
    key: bytes
    words: bytes
    first: int
    last: int
    start: int
    end: int
    stored: bool = False

    def name(self, kind: Kind) -> Name:
        """Return the name of an object of it."""
        return Name(self.parent, self.key, self.end - self.start, kind)


class Writer:
    """Writes prefixes to one place.

    Args:
        backend: The place.
        lookup: Finds what is there, and has the keys.
        chunk_tokens: Positions of a chunk.
    """

    def __init__(self, backend: Tiers, lookup: Lookup, chunk_tokens: int) -> None:
        self._backend = backend
        self._lookup = lookup
        self._trust = lookup.trust
        self._chunk_tokens = chunk_tokens
        self.refused: int = 0

    def describe(self, target: Target, root: bytes, fields: bytes, no_parent: bytes) -> None:
        """Write down what the namespace of *root* is."""
        name = Name(no_parent, root, 0, "N")
        if self._backend.has(name) and self._lookup.header(name) is None:
            self._backend.set_aside(name)  # it is damaged
        if target.lacks(name):
            self._put(target, name, root, b"", [fields], first=0, end=0, session_version=0)

    def write(
        self,
        target: Target,
        memory: SequenceMemory,
        seq_id: int,
        root: bytes,
        prompt: Prompt,
        needs: Needs,
    ) -> tuple[Remembered, list[Chunk]]:
        """Write what is not there of a sequence, which begins with *prompt*.

        Args:
            target: The place, or what writes to it behind.
            memory: The sequences.
            seq_id: Which one.
            root: Key of the namespace.
            prompt: What it begins with.
            needs: What its memory needs.

        Returns:
            What is stored now, and the chunks of it, as they were before.
        """
        chunks = list(self.chunks(target, root, prompt, needs))
        parents = {after.end: before for before, after in pairwise(chunks) if before.stored}
        n_past = memory.n_past(seq_id)
        # Rows of the window are kept where a hit can go on: at the end, and wherever they are all
        # still there.
        first = needs.first_of_window(n_past)
        windows = {
            chunk.end
            for chunk in chunks
            if needs.window and (chunk.end > first or memory.can_cut(seq_id, chunk.end))
        }
        missing = {chunk.end: chunk for chunk in self._missing(target, chunks, windows)}
        last = chunks[-1]
        at_end = needs.state and n_past == last.end
        state = at_end and target.lacks(last.name("S"))
        written: list[tuple[Chunk, Kind, int]] = []
        lacking: list[Chunk] = []  # chunks without rows, as there was no room

        def write(piece: Taken) -> None:
            if lacking:
                return  # nothing could go on from it
            chunk = last if piece.group == "S" else missing[piece.end]
            parent = parents.get(chunk.end)
            if parent is not None and not target.has(parent.name("R")):
                lacking.append(parent)  # it was evicted since it was found
                return
            name = chunk.name(piece.group)
            nbytes = self._put(
                target,
                name,
                root,
                chunk.words,
                piece.parts,
                first=piece.first,
                end=chunk.end,
                session_version=memory.session_version,
            )
            written.append((chunk, piece.group, nbytes))
            if piece.group == "R" and not nbytes and not target.has(name):
                lacking.append(chunk)

        ranges = [(chunk.start, chunk.end) for chunk in missing.values()]
        memory.take(seq_id, ranges, write, state=state, dense=not prompt.has_media)
        new = (chunk for chunk, kind, nbytes in written if kind == "R" and nbytes)
        n_new = sum(chunk.last - chunk.first for chunk in new)
        nbytes = sum(each for *_, each in written)
        new_ones = (chunk for chunk in chunks if not chunk.stored)
        absent = (chunk for chunk in [*lacking, *new_ones] if not target.has(chunk.name("R")))
        n_tokens = min((chunk.first for chunk in absent), default=len(prompt))
        if at_end and n_tokens == len(prompt) and (row := memory.logits(seq_id)) is not None:
            nbytes += self._put(
                target,
                last.name("L"),
                root,
                last.words,
                [row.cast("B")],
                first=last.end,
                end=last.end,
                session_version=0,
            )
        return Remembered(n_tokens, n_new, nbytes), chunks

    def chunks(self, target: Target, root: bytes, prompt: Prompt, needs: Needs) -> Iterator[Chunk]:
        """Yield the chunks of a prompt: those that are there, then new ones.

        A new one ends where prompts part that begin with it, so that they share it; and where
        the shared part ends.
        """
        size = needs.chunk(self._chunk_tokens)
        shared = self._trust.shared_part(prompt)
        at, first, stored = root, 0, True
        while first < len(prompt):
            _, last = next(prompt.chunks(first, size))
            last = min(last, shared if first < shared else len(prompt))
            at = self._trust.onward(at, prompt.position(first), prompt)
            chunk = self._chunk(target, at, prompt, first, last, look=stored)
            if stored and not chunk.stored:
                last = self._end_among(target, chunk, prompt, size)
                chunk = self._chunk(target, at, prompt, first, last, look=last != chunk.last)
                stored = chunk.stored
            yield chunk
            at, first = chunk.key, chunk.last

    def stops(self, asked: Asked, found: Found) -> list[int]:
        """Return where a prefill stops to remember: indices of tokens, the last one is the end.

        Args:
            asked: The prompt.
            found: What a walk along it found.
        """
        prompt, needs = asked.prompt, asked.needs
        if not needs.state and (not needs.window or asked.memory.keeps_window()):
            return [len(prompt)]
        chunks = list(self.chunks(self._backend, asked.root, prompt, needs))
        kept = kept_points([chunk.end for chunk in chunks], self._chunk_tokens)
        # Where other prompts go on otherwise: the next one will want to go on there too.
        junction = found.links[-1].header.end if found.links else 0
        stops = {chunk.last for chunk in chunks if chunk.end in kept or chunk.end == junction}
        return sorted({*stops, self._trust.shared_part(prompt), len(prompt)} - {0})

    def _chunk(
        self, target: Target, parent: bytes, prompt: Prompt, first: int, last: int, *, look: bool
    ) -> Chunk:
        words = prompt.words(first, last)
        start, end = prompt.position(first), prompt.position(last)
        key = self._trust.at(end).keys.next(parent, end - start, words)
        stored = look and not target.lacks(Name(parent, key, end - start, "R"))
        return Chunk(parent, key, words, first, last, start, end, stored)

    def _end_among(self, target: Target, chunk: Chunk, prompt: Prompt, size: int) -> int:
        """Return where *chunk* ends, given what is stored of other prompts in its place.

        The index of a token: where a stored chunk ends that all of is in the prompt, unless it is
        a short end of a conversation, which is written again with what goes on from it; else where
        the prompt parts from a stored chunk.
        """
        whole, parted = 0, 0
        at = None if target is self._backend else target
        for link in self._lookup.children(chunk.parent, chunk.start, at=at):
            if "R" not in link.kinds:
                continue
            shared = prompt.tokens_in(chunk.first, common(link.header.words, chunk.words))
            n_positions = prompt.position(chunk.first + shared) - chunk.start
            if n_positions < link.header.name.n_positions:
                parted = max(parted, shared)
            elif 2 * n_positions >= size or self._goes_on(target, link):
                whole = max(whole, shared)
        if not whole and prompt.position(chunk.first + parted) - chunk.start >= size / _PARTED:
            whole = parted
        return chunk.first + whole if whole else chunk.last

    def _goes_on(self, target: Target, link: Link) -> bool:
        """Tell whether there are chunks that go on from one."""
        return any(name.kind == "R" for name in self._onward(target, link))

    def _onward(self, target: Target, link: Link) -> Iterator[Name]:
        """Yield the names of what goes on from a chunk."""
        for key in self._trust.onwards(link.key, link.header.end):
            yield from target.children(key)

    def _missing(
        self, target: Target, chunks: Sequence[Chunk], windows: Container[int]
    ) -> Iterator[Chunk]:
        for chunk in chunks:
            windowed = chunk.end in windows
            if not chunk.stored or (windowed and target.lacks(chunk.name("W"))):
                yield chunk

    def tidy(self, root: bytes, prompt: Prompt, needs: Needs, chunks: Sequence[Chunk]) -> None:
        """Remove what the chunks that were just written make superfluous."""
        new = next((n for n, chunk in enumerate(chunks) if not chunk.stored), None)
        if new is not None:
            # Beside those behind it nothing was stored. The one before it may be what another
            # prompt has in common with this one, which was whole there until then.
            for n in range(max(new - 1, 0), new + 1):
                self.supersede(prompt, chunks[n:])
        if needs.state:
            self.thin(self._lookup.walk(root, prompt), chunks)

    def thin(self, found: Found, chunks: Sequence[Chunk]) -> None:
        """Remove restore points of a chain that are close to others, and what they needed.

        A pinned one stays, and the last but one: an answer is asked for again, or another branch
        is tried, where the one before began. So does that at the end of the shared part.

        Args:
            found: What a walk along the prompt found, with its last restore point.
            chunks: The chunks of the prompt.
        """
        whole = {chunk.key for chunk in chunks}
        points = {links[-1].header.end: links[-1] for links in found.points}
        ends = sorted(points)
        shared = max(filter(self._trust.is_shared, ends), default=0)
        kept = {*kept_points(ends, self._chunk_tokens), *ends[-2:], shared}
        for end, link in points.items():
            if end not in kept and not self._branches(link) and not self._has_pin(link):
                self.remove(link, ("L", "S") if link.key in whole else ("L", "S", "W", "R"))

    def _branches(self, link: Link) -> bool:
        """Tell whether several chains go on from a chunk."""
        return len({name.key for name in self._onward(self._backend, link)}) > 1

    def _has_pin(self, link: Link) -> bool:
        return self._backend.has(replace(link.header.name, kind="P"))

    def supersede(self, prompt: Prompt, chunks: Sequence[Chunk]) -> None:
        """Remove what is stored beside the first of *chunks*, and all of it in them too.

        Nothing that is pinned or a restore point, that a chunk goes on from, or where *chunks* are
        not stored, or have still to be written to some place.
        """
        first = chunks[0]
        keys = {chunk.key for chunk in chunks}
        lacking = (chunk.start for chunk in chunks if self._backend.lacks(chunk.name("R")))
        end = next(lacking, chunks[-1].end)
        for link in list(self._lookup.children(first.parent, first.start)):
            words = link.header.words
            within = link.header.end <= end and link.key not in keys
            here = prompt.words(first.first, first.first + len(words) // 4)
            if not within or not here.startswith(words):
                continue
            needed = "S" in link.kinds or self._has_pin(link)
            if not needed and not self._goes_on(self._backend, link):
                self.remove(link)

    def remove(self, link: Link, kinds: Sequence[Kind] = ("L", "S", "W", "R")) -> None:
        """Remove objects of a chunk."""
        for kind in kinds:
            if name := link.kinds.get(kind):
                self._backend.remove(name)
                self._lookup.forget(name)

    def _put(
        self,
        target: Target,
        name: Name,
        root: bytes,
        words: bytes,
        parts: Sequence[Buffer],
        *,
        first: int,
        end: int,
        session_version: int,
    ) -> int:
        packed = pack(
            name,
            root,
            words,
            parts,
            self._trust.at(end).seal,
            first=first,
            end=end,
            session_version=session_version,
            keyed=self._trust.keyed,
        )
        if not target.put(name, packed):
            if target is self._backend and not target.has(name):
                with counting():
                    self.refused += 1
            return 0
        return sum(memoryview(part).nbytes for part in packed)


def kept_points(ends: Sequence[int], chunk: int) -> set[int]:
    """Return which restore points of a chain stay: a few, at growing distances from the last.

    Of each distance, which doubles from one to the next, the first one stays, so that it is there
    when the chain has grown.

    Args:
        ends: Their positions, increasing.
        chunk: Positions of a chunk.
    """
    kept: dict[int, int] = {}
    for end in ends:
        kept.setdefault(((ends[-1] - end) // chunk).bit_length(), end)
    return {*kept.values(), *ends[-1:]}
