"""What is in a place, in figures; and from one place to another."""

from __future__ import annotations

import time
from collections import Counter
from typing import Literal, TypeAlias

from .._io import Progress
from .lookup import DamagedError
from .objects import Name
from .places.backend import Backend, Stored
from .results import Contents, Copied
from .upkeep import Tree, object_text

_Outcome: TypeAlias = Literal["written", "present", "damaged", "left out"]


def contents(backend: Backend, tree: Tree) -> Contents:
    """Count what is in a place.

    Raises:
        OSError: It cannot be read.
    """
    objects = list(backend.entries())
    entries = list(tree.entries())
    sizes: Counter[str] = Counter()
    for stored in objects:
        sizes[stored.name.kind] += stored.nbytes
    numbers = Counter(stored.name.kind for stored in objects)
    pins = (stored for stored in objects if stored.name.kind == "P")
    return Contents(
        backend.location,
        backend.used_bytes(),
        len(entries),
        len(objects),
        sizes.total(),
        {kind: (numbers[kind], sizes[kind]) for kind in sorted(numbers)},
        sum(pin.used > time.time() for pin in pins),
        dict(Counter(entry.namespace for entry in entries)),
        dict(Counter(entry.model for entry in entries)),
    )


def copy(tree: Tree, target: Backend, progress: Progress) -> Copied:
    """Copy what *target* does not have, verified; when each was used last goes with it.

    Args:
        tree: The chains of the place to copy from.
        target: The place to copy to.
        progress: Called with the bytes that were looked at, and all of them.

    Raises:
        OSError: A place cannot be read or written; what was copied until then is there.
    """
    objects = list(tree.objects())
    total = sum(stored.nbytes for stored in objects)
    rows: dict[bytes, Name] = {}  # of each key, what all else of it is of no use without
    outcomes: dict[_Outcome, list[Stored]] = {}
    looked_at = 0
    for stored in objects:
        progress(looked_at, total)
        looked_at += stored.nbytes
        name = stored.name
        needed = rows.get(name.key) or rows.get(name.parent)
        # It was not copied, or is evicted already.
        apart = needed is not None and not target.has(needed)
        outcome: _Outcome = "left out" if apart else _copied(tree, target, stored)
        outcomes.setdefault(outcome, []).append(stored)
        if name.kind in ("R", "N"):
            rows[name.key] = name
    progress(total, total)
    written = outcomes.get("written", [])
    return Copied(
        len(written),
        sum(stored.nbytes for stored in written),
        len(outcomes.get("present", [])),
        tuple(object_text(stored.name) for stored in outcomes.get("damaged", [])),
        len(outcomes.get("left out", [])),
    )


def _copied(tree: Tree, target: Backend, stored: Stored) -> _Outcome:
    """Copy an object, unless it is there."""
    name = stored.name
    if target.has(name):
        return "present"
    try:
        with tree.reader.whole(name) as (view, _):
            written = target.put(name, [view])
    except DamagedError as error:
        return "left out" if error.gone else "damaged"
    if not written:
        return "left out"
    target.touch([name], stored.used)
    return "written"
