"""Attention caches: streams of cells, then the K rows of all layers, then the V rows."""

from __future__ import annotations

from contextlib import suppress
from struct import Struct
from typing import Any

from ..errors import FormatError
from .blocks import Block, Cells, KVCache, Stream
from .cells import Ownership, read_cells
from .cursor import U32, Cursor
from .formats import MAX_SEQUENCES, check_layers, check_row, tensor_type

ROW_HEAD = Struct("<iQ")
TRANSPOSED_HEAD = Struct("<iII")
MIN_ROTATION = 64


def read_kv(
    cursor: Cursor, name: str, ownership: Ownership, *, version: int, ext_words: int, k_only: bool
) -> KVCache:
    """Read a KV cache.

    Args:
        version: Session version.
        ext_words: See :class:`~.blocks.Cells`.
        k_only: Whether this cache stores no V.
    """
    offset = cursor.at
    n_stream = _read_stream_count(cursor)
    streams: list[Stream] = []
    for index in range(n_stream):
        start = cursor.at
        cells = _read_stream_cells(cursor, ownership, index if n_stream > 1 else None, ext_words)
        if n_cell := len(cells):
            tail = cursor.at
            settings = _read_settings(cursor, n_cell, version=version, k_only=k_only)
            streams.append(Stream(start, cursor.at - start, cells, tail, *settings))
        else:
            streams.append(Stream(start, cursor.at - start))
    _check_streams(streams, ownership)
    return KVCache(name, offset, cursor.at - offset, tuple(streams))


def read_leading_cells(
    cursor: Cursor, ownership: Ownership, *, version: int, ext_words: int, k_only: bool
) -> tuple[Cells, ...]:
    """Read the cells of a KV cache, stream by stream, up to the first that cannot be read."""
    cells: list[Cells] = []
    n_stream = _read_stream_count(cursor)
    with suppress(FormatError):
        for index in range(n_stream):
            stream = index if n_stream > 1 else None
            cells.append(_read_stream_cells(cursor, ownership, stream, ext_words))
            if n_cell := len(cells[-1]):
                _read_settings(cursor, n_cell, version=version, k_only=k_only)
    return tuple(cells)


def _read_stream_count(cursor: Cursor) -> int:
    offset = cursor.at
    n_stream = cursor.u32("stream count")
    if not 1 <= n_stream <= MAX_SEQUENCES:
        raise FormatError(f"a cache of {n_stream} streams", offset=offset)
    return n_stream


def _read_stream_cells(
    cursor: Cursor, ownership: Ownership, stream: int | None, ext_words: int
) -> Cells:
    """Read the cells of a stream; *stream* is its index, None if it is the only one."""
    if n_cell := cursor.u32("cell count"):
        owner = _owner(cursor, ownership, stream, ext_words)
        return read_cells(cursor, n_cell, ext_words, owner, ownerless=ownership.ownerless)
    return Cells()


def _owner(cursor: Cursor, ownership: Ownership, stream: int | None, ext_words: int) -> int | None:
    """Return the only sequence that can own the cells at the cursor, None if any can."""
    if ownership.whole:
        return stream
    if ownership.source is not None:
        return ownership.source
    # Nothing before the cells names their owner: it must be that of the first for all.
    first_id = 4 * (2 + ext_words)
    cursor.require(first_id + U32.size, "cells")
    owner: int = U32.unpack_from(cursor.view, cursor.at + first_id)[0]
    return owner


def _read_settings(cursor: Cursor, n_cell: int, *, version: int, k_only: bool) -> tuple[Any, ...]:
    """Read what follows the cells and return the fields of Stream from v_trans on."""
    offset = cursor.at
    v_trans = cursor.u32("V layout")
    if v_trans > 1:
        raise FormatError(f"V layout {v_trans}", offset=offset)
    n_layer = cursor.u32("layer count")
    check_layers(n_layer, "cache", offset + U32.size)
    rotations = (_read_rotation(cursor), _read_rotation(cursor)) if version >= 11 else (None, None)
    cursor.require(n_layer * ROW_HEAD.size, f"{n_layer} layers")
    k = tuple(read_rows(cursor, n_cell, "K") for _ in range(n_layer))
    read_v = _read_transposed if v_trans else read_rows
    v = () if k_only else tuple(read_v(cursor, n_cell, "V") for _ in range(n_layer))
    return bool(v_trans), n_layer, *rotations, k, v


def _read_rotation(cursor: Cursor) -> int:
    offset = cursor.at
    size = cursor.u32("rotation size")
    if size and (size < MIN_ROTATION or size & (size - 1)):
        raise FormatError(f"rotation size {size}", offset=offset)
    return size


def read_rows(cursor: Cursor, n_row: int, what: str) -> Block:
    """Read a block in which the rows follow one another."""
    offset = cursor.at
    type_id, row = cursor.read(ROW_HEAD, what)
    check_row(type_id, row, what, offset)
    nbytes = n_row * row
    return Block(type_id, row, cursor.skip(nbytes, what), nbytes)


def _read_transposed(cursor: Cursor, n_cell: int, what: str) -> Block:
    """Read a transposed block: for each element of a row, the elements of all cells."""
    offset = cursor.at
    type_id, element, n_embd = cursor.read(TRANSPOSED_HEAD, what)
    kind = tensor_type(type_id, what, offset)
    if kind.elements != 1 or kind.nbytes != element:
        raise FormatError(f"{what}: elements of {element} bytes in {kind.name}", offset=offset)
    nbytes = n_cell * element * n_embd
    return Block(type_id, element * n_embd, cursor.skip(nbytes, what), nbytes)


def _settings_of(stream: Stream) -> tuple[Any, ...]:
    """Return the settings, which are equal in all streams of a cache that have cells."""
    rows = tuple(tuple((b.type_id, b.row) for b in blocks) for blocks in (stream.k, stream.v))
    return stream.v_trans, stream.n_layer, stream.n_rot_k, stream.n_rot_v, *rows


def _check_streams(streams: list[Stream], ownership: Ownership) -> None:
    filled = [stream for stream in streams if len(stream.cells)]
    for stream in filled[1:]:
        if not ownership.whole:
            reason = "the state of one sequence has cells in several streams"
            raise FormatError(reason, offset=stream.offset)
        if _settings_of(stream) != _settings_of(filled[0]):
            raise FormatError("streams of one cache differ in settings", offset=stream.offset)
