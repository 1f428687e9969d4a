"""The description of a parsed state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from . import spans as _spans
from .blocks import Cache, Compressed
from .geometry import Geometry, geometry_of
from .headers import Kind
from .spans import Span
from .traits import Module, Traits


# Without slots: what is computed from the fields is kept beside them, since a restore asks for it
# several times.
@dataclass(frozen=True)
class Layout:
    """What a state holds, and where. It refers to no byte of the state.

    Attributes:
        kind: "whole" or "sequence".
        version: Session version.
        traits: How the state was read.
        arch: The architecture that it names; None for a sequence: those name none.
        source: The sequence that was saved; None for a whole context, and where neither
            head nor cells tell.
        partial: Read as saved with the flag PARTIAL_ONLY.
        caches: Its sub-caches, in order.
        nbytes: Length of the state.
        alternatives: Other traits with which it reads as well: these bytes do not tell.
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

    @property
    def module(self) -> Module:
        """The kind of memory."""
        return self.traits.module

    @cached_property
    def sequences(self) -> tuple[int, ...]:
        """The ids of all sequences that own a cell, increasing.

        :data:`UNKNOWN_ID` stands for the one of a sequence state that does not tell.
        """
        return _spans.owners(self.caches)

    @cached_property
    def spans(self) -> dict[int, Span]:
        """Sequence id -> its positions, as llama.cpp reports after a restore."""
        return {i: _spans.answered(self.caches, self.traits, i) for i in self.sequences}

    @property
    def base_spans(self) -> dict[int, Span]:
        """Sequence id -> its positions in the first cache, which omits none."""
        return {i: _spans.span(self.caches[0], i) for i in self.sequences}

    @cached_property
    def geometry(self) -> Geometry:
        """The settings of the context that it was saved from, as far as it records them."""
        return Geometry(self.arch, self.module, tuple(map(geometry_of, self.caches)))

    @cached_property
    def cells_needed(self) -> dict[str, tuple[int, ...]]:
        """Cache name -> the cells that it must have room for, one number a stream.

        A compressed cache of deepseek4 needs that many rows in each stream.
        """
        return {
            cache.name: (cache.n_rows,) * cache.n_stream
            if isinstance(cache, Compressed)
            else tuple(map(len, cache.cells))
            for cache in self.caches
        }

    def rewind_min(self, seq_id: int) -> int:
        """Return the smallest position to which *seq_id* can truthfully be cut back.

        Tokens decoded from there on, after the restore, see all that they would have seen
        the first time. It is the next position to decode where nothing can be cut off, and 0
        for a sequence without cells.
        """
        return _spans.rewind_min(self.caches, self.traits, seq_id)
