"""Recurrent caches. The number of their blocks is not recorded: the rest of the payload decides."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from struct import Struct

from ..errors import FormatError
from .blocks import UNKNOWN_ID, Block, Cells, RecurrentCache
from .cells import Ownership, check_positions
from .cursor import Cursor
from .formats import F32, MAX_LAYERS, MAX_SEQUENCES
from .kv import ROW_HEAD, read_rows

CELL = Struct("<iI")
ROW_SIZE = Struct("<Q")


def recurrent_readings(
    cursor: Cursor, name: str, ownership: Ownership, *, alone: bool, ngrams: bool, last: bool
) -> Iterator[RecurrentCache]:
    """Yield every reading of a recurrent cache, by increasing number of recurrent layers.

    The place of the cursor afterwards is undefined: continue at the reading's ``offset + nbytes``.

    Args:
        alone: Whether the model has no other memory: then all its layers are recurrent.
        ngrams: Whether layers of this model can have n-gram states.
        last: Whether the payload must end with this cache.
    """
    offset = cursor.at
    cells = _read_cells(cursor, ownership)
    tail = cursor.at
    if transposed := cursor.u32("S layout"):
        raise FormatError(f"S layout {transposed}", offset=tail)
    n_layer = cursor.u32("layer count")
    for r, p, s_offset in _leading_blocks(cursor, len(cells), n_layer, ngrams):
        if alone and len(r) != n_layer:
            continue
        s = _trailing_blocks(cursor, s_offset, len(cells), len(r), last)
        if s is not None:
            nbytes = cursor.at - offset
            yield RecurrentCache(name, offset, nbytes, cells, tail, n_layer, tuple(r), tuple(p), s)


def _leading_blocks(
    cursor: Cursor, n_cell: int, n_layer: int, ngrams: bool
) -> Iterator[tuple[list[Block], list[Block], int]]:
    """Yield the first R blocks, their P blocks, and where they end: one R block, then two, ...

    All R blocks are alike. The lists that are yielded are the same ones each time, grown by one.
    """
    r: list[Block] = []
    p: list[Block] = []
    at = cursor.at
    while len(r) < min(n_layer, MAX_LAYERS) and (block := _block_at(cursor, at, n_cell, r)):
        r.append(block)
        if ngrams and _at_ngrams(cursor):
            p.append(_read_ngrams(cursor, n_cell, p))
        at = cursor.at
        yield r, p, at


def _trailing_blocks(
    cursor: Cursor, at: int, n_cell: int, count: int, last: bool
) -> tuple[Block, ...] | None:
    """Read *count* blocks that are alike and leave the cursor after them.

    Returns:
        The blocks; None if there are no such blocks or, with *last*, if the payload does not
        end with them.
    """
    blocks: list[Block] = []
    cursor.at = at
    while len(blocks) < count and (block := _block_at(cursor, cursor.at, n_cell, blocks)):
        if last and at + count * (ROW_HEAD.size + block.nbytes) != cursor.end:
            return None
        blocks.append(block)
    return tuple(blocks) if len(blocks) == count else None


def _block_at(cursor: Cursor, at: int, n_cell: int, before: Sequence[Block]) -> Block | None:
    """Read the block at *at*; return None if there is none that is like those *before* it."""
    cursor.at = at
    try:
        block = read_rows(cursor, n_cell, "recurrent block")
    except FormatError:
        return None
    if before and (block.type_id, block.row) != (before[0].type_id, before[0].row):
        return None
    return block


def _at_ngrams(cursor: Cursor) -> bool:
    """Return whether the next block is an n-gram block, not an R or S block.

    R and S blocks start with their type, f32, which is 0; an n-gram block with its row size.
    """
    head = cursor.view[cursor.at : cursor.at + 4]
    return len(head) == 4 and any(head)


def _read_ngrams(cursor: Cursor, n_cell: int, before: Sequence[Block]) -> Block:
    offset = cursor.at
    (row,) = cursor.read(ROW_SIZE, "n-gram row size")
    if before and row != before[0].row:
        raise FormatError("n-gram rows of different sizes", offset=offset)
    return Block(F32, row, cursor.skip(n_cell * row, "n-gram rows"), n_cell * row)


def _read_cells(cursor: Cursor, ownership: Ownership) -> Cells:
    """Read the cells: of a whole payload with their owners, of a sequence at most one, without."""
    offset = cursor.at
    n_cell = cursor.u32("recurrent cell count")
    if n_cell > (MAX_SEQUENCES if ownership.whole else 1):
        raise FormatError(f"{n_cell} recurrent cells", offset=offset)
    positions, starts, owners = array("i"), array("q"), dict[int, Sequence[int]]()
    for index in range(n_cell):
        start = cursor.at
        position, count = cursor.read(CELL, "recurrent cell")
        if not (1 <= count <= MAX_SEQUENCES if ownership.whole else count == 0):
            raise FormatError(f"a recurrent cell of {count} sequences", offset=start)
        for seq_id in cursor.read(Struct(f"<{count}i"), "sequence ids"):
            if not 0 <= seq_id < MAX_SEQUENCES or seq_id in owners:
                reason = f"sequence {seq_id} cannot own this recurrent cell"
                raise FormatError(reason, offset=start)
            owners[seq_id] = range(index, index + 1)
        positions.append(position)
        starts.append(start)
    if n_cell and not ownership.whole:
        owners[UNKNOWN_ID if ownership.source is None else ownership.source] = range(1)
    cells = Cells(positions, owners, starts)
    if n_cell:
        check_positions(cells)
    return cells
