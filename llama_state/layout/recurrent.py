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
from .kv import read_rows

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
    blocks = _Blocks(cursor, len(cells))
    for r, p, s_offset in _leading_blocks(cursor, blocks, len(cells), n_layer, ngrams):
        if alone and len(r) != n_layer:
            continue
        s = blocks.run(s_offset, len(r), last=last)
        if s is not None:
            nbytes = s[-1].end - offset
            yield RecurrentCache(name, offset, nbytes, cells, tail, n_layer, tuple(r), tuple(p), s)


class _Blocks:
    """The R and S blocks of a payload by their offsets.

    What is an S block in one reading is an R block in another. So that the work does not grow with
    the number of readings, each run of blocks is gone through once.

    Args:
        n_cell: The number of rows of each.
    """

    def __init__(self, cursor: Cursor, n_cell: int) -> None:
        self._cursor = cursor
        self._n_cell = n_cell
        self._runs: dict[int, tuple[list[Block], int]] = {}

    def at(self, offset: int, like: Block | None = None) -> Block | None:
        """Return the block at *offset*; None if there is none that is *like* another."""
        self._cursor.at = offset
        try:
            found = read_rows(self._cursor, self._n_cell, "recurrent block")
        except FormatError:
            return None
        if like and (found.type_id != like.type_id or found.row != like.row):
            return None
        return found

    def run(self, offset: int, count: int, *, last: bool) -> tuple[Block, ...] | None:
        """Return the *count* blocks from *offset* on, which are alike.

        Returns:
            None if there are no such blocks or, with *last*, if the payload does not end with them.
        """
        blocks, first = self._runs.get(offset) or self._go_through(offset)
        found = tuple(blocks[first : first + count])
        if len(found) < count or (last and found[-1].end != self._cursor.end):
            return None
        return found

    def _go_through(self, offset: int) -> tuple[list[Block], int]:
        """Return the blocks from *offset* on that are alike, and 0: the index of the first.

        No more than as many as the layers of a model have: R blocks and as many S blocks.
        """
        run: list[Block] = []
        while len(run) < 2 * MAX_LAYERS and (block := self.at(offset, run[0] if run else None)):
            if offset in self._runs:  # the rest is known
                others, index = self._runs[offset]
                run += others[index:]
                break
            self._runs[offset] = run, len(run)
            run.append(block)
            offset = block.end
        return run, 0


def _leading_blocks(
    cursor: Cursor, blocks: _Blocks, n_cell: int, n_layer: int, ngrams: bool
) -> Iterator[tuple[list[Block], list[Block], int]]:
    """Yield the first R blocks, their P blocks, and where they end: one R block, then two, ...

    All R blocks are alike. The lists that are yielded are the same ones each time, grown by one.
    """
    r: list[Block] = []
    p: list[Block] = []
    at = cursor.at
    while len(r) < min(n_layer, MAX_LAYERS) and (block := blocks.at(at, r[0] if r else None)):
        r.append(block)
        cursor.at = block.end
        if ngrams and _at_ngrams(cursor):
            p.append(_read_ngrams(cursor, n_cell, p))
        at = cursor.at
        yield r, p, at


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
