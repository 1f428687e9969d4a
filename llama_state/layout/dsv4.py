"""What only the states of deepseek4 have: a head, compressed K caches, running compressors."""

from __future__ import annotations

from struct import Struct

from ..errors import FormatError
from .blocks import Block, Compressed, Compressor
from .cursor import U32, Cursor
from .formats import DSV4_MAGIC, MAX_SEQUENCES, TYPES, check_layers, check_row
from .traits import Module

HEAD = Struct("<III")
COMPRESSED_HEAD = Struct("<IIII")
COMPRESSOR_HEAD = Struct("<IIIIII")
TENSOR_HEAD = Struct("<iQQQ")
LAYER_BYTES = 4 + TENSOR_HEAD.size


def read_head(cursor: Cursor, *, partial: bool) -> None:
    """Read the head of a deepseek4 payload."""
    offset = cursor.at
    magic, version, mode = cursor.read(HEAD, "deepseek4 head")
    if magic != DSV4_MAGIC:
        raise FormatError("not a deepseek4 payload", offset=offset)
    if version != 1:
        raise FormatError(f"version {version} of a deepseek4 payload", offset=offset + 4)
    if mode != int(partial):
        actual, expected = ("partial", "full") if mode else ("full", "partial")
        raise FormatError(f"a {actual} deepseek4 payload, not a {expected} one", offset=offset + 8)


def refuse_head(cursor: Cursor, module: Module) -> None:
    """Raise FormatError where a deepseek4 payload begins: as *module* it would be numbers."""
    head = cursor.view[cursor.at : cursor.at + U32.size]
    if head == U32.pack(DSV4_MAGIC):
        raise FormatError(f"a deepseek4 payload, not one of {module} memory", offset=cursor.at)


def read_compressed(cursor: Cursor, name: str, n_stream: int | None) -> Compressed:
    """Read a compressed K cache.

    Args:
        n_stream: The stream count that it must have; None allows any.
    """
    offset = cursor.at
    version, n_rows, streams, n_layer = cursor.read(COMPRESSED_HEAD, name)
    if version not in (1, 2):
        raise FormatError(f"{name}: version {version}", offset=offset)
    _check_streams(streams, n_stream, name, offset + 8)
    check_layers(n_layer, name, offset)
    cursor.require(n_layer * LAYER_BYTES, f"{name}: {n_layer} layers")
    layers: list[int] = []
    k: list[Block] = []
    for _ in range(n_layer):
        layers.append(cursor.u32("layer id"))
        k.append(_read_tensor(cursor, name, n_rows, streams))
    return Compressed(name, offset, cursor.at - offset, n_rows, streams, tuple(layers), tuple(k))


def read_compressor(cursor: Cursor, name: str, n_stream: int | None) -> Compressor:
    """Read the running state of a compressor; *n_stream* as in :func:`read_compressed`."""
    offset = cursor.at
    version, *settings, streams, n_layer = cursor.read(COMPRESSOR_HEAD, name)
    if version != 1:
        raise FormatError(f"{name}: version {version}", offset=offset)
    _check_streams(streams, n_stream, name, offset + 16)
    ratio, state_size, n_embd = settings
    check_layers(n_layer, name, offset)
    cursor.require(n_layer * LAYER_BYTES, f"{name}: {n_layer} layers")
    layers: list[int] = []
    kv: list[Block] = []
    score: list[Block] = []
    for _ in range(n_layer):
        layers.append(cursor.u32("layer id"))
        kv.append(_read_tensor(cursor, name, state_size, streams))
        score.append(_read_tensor(cursor, name, state_size, streams))
    blocks = tuple(layers), tuple(kv), tuple(score)
    nbytes = cursor.at - offset
    return Compressor(name, offset, nbytes, ratio, state_size, n_embd, streams, *blocks)


def _check_streams(n_stream: int, expected: int | None, name: str, offset: int) -> None:
    if not 1 <= n_stream <= MAX_SEQUENCES or (expected is not None and n_stream != expected):
        raise FormatError(f"{name}: {n_stream} streams", offset=offset)


def _read_tensor(cursor: Cursor, what: str, n_rows: int, n_stream: int) -> Block:
    offset = cursor.at
    type_id, width, rows, row = cursor.read(TENSOR_HEAD, what)
    check_row(type_id, row, what, offset)
    if rows != n_rows:
        raise FormatError(f"{what}: {rows} rows instead of {n_rows}", offset=offset)
    if TYPES[type_id].values(row) != width:
        raise FormatError(f"{what}: {row} bytes for {width} values", offset=offset)
    nbytes = n_stream * rows * row
    return Block(type_id, row, cursor.skip(nbytes, what), nbytes)
