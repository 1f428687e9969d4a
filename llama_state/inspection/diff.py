"""Compare two states: fields, positions, and row by row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, isnan, sqrt
from typing import TYPE_CHECKING

from .._io.arguments import checked
from ..errors import Difference
from ..layout import UNKNOWN_ID, Cache, Layout, differences
from . import rotations, values
from .rows import Layer, Place, Tensor, layers, places, positions_by_sequence, row_bytes
from .statefile import StateFile, sound_layout
from .words import count, ranges

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_SAMPLE = 64
"""The rows of a layer that are tried to find a rotation."""
Pairs = dict["tuple[int, int]", list["tuple[int, int]"]]
"""(stream of a, stream of b) -> (row of a, row of b) for all rows of the same token."""


@dataclass(frozen=True, slots=True)
class PositionDifference:
    """The positions of a sequence that only one of two states has in a cache.

    Attributes:
        cache: The cache.
        seq_id: The sequence; None if the states do not name it.
        only_a: (first, last) of each run of positions that only the first state has.
        only_b: The same for the second state.
    """

    cache: str
    seq_id: int | None
    only_a: tuple[tuple[int, int], ...]
    only_b: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class RowDifference:
    """How the rows of one layer that both states have differ.

    Attributes:
        cache: The cache.
        name: "K", "V", "R", "P", "S" or "score".
        layer: Index of the layer in the cache.
        n_row: Rows that both states have.
        n_differ: Rows that differ.
        max_abs: The largest difference of two values; None if not computed: then only bytes were
            compared.
        relative: Norm of the difference over the norm of the first state's values, in the rows
            that differ; None if not computed.
        rotation: Values of the groups in which the rows of only one of the two were rotated, as
            their values show, which was undone; None if they were not or the values do not show it.
    """

    cache: str
    name: str
    layer: int
    n_row: int
    n_differ: int
    max_abs: float | None = None
    relative: float | None = None
    rotation: int | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        fields: Fields that differ: (name, value of a, value of b).
        positions: Positions that only one state has.
        rows: For each layer, how the rows that both have differ.
        moved: Number of rows that are in another cell, which is not a difference.
        computed: False if only bytes were compared, since numpy or gguf is missing.
    """

    fields: tuple[Difference, ...]
    positions: tuple[PositionDifference, ...]
    rows: tuple[RowDifference, ...]
    moved: int
    computed: bool

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        rows_differ = any(row.n_differ for row in self.rows)
        return not (self.fields or self.positions or rows_differ)

    def _repr_html_(self) -> str:
        """Return what differs as tables, for notebooks."""
        from .report import tables  # which shows what is compared here

        return tables(self)


@checked
def compare(a: StateFile, b: StateFile) -> Comparison:
    """Compare two states.

    Rows of the same sequence and position are compared, in whatever cells they are. If both states
    are of a single sequence, its id does not matter. Values are compared as they were before
    llama.cpp rotated them. Tensors are read piece by piece: the memory needed depends only on the
    number of cells.

    Raises:
        FormatError: One of the two is damaged.
    """
    ours, theirs = sound_layout(a), sound_layout(b)
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
        texts = [f"{count(len(file.tokens), 'token')}, {same:,} in common" for file in (a, b)]
        yield Difference("tokens", *texts)
    media = [_media_texts(file) for file in (a, b)]
    if a.has_tokens and b.has_tokens and media[0] != media[1]:
        yield Difference("media", *("; ".join(texts) or "none" for texts in media))
    moments = [_moments(file) for file in (a, b)]
    if moments[0] != moments[1]:
        yield Difference("restore points", *moments)
    elif n := _other_blobs(a, b):
        texts = [count(len(a.restore_points), "restore point"), f"{count(n, 'other blob')}"]
        yield Difference("restore points", *texts)
    names = [", ".join(cache.name for cache in layout.caches) for layout in (ours, theirs)]
    if ours.module == theirs.module and names[0] != names[1]:
        yield Difference("caches", *names)
    yield from differences(ours.geometry, theirs.geometry)


