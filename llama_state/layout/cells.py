"""Cell lists: decoded in bulk if each cell has one owner, one by one if cells are shared."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import FormatError, TruncatedError
from .blocks import Cells
from .cursor import Cursor
from .formats import MAX_POSITION, MAX_SEQUENCES

Decoded = tuple["array[int]", Mapping[int, Sequence[int]], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Ownership:
    """Which sequences can own the cells of a payload.

    Attributes:
        whole: Whether any can: the payload is that of a whole context.
        source: The only one that can, in the payload of a sequence; None if not known (yet).
        ownerless: Whether cells can have no owner: llama.cpp names none at or above n_seq_max.
    """

    whole: bool
    source: int | None = None
    ownerless: bool = False


def read_cells(
    cursor: Cursor, n_cell: int, ext_words: int, owner: int | None, *, ownerless: bool = False
) -> Cells:
    """Read the *n_cell* cells of a KV stream, which is not empty.

    Args:
        ext_words: See :class:`Cells`.
        owner: The only sequence id that may occur; None allows any, and shared cells.
        ownerless: Whether the cells may be those of no sequence.

    Raises:
        FormatError: A position, a sequence count or a sequence id that no cache can have.
    """
    if ownerless and _starts_ownerless(cursor):
        return _ownerless_cells(cursor, n_cell, ext_words)
    start, stride = cursor.at, 3 + ext_words
    cursor.require(4 * stride * n_cell, f"{n_cell} cells")
    words = array("i")
    words.frombytes(cursor.view[start : start + 4 * stride * n_cell])
    if words[1::stride] == array("i", [1]) * n_cell:
        cursor.at += 4 * stride * n_cell
        owners = _owners(words[stride - 1 :: stride])
        decoded: Decoded = words[0::stride], owners, range(start, cursor.at, 4 * stride)
    else:
        decoded = _shared_cells(cursor, n_cell, ext_words, alone=owner is not None)
    cells = Cells(*decoded, ext_words)
    check_positions(cells)
    _check_owners(cells, owner)
    return cells


def _starts_ownerless(cursor: Cursor) -> bool:
    cursor.require(8, "a cell")
    return not any(cursor.view[cursor.at + 4 : cursor.at + 8])


def _ownerless_cells(cursor: Cursor, n_cell: int, ext_words: int) -> Cells:
    start, stride = cursor.at, 2 + ext_words
    cursor.require(4 * stride * n_cell, f"{n_cell} cells")
    words = array("i")
    words.frombytes(cursor.view[start : start + 4 * stride * n_cell])
    if words[1::stride] != array("i", [0]) * n_cell:
        raise FormatError("some cells have an owner, some have none", offset=start)
    cursor.at += 4 * stride * n_cell
    cells = Cells(words[0::stride], {}, range(start, cursor.at, 4 * stride), ext_words)
    check_positions(cells)
    return cells


def check_positions(cells: Cells) -> None:
    """Raise FormatError unless every position is one that a token can have."""
    if min(cells.positions) >= 0 and max(cells.positions) <= MAX_POSITION:
        return
    for position, start in zip(cells.positions, cells.starts, strict=True):
        if not 0 <= position <= MAX_POSITION:
            raise FormatError(f"a cell at position {position}", offset=start)


def _owners(ids: array[int]) -> dict[int, Sequence[int]]:
    """Group the cells by owner: *ids* has the one owner of each."""
    if ids == array("i", ids[:1]) * len(ids):
        return {ids[0]: range(len(ids))}
    owners: defaultdict[int, array[int]] = defaultdict(lambda: array("i"))
    for index, seq_id in enumerate(ids):
        owners[seq_id].append(index)
    return dict(owners)


def _shared_cells(cursor: Cursor, n_cell: int, ext_words: int, *, alone: bool) -> Decoded:
    """Read the cells one by one; with *alone*, none may have several owners."""
    start = cursor.at
    words = cursor.view[start : start + (cursor.end - start) // 4 * 4].cast("i")
    positions, starts = array("i"), array("q")
    owners: defaultdict[int, array[int]] = defaultdict(lambda: array("i"))
    at = 0
    for index in range(n_cell):
        first = at + 2 + ext_words
        if first > len(words):
            raise _cut_off(cursor, start + 4 * first)
        count = words[at + 1]
        offset = start + 4 * at
        if not 1 <= count <= (1 if alone else MAX_SEQUENCES):
            raise FormatError(f"a cell of {count} sequences", offset=offset)
        positions.append(words[at])
        starts.append(offset)
        at = first + count
        if at > len(words):
            raise _cut_off(cursor, start + 4 * at)
        last = -1
        for seq_id in words[first:at]:
            if seq_id <= last:
                raise FormatError("sequence ids of a cell do not increase", offset=offset)
            owners[seq_id].append(index)
            last = seq_id
    cursor.at = start + 4 * at
    return positions, _ranges(owners, n_cell), starts


def _ranges(owners: Mapping[int, array[int]], n_cell: int) -> dict[int, Sequence[int]]:
    """Return *owners* with a range in place of the list of an owner of all cells."""
    return {
        seq_id: range(n_cell) if len(indices) == n_cell else indices
        for seq_id, indices in owners.items()
    }


def _check_owners(cells: Cells, owner: int | None) -> None:
    for seq_id, indices in cells.owners.items():
        if owner is not None and seq_id != owner:
            reason = f"a cell of sequence {seq_id} among those of sequence {owner}"
            raise FormatError(reason, offset=cells.starts[indices[0]])
        if not 0 <= seq_id < MAX_SEQUENCES:
            raise FormatError(f"a cell of sequence {seq_id}", offset=cells.starts[indices[0]])


def _cut_off(cursor: Cursor, need: int) -> TruncatedError:
    return TruncatedError("cells", need=need, have=cursor.end, offset=cursor.at)
