"""Which objects go first: the least recently used, from the ends of the chains on."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..objects import Name
from .backend import Stored


@dataclass(slots=True)
class _Prefix:
    """All objects of one key."""

    stored: list[Stored] = field(default_factory=list)
    used: float = 0.0
    pinned: bool = False
    n_children: int = 0


def in_order(
    entries: Iterable[Stored], now: float | None = None, *, needed: Name | None = None
) -> Iterator[Stored]:
    """Yield objects in the order in which they can go.

    An object goes after all that go on from it, so that no chain is broken in the middle. What is
    pinned, and what it goes on from, stays.

    Args:
        entries: All objects of a place.
        now: Seconds since 1970; None for the time of now.
        needed: An object that is about to be written: what is there of its key, and of what it
            goes on from, stays, too.
    """
    prefixes = _by_key(entries, time.time() if now is None else now)
    for key in (needed.key, needed.parent) if needed else ():
        if key in prefixes:
            prefixes[key].pinned = True
    free = [(p.used, key) for key, p in prefixes.items() if not p.n_children and not p.pinned]
    heapq.heapify(free)
    while free:
        _, key = heapq.heappop(free)
        gone = prefixes[key]
        # Rows last: what lies beside them is of no use without them.
        yield from sorted(gone.stored, key=lambda each: each.name.kind == "R")
        parent = prefixes.get(gone.stored[0].name.parent)
        if parent is not None:
            parent.n_children -= 1
            if not parent.n_children and not parent.pinned:
                heapq.heappush(free, (parent.used, gone.stored[0].name.parent))


def _by_key(entries: Iterable[Stored], now: float) -> dict[bytes, _Prefix]:
    prefixes: dict[bytes, _Prefix] = {}
    for stored in entries:
        prefix = prefixes.setdefault(stored.name.key, _Prefix())
        prefix.stored.append(stored)
        if stored.name.kind == "P":
            prefix.pinned |= stored.used > now
        else:
            prefix.used = max(prefix.used, stored.used)
    for prefix in prefixes.values():
        parent = prefixes.get(prefix.stored[0].name.parent)
        if parent is not None:
            parent.n_children += 1
    return prefixes
