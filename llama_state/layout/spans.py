"""The positions that a sequence has after a restore, and how far it can be rewound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .blocks import Cache
from .traits import Traits, sub_caches


class Span(NamedTuple):
    """The smallest and the largest position of a sequence in a cache; -1 where it has no cell."""

    first: int
    last: int


NO_SPAN = Span(-1, -1)
"""What llama.cpp reports for a sequence without cells."""


def owners(caches: Sequence[Cache]) -> tuple[int, ...]:
    """Return the ids of all sequences that own a cell, increasing."""
    return tuple(sorted({i for cache in caches for cells in cache.cells for i in cells.owners}))


def positions(cache: Cache, seq_id: int) -> list[int]:
    """Return the positions of a sequence in all streams of *cache*."""
    return [p for cells in cache.cells for p in cells.positions_of(seq_id)]


def span(cache: Cache, seq_id: int) -> Span:
    """Return the smallest and the largest position of a sequence in *cache*."""
    # Without positions(): a list of them would cost more than the two searches.
    streams = [held for cells in cache.cells if len(held := cells.positions_of(seq_id))]
    return Span(min(map(min, streams)), max(map(max, streams))) if streams else NO_SPAN


def reported(caches: Sequence[Cache], traits: Traits, seq_id: int) -> Span:
    """Return what ``llama_memory_seq_pos_min`` and ``_max`` report for a sequence.

    Memory of several caches reports the positions that all of them hold.
    """
    reporting = {one.name: one for one in sub_caches(traits.module) if one.reports}
    spans = [
        Span(held.last, held.last) if reporting[cache.name].ends else held
        for cache in caches
        if cache.name in reporting
        for held in [span(cache, seq_id)]
    ]
    if not spans:
        return NO_SPAN
    return Span(max(held.first for held in spans), min(held.last for held in spans))


def rewind_min(caches: Sequence[Cache], traits: Traits, seq_id: int) -> int:
    """Return the exact value of what :meth:`Traits.rewind_min` estimates, from the cells."""
    low, high = reported(caches, traits, seq_id)
    by_name = {cache.name: cache for cache in caches}
    base = by_name.get("base") or by_name.get("mla")
    if not traits.windowed or base is None:
        return traits.rewind_min(low, high)
    held = positions(base, seq_id)
    missing = set(held).difference(positions(by_name["swa"], seq_id))
    if missing:
        return traits.rewind_past(max(missing), high)
    return min(held, default=0)
