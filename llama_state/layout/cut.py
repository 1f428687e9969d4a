"""Cut the state of one sequence out of the state of a whole context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

from .._io.arguments import checked
from ..errors import SequenceIdError
from .blocks import Block, Cache, Compressed, Compressor, KVCache, RecurrentCache, Stream
from .cursor import U32, open_view
from .dsv4 import COMPRESSED_HEAD, COMPRESSOR_HEAD, HEAD, TENSOR_HEAD
from .formats import DSV4_MAGIC, MAX_SEQUENCES, TYPES
from .spans import NO_SPAN
from .state import Layout

if TYPE_CHECKING:
    from .._io import Buffer

Pieces: TypeAlias = "Iterator[memoryview | bytes]"
Runs: TypeAlias = "Sequence[tuple[int, int]]"


@checked
def sequence_from_whole(data: Buffer, layout: Layout, seq_id: int) -> bytes:
    """Return the payload of *seq_id*, without head, as a sequence save would have written it.

    The one difference: a sequence save omits the cells of a sliding-window cache that are
    outside the window. Here they stay.

    Args:
        data: The state of a whole context.
        layout: The result of :func:`parse_whole` for *data*.
        seq_id: A sequence of it. One without cells has the payload of an empty sequence.

    Raises:
        SequenceIdError: No context has such a sequence, or not the one of a deepseek4 state.
    """
    return b"".join(sequence_pieces(data, layout, seq_id))


def sequence_pieces(
    data: Buffer, layout: Layout, seq_id: int, n_stream: int | None = None
) -> list[memoryview | bytes]:
    """Return the pieces of :func:`sequence_from_whole`, which refer to *data*.

    Args:
        n_stream: Streams that its KV caches are to have; None: as many as in *data*.
    """
    if not 0 <= seq_id < MAX_SEQUENCES:
        raise SequenceIdError(seq_id, limit=MAX_SEQUENCES)
    return list(_pieces(open_view(data), layout, seq_id, n_stream))


def _pieces(view: memoryview, layout: Layout, seq_id: int, n_stream: int | None) -> Pieces:
    if layout.module == "dsv4":
        yield HEAD.pack(DSV4_MAGIC, 1, 0)
    for cache in layout.caches:
        if isinstance(cache, KVCache):
            streams = cache.streams
            if n_stream is not None:
                own = [stream for stream in streams if seq_id in stream.cells.owners]
                streams = (*own, *[Stream(0, 0)] * (n_stream - len(own)))
            yield U32.pack(len(streams))
            for stream in streams:
                yield from _stream(view, stream, seq_id)
        elif isinstance(cache, RecurrentCache):
            yield from _recurrent(view, cache, seq_id)
        elif isinstance(cache, Compressed):
            n_past = layout.base_spans.get(seq_id, NO_SPAN).last + 1
            ratio = ratio_of(layout.caches, cache) or 1
            yield from _compressed(view, cache, seq_id, n_past // ratio)
        else:
            yield from _compressor(view, cache, seq_id)


def _stream(view: memoryview, stream: Stream, seq_id: int) -> Pieces:
    cells, end = stream.cells, stream.offset + stream.nbytes
    if list(cells.owners) == [seq_id]:  # The bytes are already those of a sequence save.
        yield view[stream.offset : end]
        return
    indices = cells.owners.get(seq_id, ())
    yield U32.pack(len(indices))
    if not indices:
        return
    for start in map(cells.starts.__getitem__, indices):
        yield view[start : start + 4]
        yield U32.pack(1)
        yield view[start + 8 : start + 8 + 4 * cells.ext_words]
        yield U32.pack(seq_id)
    kept = runs(indices)
    by_rows = partial(rows, view, kept)
    by_columns = partial(_columns, view, kept, len(cells))
    middle = stream.k[-1].end if stream.v else end
    yield from _blocks(view, stream.tail, middle, stream.k, by_rows)
    yield from _blocks(view, middle, end, stream.v, by_columns if stream.v_trans else by_rows)


def _recurrent(view: memoryview, cache: RecurrentCache, seq_id: int) -> Pieces:
    yield from recurrent_states(view, cache, cache.rows.owners.get(seq_id, ()))


def recurrent_states(view: memoryview, cache: RecurrentCache, indices: Sequence[int]) -> Pieces:
    """Yield a recurrent cache with only the cells *indices*, as a sequence save writes it."""
    yield U32.pack(len(indices))
    for start in map(cache.rows.starts.__getitem__, indices):
        yield view[start : start + 4]
        yield U32.pack(0)
    blocks = sorted((*cache.r, *cache.p, *cache.s), key=attrgetter("offset"))
    end = cache.offset + cache.nbytes
    yield from _blocks(view, cache.tail, end, blocks, partial(rows, view, runs(indices)))


def _blocks(
    view: memoryview, start: int, end: int, blocks: Iterable[Block], pick: Callable[[Block], Pieces]
) -> Pieces:
    """Yield ``view[start:end]``, of the tensor bytes of each block only what *pick* yields."""
    for block in blocks:
        yield view[start : block.offset]
        yield from pick(block)
        start = block.end
    yield view[start:end]


def rows(view: memoryview, kept: Runs, block: Block) -> Pieces:
    """Yield the rows *kept* of a block."""
    for first, end in kept:
        yield view[block.offset + first * block.row : block.offset + end * block.row]


def _columns(view: memoryview, kept: Runs, n_cell: int, block: Block) -> Pieces:
    """Yield the cells *kept* from a transposed block."""
    size = TYPES[block.type_id].nbytes
    for start in range(block.offset, block.end, n_cell * size):
        for first, end in kept:
            yield view[start + first * size : start + end * size]


def _compressed(view: memoryview, cache: Compressed, seq_id: int, n_full: int) -> Pieces:
    _check_stream(seq_id, cache.n_stream)
    n_rows = min(cache.n_rows, n_full)
    yield COMPRESSED_HEAD.pack(2, n_rows, 1, len(cache.layers))
    for layer, block in zip(cache.layers, cache.k, strict=True):
        yield U32.pack(layer)
        yield from _tensor(view, block, cache.n_rows, seq_id, n_rows)


def _compressor(view: memoryview, cache: Compressor, seq_id: int) -> Pieces:
    _check_stream(seq_id, cache.n_stream)
    settings = cache.ratio, cache.state_size, cache.n_embd
    yield COMPRESSOR_HEAD.pack(1, *settings, 1, len(cache.layers))
    for layer, kv, score in zip(cache.layers, cache.kv, cache.score, strict=True):
        yield U32.pack(layer)
        yield from _tensor(view, kv, cache.state_size, seq_id, cache.state_size)
        yield from _tensor(view, score, cache.state_size, seq_id, cache.state_size)


def _tensor(view: memoryview, block: Block, n_rows: int, stream: int, n_kept: int) -> Pieces:
    """Yield the first *n_kept* of the *n_rows* rows of one stream."""
    width = TYPES[block.type_id].values(block.row)
    start = block.offset + stream * n_rows * block.row
    yield TENSOR_HEAD.pack(block.type_id, width, n_kept, block.row)
    yield view[start : start + n_kept * block.row]


def _check_stream(seq_id: int, n_stream: int) -> None:
    if not 0 <= seq_id < n_stream:
        raise SequenceIdError(seq_id, limit=n_stream)


def ratio_of(caches: Sequence[Cache], compressed: Compressed) -> int | None:
    """Return how many positions become one row of *compressed*; its compressor records it."""
    name = f"{compressed.name} state"
    compressors = (cache for cache in caches if isinstance(cache, Compressor))
    return next((cache.ratio for cache in compressors if cache.name == name), None)


def runs(indices: Sequence[int]) -> Runs:
    """Return *indices* as ranges: (first, end) each."""
    if isinstance(indices, range):
        return [(indices.start, indices.stop)] if indices else []
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found
