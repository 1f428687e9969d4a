"""The rows of a state: where they are, and which sequence and position each belongs to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..layout import (
    TYPES,
    Block,
    Cache,
    Cells,
    Compressed,
    Compressor,
    KVCache,
    RecurrentCache,
    Stream,
    TensorType,
)

Key: TypeAlias = "tuple[int, ...]"
"""Sequence id, position, and the number of earlier cells of that sequence and position."""
Place: TypeAlias = "tuple[int, int]"
"""Stream, and row in the stream."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """The rows of one layer in one stream.

    Attributes:
        type_id: ggml type.
        row: Bytes of a row.
        n_row: Number of rows.
        offset: Where they start, in bytes from the start of the state.
        transposed: Whether the rows are columns: first value of all rows, then the second, ...
        rotation: Size of the groups that were rotated before they were stored, 0 for none; None
            where the state does not say.
    """

    type_id: int
    row: int
    n_row: int
    offset: int
    transposed: bool = False
    rotation: int | None = None

    @property
    def type(self) -> TensorType:
        """The ggml type."""
        return TYPES[self.type_id]

    @property
    def n_value(self) -> int:
        """Values of a row."""
        return self.type.values(self.row)


@dataclass(frozen=True, slots=True)
class Layer:
    """The rows of one layer of a cache.

    Attributes:
        name: "K", "V", "R", "P", "S" or "score".
        index: Of the layer, among those of the cache; in deepseek4, among those of the model.
        streams: Its rows in each stream; None for a stream without cells.
    """

    name: str
    index: int
    streams: tuple[Tensor | None, ...]


def places(cache: Cache, *, alone: bool) -> dict[Key, Place]:
    """Return the place of each row of a cache, by the token that it belongs to.

    Args:
        alone: The cache is that of a single sequence, whose id does not matter.
    """
    if isinstance(cache, (Compressed, Compressor)):
        if isinstance(cache, Compressed):
            n_row, blocks = cache.n_rows, cache.k
        else:
            n_row, blocks = cache.state_size, cache.kv
        if not any(block.nbytes for block in blocks):  # any number of rows of no bytes
            return {}
        return {(s, row): (s, row) for s in range(cache.n_stream) for row in range(n_row)}
    recurrent = isinstance(cache, RecurrentCache)
    return {
        key: (stream, row)
        for stream, cells in enumerate(cache.cells)
        for key, row in _keys(cells, alone=alone, recurrent=recurrent)
    }


def _keys(cells: Cells, *, alone: bool, recurrent: bool) -> Iterator[tuple[Key, int]]:
    for seq_id, indices in cells.owners.items():
        name = 0 if alone else seq_id
        seen: defaultdict[int, int] = defaultdict(int)
        for index in indices:
            if recurrent:  # the only state of a sequence, whatever its position
                yield (name,), index
                continue
            position = cells.positions[index]
            # The tokens of an image can have the same position.
            yield (name, position, seen[position]), index
            seen[position] += 1


def positions_by_sequence(streams: Iterable[Cells]) -> dict[int, list[int]]:
    """Return the positions of each sequence in all of *streams*, by increasing id."""
    positions: dict[int, list[int]] = {}
    for cells in streams:
        for seq_id in cells.owners:
            positions.setdefault(seq_id, []).extend(cells.positions_of(seq_id))
    return dict(sorted(positions.items()))


def layers(cache: Cache) -> Iterator[Layer]:
    """Yield the layers of a cache, all K before all V."""
    if isinstance(cache, KVCache):
        yield from _of_streams("K", [(s, s.k, False, s.n_rot_k) for s in cache.streams])
        yield from _of_streams("V", [(s, s.v, bool(s.v_trans), s.n_rot_v) for s in cache.streams])
    elif isinstance(cache, RecurrentCache):
        for name, blocks in (("R", cache.r), ("P", cache.p), ("S", cache.s)):
            for index, block in enumerate(blocks):
                yield Layer(name, index, (_tensor(block, len(cache.rows), rotation=0),))
    elif isinstance(cache, Compressed):
        yield from _numbered("K", cache.layers, cache.k, cache.n_stream, cache.n_rows)
    else:
        sizes = cache.n_stream, cache.state_size
        yield from _numbered("K", cache.layers, cache.kv, *sizes)
        yield from _numbered("score", cache.layers, cache.score, *sizes)


def _of_streams(
    name: str, streams: Sequence[tuple[Stream, Sequence[Block], bool, int | None]]
) -> Iterator[Layer]:
    for index in range(max(len(blocks) for _, blocks, *_ in streams)):
        yield Layer(
            name,
            index,
            tuple(
                _tensor(blocks[index], len(stream.cells), transposed, rotation) if blocks else None
                for stream, blocks, transposed, rotation in streams
            ),
        )


def _numbered(
    name: str, ids: Sequence[int], blocks: Sequence[Block], n_stream: int, n_row: int
) -> Iterator[Layer]:
    for index, block in zip(ids, blocks, strict=True):
        starts = (block.offset + s * n_row * block.row for s in range(n_stream))
        yield Layer(
            name, index, tuple(Tensor(block.type_id, block.row, n_row, at) for at in starts)
        )


def _tensor(
    block: Block, n_row: int, transposed: bool = False, rotation: int | None = None
) -> Tensor:
    return Tensor(block.type_id, block.row, n_row, block.offset, transposed, rotation)


def row_bytes(state: memoryview, tensor: Tensor, row: int) -> bytes:
    """Return one row."""
    if not tensor.transposed:
        start = tensor.offset + row * tensor.row
        return bytes(state[start : start + tensor.row])
    step = tensor.type.nbytes
    first, end = tensor.offset + row * step, tensor.offset + tensor.n_row * tensor.row
    stride = tensor.n_row * step
    return b"".join(state[at : at + step] for at in range(first, end, stride))