def _moments(file: StateFile) -> str:
    """Return a text for the moments of the restore points."""
    moments = [f"{point.n_tokens:,}" for point in file.restore_points]
    return f"after {', '.join(moments)} tokens" if moments else "none"


def _other_blobs(a: StateFile, b: StateFile) -> int:
    """Return how many restore points of the same moments have other bytes."""
    pairs = zip(a.restore_points, b.restore_points, strict=True)
    return sum(bytes(ours.blob) != bytes(theirs.blob) for ours, theirs in pairs)


def _media_texts(file: StateFile) -> list[str]:
    """Return a text for each image and sound in the prompt."""
    return [f"{chunk.kind or 'media'} {chunk.id or ''} at {chunk.start}" for chunk in file.media]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    differing = (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _positions(a: Cache, b: Cache, *, alone: bool) -> Iterator[PositionDifference]:
    ours, theirs = _positions_by_id(a, alone=alone), _positions_by_id(b, alone=alone)
    for seq_id in sorted(ours.keys() | theirs.keys()):
        only_a = ranges(ours[seq_id] - theirs[seq_id])
        only_b = ranges(theirs[seq_id] - ours[seq_id])
        if only_a or only_b:
            name = None if alone or seq_id == UNKNOWN_ID else seq_id
            yield PositionDifference(a.name, name, tuple(only_a), tuple(only_b))


def _positions_by_id(cache: Cache, *, alone: bool) -> defaultdict[int, set[int]]:
    """Return the positions of each sequence; with *alone*, those of the only one as those of 0."""
    by_id: defaultdict[int, set[int]] = defaultdict(set)
    for seq_id, positions in positions_by_sequence(cache.cells).items():
        by_id[0 if alone else seq_id].update(positions)
    return by_id


def _pairs(a: Cache, b: Cache, *, alone: bool) -> Pairs:
    """Return which rows are to be compared. A row that sequences share is in one pair only."""
    ours, theirs = places(a, alone=alone), places(b, alone=alone)
    matches: set[tuple[Place, Place]] = {
        (place, theirs[key]) for key, place in ours.items() if key in theirs
    }
    pairs: Pairs = defaultdict(list)
    for (stream_a, row_a), (stream_b, row_b) in sorted(matches):
        pairs[stream_a, stream_b].append((row_a, row_b))
    return pairs


def _same_layers(a: Cache, b: Cache) -> Iterator[tuple[Layer, Layer]]:
    """Yield the layers that both have."""
    theirs = {(layer.name, layer.index): layer for layer in layers(b)}
    for layer in layers(a):
        if other := theirs.get((layer.name, layer.index)):
            yield layer, other


def _compare_layer(
    a: memoryview, b: memoryview, cache: str, ours: Layer, theirs: Layer, pairs: Pairs
) -> RowDifference:
    """Compare the rows of a layer, piece by piece."""
    n_row = n_differ = 0
    worst, error, norm = 0.0, 0.0, 0.0
    decoded, rotation = True, None
    for (stream_a, stream_b), listed in pairs.items():
        x, y = ours.streams[stream_a], theirs.streams[stream_b]
        if x is None or y is None or x.n_value != y.n_value:
            continue
        decodable = values.can_decode(x) and values.can_decode(y)
        if not _stored_alike(x, y):
            if decodable:
                x, y, found = _unrotated(a, b, x, y, listed)
                rotation = found or rotation
            elif x.type_id == y.type_id and None in (x.rotation, y.rotation):
                x, y = replace(x, rotation=None), replace(y, rotation=None)
            else:
                continue
        n_row += len(listed)
        if not values.have_numpy():
            n_differ += sum(row_bytes(a, x, i) != row_bytes(b, y, j) for i, j in listed)
            decoded = False
            continue
        decoded &= decodable
        for piece in values.pieces(len(listed), max(x.row, y.row)):
            rows = listed[piece]
            differ, largest, *squares = _compare_piece(a, b, x, y, rows, decodable=decodable)
            n_differ += differ
            worst, error, norm = _larger(worst, largest), error + squares[0], norm + squares[1]
    difference = RowDifference(cache, ours.name, ours.index, n_row, n_differ, rotation=rotation)
    if not decoded:
        return difference
    relative = sqrt(error / norm) if norm else inf * error if error else 0.0
    return replace(difference, max_abs=worst, relative=relative)


def _stored_alike(x: Tensor, y: Tensor) -> bool:
    """Return whether rows of the same values have the same bytes, as far as the states say."""
    return (x.type_id, x.rotation) == (y.type_id, y.rotation)


def _unrotated(
    a: memoryview, b: memoryview, x: Tensor, y: Tensor, listed: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, int | None]:
    """Find how the rows of two tensors that are not stored alike were rotated.

    Returns:
        The tensors with the rotations found, and the size of the one that only one of them has;
        None if nothing was found: then they have the rotations that their states record.
    """
    import numpy as np

    sample = _sample(a, x, listed)
    recorded = x.rotation or 0, y.rotation or 0
    # What is quantized is rotated, not what it is compared with.
    first = (recorded[0], x.type.elements) > (recorded[1], y.type.elements)
    single = [(size, 0) if first else (0, size) for size in rotations.sizes(x.n_value)]
    with np.errstate(all="ignore"):
        ours = values.stored(values.rows_of(a, x, sample[:, 0]), x)
        theirs = values.stored(values.rows_of(b, y, sample[:, 1]), y)
        found = rotations.nearest(ours, theirs, dict.fromkeys([recorded, *single]))
    pair = found or recorded
    only = max(pair) if pair[0] != pair[1] else 0
    return replace(x, rotation=pair[0]), replace(y, rotation=pair[1]), only if found else None


def _sample(a: memoryview, x: Tensor, listed: Sequence[tuple[int, int]]) -> npt.NDArray[np.intp]:
    """Return the first pairs of rows that are not zero: texts that begin alike agree in them."""
    import numpy as np

    found = np.empty((0, 2), np.intp)
    for piece in values.pieces(len(listed), x.row):
        pairs = np.array(listed[piece], dtype=np.intp)
        filled = values.rows_of(a, x, pairs[:, 0]) != 0
        found = np.concatenate((found, pairs[filled.any(axis=1)]))
        if len(found) >= _SAMPLE:
            break
    return found[:_SAMPLE]


def _compare_piece(
    a: memoryview,
    b: memoryview,
    x: Tensor,
    y: Tensor,
    listed: Sequence[tuple[int, int]],
    *,
    decodable: bool,
) -> tuple[int, float, float, float]:
    """Compare some pairs of rows.

    Returns:
        The number of rows that differ, the largest difference of two values, and the squared norms
        of the difference and of the first state's values.
    """
    import numpy as np

    index = np.array(listed, dtype=np.intp)
    ours, theirs = values.rows_of(a, x, index[:, 0]), values.rows_of(b, y, index[:, 1])
    alike = _stored_alike(x, y)
    if alike:
        differ = (ours != theirs).any(axis=1)
        ours, theirs = ours[differ], theirs[differ]
        n_differ = int(differ.sum())
        if not decodable or not n_differ:
            return n_differ, 0.0, 0.0, 0.0
    with np.errstate(all="ignore"):
        first, second = values.decode(ours, x), values.decode(theirs, y)
        # A damaged cache can hold infinities and NaN: they are reported as such.
        difference = first - second
        if not alike:
            n_differ = int((first != second).any(axis=1).sum())
        worst = float(np.abs(difference).max(initial=0.0))
        error, norm = float(np.vdot(difference, difference)), float(np.vdot(first, first))
        return n_differ, worst, error, norm


def _larger(a: float, b: float) -> float:
    """Return the larger number, NaN if one of the two is NaN."""
    return a if isnan(a) or a > b else b
