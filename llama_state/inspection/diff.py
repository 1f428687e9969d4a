"""How two states differ: in fields, in positions, and row by row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt

from ..errors import Difference, FormatError
from ..layout import UNKNOWN_ID, Cache, KVCache, Layout, MediaChunk, differences
from . import values
from .rows import Layer, Place, Tensor, layers, places, row_bytes
from .statefile import StateFile, raised
from .words import count, ranges

Pairs = dict["tuple[int, int]", list["tuple[int, int]"]]
"""(stream of a, stream of b) -> (row of a, row of b) of all rows that belong together."""


@dataclass(frozen=True, slots=True)
class PositionDifference:
    """The positions of a sequence that only one of two states has in a cache.

    Attributes:
        cache: The cache.
        seq_id: The sequence; None where the states do not name it.
        only_a: (first, last) of each run of positions that only the first state has.
        only_b: Likewise of the second.
    """

    cache: str
    seq_id: int | None
    only_a: tuple[tuple[int, int], ...]
    only_b: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class RowDifference:
    """How the rows of one layer differ that both states have.

    Attributes:
        cache: The cache.
        name: "K", "V", "R", "P", "S" or "score".
        layer: Index of the layer in the cache.
        n_row: Rows that both states have.
        n_differ: Those that differ.
        max_abs: The largest difference of two values; None where not computed: the two are
            then known to differ in their bytes.
        relative: Norm of the difference over the norm of the first state's values, in the
            rows that differ; None where not computed.
    """

    cache: str
    name: str
    layer: int
    n_row: int
    n_differ: int
    max_abs: float | None = None
    relative: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        fields: Properties in which the two differ: (name, of a, of b).
        positions: Positions that only one has.
        rows: Of each layer, how the rows that both have differ.
        moved: Rows that are in another cell; that is no difference.
        computed: False where only bytes were compared, since numpy or gguf is missing.
    """

    fields: tuple[Difference, ...]
    positions: tuple[PositionDifference, ...]
    rows: tuple[RowDifference, ...]
    moved: int
    computed: bool

    @property
    def equal(self) -> bool:
        """True when nothing differs."""
        differ = any(row.n_differ for row in self.rows)
        return not (self.fields or self.positions or differ)


def compare(a: StateFile, b: StateFile) -> Comparison:
    """Compare two states.

    Rows are those of the same sequence and position, in whatever cells they are; two states of
    single sequences are compared whatever the ids of the sequences. Tensors are read a piece at
    a time: what it takes of memory depends on the number of cells only.

    Raises:
        FormatError: One of the two is damaged.
    """
    ours, theirs = _sound(a), _sound(b)
    alone = ours.kind == theirs.kind == "sequence"
    positions: list[PositionDifference] = []
    rows: list[RowDifference] = []
    moved = 0
    for cache, other in _same_caches(ours, theirs):
        positions += _positions(cache, other, alone=alone)
        pairs = _pairs(cache, other, alone=alone)
        moved += sum(x != y for listed in pairs.values() for x, y in listed)
        for x, y in _same_layers(cache, other):
            row = _compare_layer(a.state, b.state, cache.name, x, y, pairs)
            if row.n_row:
                rows.append(row)
    computed = all(row.max_abs is not None for row in rows if row.n_differ)
    fields = tuple(_fields(a, b, ours, theirs))
    return Comparison(fields, tuple(positions), tuple(rows), moved, computed)


def _sound(found: StateFile) -> Layout:
    if found.problem is not None:
        raise raised(found.problem)
    if found.layout is None:
        raise FormatError("no state")
    return found.layout


def _same_caches(a: Layout, b: Layout) -> Iterator[tuple[Cache, Cache]]:
    others = {cache.name: cache for cache in b.caches}
    for cache in a.caches:
        other = others.get(cache.name)
        if type(other) is type(cache):
            yield cache, other


def _fields(a: StateFile, b: StateFile, ours: Layout, theirs: Layout) -> Iterator[Difference]:
    if ours.kind != theirs.kind:
        yield Difference("kind", ours.kind, theirs.kind)
    if not set(a.session_versions) & set(b.session_versions):
        yield Difference("session version", ours.version, theirs.version)
    if None not in (ours.source, theirs.source) and ours.source != theirs.source:
        yield Difference("sequence", ours.source, theirs.source)
    if a.has_tokens and b.has_tokens and a.tokens != b.tokens:
        same = _common(a.tokens, b.tokens)
        told = [f"{count(len(one.tokens), 'token')}, {same:,} in common" for one in (a, b)]
        yield Difference("tokens", *told)
    media = [one.slot.media if one.slot else () for one in (a, b)]
    if a.has_tokens and b.has_tokens and _named(media[0]) != _named(media[1]):
        yield Difference("media", *("; ".join(_named(chunks)) or "none" for chunks in media))
    names = [", ".join(cache.name for cache in one.caches) for one in (ours, theirs)]
    if ours.module == theirs.module and names[0] != names[1]:
        yield Difference("caches", *names)
    yield from differences(ours.geometry, theirs.geometry)


