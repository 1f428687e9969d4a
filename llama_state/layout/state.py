"""The description of a parsed state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .._io.markup import table
from . import spans as _spans
from .blocks import UNKNOWN_ID, Cache, Compressed
from .geometry import Geometry, geometry_of
from .headers import Kind
from .spans import Span
from .traits import Module, Traits


# Without slots, which cached_property does not work with: a restore reads these several times.
@dataclass(frozen=True, repr=False)
class Layout:
    """What a state holds, and where. It keeps no reference to the bytes.

    Attributes:
        kind: "whole" or "sequence".
        version: Session version.
        traits: How the state was read.
        arch: The architecture that it names; None for a sequence, which names none.
        source: The sequence that was saved; None for a whole context, and if neither the head nor
            the cells name it.
        partial: Whether it was read as one saved with the flag PARTIAL_ONLY.
        caches: Its sub-caches, in order.
        nbytes: Length of the state.
        alternatives: Other traits with which it reads to another description: the bytes alone
            do not decide which is right.
        unexpected: Whether the traits that were given did not read it, but others did. It is of a
            llama.cpp with another memory for this architecture, or cut off.
    """

    kind: Kind
    version: int
    traits: Traits
    arch: str | None
    source: int | None
    partial: bool
    caches: tuple[Cache, ...]
    nbytes: int
    alternatives: tuple[Traits, ...] = ()
    unexpected: bool = False

    def __repr__(self) -> str:
        cells = (f"{cache.name} {sum(map(len, cache.cells))} cells" for cache in self.caches)
        return (
            f"<Layout of a {self._what}: {', '.join(cells)}; "
            f"session version {self.version}, {self.nbytes} bytes>"
        )

    @property
    def _what(self) -> str:
        partial = "partial " if self.partial else ""
        arch = f" of {self.arch}" if self.arch else ""
        return (
            f"{partial}state of a {'whole context' if self.kind == 'whole' else 'sequence'}{arch}"
        )

    @property
    def module(self) -> Module:
        """The kind of memory."""
        return self.traits.module

    @cached_property
    def sequences(self) -> tuple[int, ...]:
        """The ids of all sequences that own a cell, increasing.

        :data:`UNKNOWN_ID` stands for the sequence of a state that does not name it.
        """
        return _spans.owners(self.caches)

    @cached_property
    def spans(self) -> dict[int, Span]:
        """Sequence id -> its positions, as llama.cpp reports after a restore."""
        return {i: _spans.reported(self.caches, self.traits, i) for i in self.sequences}

    @property
    def base_spans(self) -> dict[int, Span]:
        """Sequence id -> its positions in the first cache, which has them all."""
        return {i: _spans.span(self.caches[0], i) for i in self.sequences}

    @cached_property
    def geometry(self) -> Geometry:
        """The settings of the context that it was saved from, those that it records."""
        return Geometry(self.arch, self.module, tuple(map(geometry_of, self.caches)))

    @cached_property
    def cells_needed(self) -> dict[str, tuple[int, ...]]:
        """Cache name -> the cells that each of its streams needs.

        For a compressed cache of deepseek4: rows.
        """
        return {
            cache.name: (cache.n_rows,) * cache.n_stream
            if isinstance(cache, Compressed)
            else tuple(map(len, cache.cells))
            for cache in self.caches
        }

    def rewind_min(self, seq_id: int) -> int:
        """Return the smallest position from which *seq_id* can be decoded again after a restore.

        Tokens decoded from there on attend to all that they would have attended to the first
        time. It is the next position if nothing can be removed, and 0 for a sequence without
        cells.
        """
        return _spans.rewind_min(self.caches, self.traits, seq_id)

    def _repr_html_(self) -> str:
        """Return its caches and its sequences as tables, for notebooks."""
        caption = f"{self._what}: {self.module}, session version {self.version}"
        caches = [
            (cache.name, f"{sum(map(len, cache.cells)):,}", f"{cache.nbytes:,}")
            for cache in self.caches
        ]
        sequences = [
            (
                "not named" if seq_id == UNKNOWN_ID else seq_id,
                span.first,
                span.last,
                self.rewind_min(seq_id),
            )
            for seq_id, span in self.spans.items()
        ]
        return "\n".join(
            [
                table(caches, head=("cache", "cells", "bytes"), caption=caption),
                table(sequences, head=("sequence", "first", "last", "can be cut back to")),
            ]
        )