def _named(media: Sequence[MediaChunk]) -> list[str]:
    """Return what is known of images and sounds, one text each."""
    return [f"{one.kind or 'media'} {one.id or ''} at {one.start}" for one in media]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many items the two start with alike."""
    unlike = (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unlike, min(len(a), len(b)))


def _positions(a: Cache, b: Cache, *, alone: bool) -> Iterator[PositionDifference]:
    ours, theirs = _positions_by_id(a, alone=alone), _positions_by_id(b, alone=alone)
    for seq_id in sorted(ours.keys() | theirs.keys()):
        only_a = ranges(ours[seq_id] - theirs[seq_id])
        only_b = ranges(theirs[seq_id] - ours[seq_id])
        if only_a or only_b:
            name = None if alone or seq_id == UNKNOWN_ID else seq_id
            yield PositionDifference(a.name, name, tuple(only_a), tuple(only_b))


def _positions_by_id(cache: Cache, *, alone: bool) -> defaultdict[int, set[int]]:
    found: defaultdict[int, set[int]] = defaultdict(set)
    for cells in cache.cells:
        for seq_id in cells.owners:
            found[0 if alone else seq_id].update(cells.positions_of(seq_id))
    return found


def _pairs(a: Cache, b: Cache, *, alone: bool) -> Pairs:
    """Return which rows belong together; a row of several sequences counts once."""
    ours, theirs = places(a, alone=alone), places(b, alone=alone)
    found: set[tuple[Place, Place]] = {
        (place, theirs[key]) for key, place in ours.items() if key in theirs
    }
    pairs: Pairs = defaultdict(list)
    for (stream_a, row_a), (stream_b, row_b) in sorted(found):
        pairs[stream_a, stream_b].append((row_a, row_b))
    return pairs


def _same_layers(a: Cache, b: Cache) -> Iterator[tuple[Layer, Layer]]:
    """Yield the layers of both, unless their values cannot be compared."""
    theirs = {(layer.name, layer.index): layer for layer in layers(b)}
    for layer in layers(a):
        other = theirs.get((layer.name, layer.index))
        if other and not _rotated_apart(a, b, layer.name):
            yield layer, other


def _rotated_apart(a: Cache, b: Cache, name: str) -> bool:
    """Tell whether rows called *name* were rotated in different ways before they were stored."""
    if not (isinstance(a, KVCache) and isinstance(b, KVCache)):
        return False
    field = f"n_rot_{name.lower()}"
    found = {getattr(stream, field) for stream in (*a.streams, *b.streams)}
    return len(found - {None}) > 1


def _compare_layer(
    a: memoryview, b: memoryview, cache: str, ours: Layer, theirs: Layer, pairs: Pairs
) -> RowDifference:
    """Compare the rows of a layer, a piece at a time."""
    n_row = n_differ = 0
    worst, error, norm = 0.0, 0.0, 0.0
    decoded = True
    for (stream_a, stream_b), listed in pairs.items():
        x, y = ours.streams[stream_a], theirs.streams[stream_b]
        if x is None or y is None or x.n_value != y.n_value:
            continue
        decodable = values.can_decode(x) and values.can_decode(y)
        if not decodable and x.type_id != y.type_id:
            continue
        n_row += len(listed)
        if not values.have_numpy():
            n_differ += sum(row_bytes(a, x, i) != row_bytes(b, y, j) for i, j in listed)
            decoded = False
            continue
        decoded &= decodable
        for piece in values.pieces(len(listed), max(x.row, y.row)):
            part = _compare_piece(a, b, x, y, listed[piece], decodable=decodable)
            n_differ += part[0]
            worst, error, norm = _larger(worst, part[1]), error + part[2], norm + part[3]
    found = RowDifference(cache, ours.name, ours.index, n_row, n_differ)
    if not decoded:
        return found
    relative = sqrt(error / norm) if norm else inf * error if error else 0.0
    return replace(found, max_abs=worst, relative=relative)


def _compare_piece(
    a: memoryview,
    b: memoryview,
    x: Tensor,
    y: Tensor,
    listed: Sequence[tuple[int, int]],
    *,
    decodable: bool,
) -> tuple[int, float, float, float]:
    """Return of some pairs of rows: how many differ, the largest difference, squares of norms."""
    import numpy as np

    index = np.array(listed, dtype=np.intp)
    ours, theirs = values.rows_of(a, x, index[:, 0]), values.rows_of(b, y, index[:, 1])
    if x.type_id == y.type_id:
        differ = (ours != theirs).any(axis=1)
        ours, theirs = ours[differ], theirs[differ]
        n_differ = int(differ.sum())
        if not decodable or not n_differ:
            return n_differ, 0.0, 0.0, 0.0
    with np.errstate(all="ignore"):
        first, second = values.decode(ours, x), values.decode(theirs, y)
        # Infinities and what is no number are legal in a damaged cache: they are told as such.
        apart = first - second
        if x.type_id != y.type_id:
            n_differ = int((first != second).any(axis=1).sum())
        worst = float(np.abs(apart).max(initial=0.0))
        return n_differ, worst, float(np.vdot(apart, apart)), float(np.vdot(first, first))


def _larger(a: float, b: float) -> float:
    """Return the larger number; what is no number is larger than any."""
    return a if a != a or a > b else b
