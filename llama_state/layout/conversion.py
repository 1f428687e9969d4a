"""Write a state in another form: another session version, other streams, V the other way round.

What a state means does not depend on its form, and llama.cpp takes only its own. The sources are
the formats on ``docs/formats.md``.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeAlias

from .._io.arguments import checked
from .._io.matrix import transpose
from .._io.threads import Threads
from ..errors import FormatError, UnsupportedError
from .blocks import Block, Cells, KVCache, Stream
from .cursor import U32, open_view
from .formats import EXT_WORDS, MAX_SEQUENCES, TYPES, require_version
from .geometry import CacheGeometry, Geometry
from .kv import ROW_HEAD, TRANSPOSED_HEAD
from .state import Layout
from .traits import SUB_CACHES, Module

if TYPE_CHECKING:
    from .._io import Buffer

ROTATED_VERSION: Final = 11
"""The first session version that records how K and V are rotated."""

# Up to so many bytes of V one thread has turned them before others have started.
_ONE_THREAD: Final = 8 << 20
# What llama.cpp has in a cell whose token is not known.
_NO_TOKEN: Final = -1


@dataclass(frozen=True, slots=True)
class Form:
    """How a context writes its states, apart from what they mean.

    Attributes:
        version: Session version.
        n_stream: Streams of its KV caches; None: as many as the state has.
        v_trans: Whether V is transposed (flash attention is off); None: as in the state.
        rotations: Cache name -> (n_rot_k, n_rot_v), sizes of the rotations of K and V. Of a cache
            that is not named: as in the state.
    """

    version: int
    n_stream: int | None = None
    v_trans: bool | None = None
    rotations: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Transposed:
    """A V block, which is to be transposed: *source* has *n_rows* rows."""

    source: memoryview
    n_rows: int
    element: int


_Piece: TypeAlias = "memoryview | bytes | _Transposed"


@checked
def form_of(layout: Layout) -> Form:
    """Return the form that a state has."""
    known = {
        cache.name: stream
        for cache in layout.caches
        if isinstance(cache, KVCache) and (stream := _filled(cache))
    }
    return Form(
        layout.version,
        next(iter(_stream_counts(layout)), None),
        next((stream.v_trans for stream in known.values()), None),
        {
            name: (stream.n_rot_k, stream.n_rot_v)
            for name, stream in known.items()
            if stream.n_rot_k is not None and stream.n_rot_v is not None
        },
    )


@checked
def convert(data: Buffer, layout: Layout, form: Form) -> bytearray:
    """Return a state in another form.

    Args:
        data: The state.
        layout: The result of parsing *data*.
        form: The form that it is to have.

    Returns:
        The state. A blob keeps its head, and a payload without head has none.

    Raises:
        FormatError: *layout* is that of another state.
        UnsupportedError: That is not only another form: the rows would have to be other ones, or
            the state of a whole context other streams.
    """
    conversion = Conversion.of(data, layout, form)
    out = bytearray(conversion.nbytes)
    conversion.write(memoryview(out))
    return out


@dataclass(frozen=True, slots=True)
class Conversion:
    """A state in another form, not written yet: it can be written where there is memory for it."""

    pieces: tuple[_Piece, ...]

    @classmethod
    def of(cls, data: Buffer, layout: Layout, form: Form) -> Conversion:
        """Return the conversion of a state; arguments and errors as :func:`convert`."""
        return cls(tuple(_pieces(_checked(data, layout, form), layout, form)))

    @property
    def nbytes(self) -> int:
        """The bytes that it has."""
        return sum(map(_size, self.pieces))

    def write(self, out: memoryview) -> None:
        """Write it to *out*, which has :attr:`nbytes` bytes and does not overlap the state."""
        turned: list[tuple[_Transposed, memoryview]] = []
        copied: list[tuple[memoryview | bytes, memoryview]] = []
        for piece in self.pieces:
            place, out = out[: _size(piece)], out[_size(piece) :]
            if isinstance(piece, _Transposed):
                turned.append((piece, place))
            else:
                copied.append((piece, place))
        if sum(len(place) for _, place in turned) < _ONE_THREAD:
            _turn(turned)
            _copy(copied)
            return
        # V is turned in threads, without the interpreter's lock, while K is copied in this one.
        n_thread = min(4, os.cpu_count() or 1)
        with Threads(n_thread) as threads:
            waiting = [threads.ask(partial(_turn, turned[i::n_thread])) for i in range(n_thread)]
            _copy(copied)
            for each in waiting:
                each.result()


def _turn(turned: Iterable[tuple[_Transposed, memoryview]]) -> None:
    for piece, place in turned:
        transpose(piece.source, place, piece.n_rows, piece.element)


def _copy(copied: Iterable[tuple[memoryview | bytes, memoryview]]) -> None:
    for piece, place in copied:
        place[:] = piece


def _checked(data: Buffer, layout: Layout, form: Form) -> memoryview:
    """Return the bytes of a state of *layout* that can have *form*."""
    require_version(form.version)
    if layout.nbytes != len(view := open_view(data)):
        raise FormatError(f"the layout is that of {layout.nbytes} bytes, not of {len(view)}")
    if form.n_stream is not None and not 1 <= form.n_stream <= MAX_SEQUENCES:
        raise UnsupportedError(f"no cache has {form.n_stream} streams (1 to {MAX_SEQUENCES})")
    if layout.kind == "whole" and form.n_stream not in (None, *_stream_counts(layout)):
        raise UnsupportedError("a whole state keeps its streams: convert sequence by sequence")
    return view


def in_form(geometry: Geometry, form: Form) -> Geometry:
    """Return the geometry that a state has in another form."""
    return replace(geometry, caches=tuple(_cache_in_form(one, form) for one in geometry.caches))


def cells_in_form(layout: Layout, form: Form) -> dict[str, tuple[int, ...]]:
    """Return the cells that each stream needs where the sequences of a state go one by one."""
    needed = dict(layout.cells_needed)
    for cache in layout.caches:
        if isinstance(cache, KVCache):
            counts = Counter[int]()
            for cells in cache.cells:
                counts.update({seq_id: len(own) for seq_id, own in cells.owners.items()})
            # What they share, each has for itself.
            each = tuple(counts.values())
            needed[cache.name] = (sum(each),) if form.n_stream == 1 else each
    return needed


def _cache_in_form(cache: CacheGeometry, form: Form) -> CacheGeometry:
    n_stream = cache.n_stream and (form.n_stream or cache.n_stream)
    if cache.v_trans is None:
        return replace(cache, n_stream=n_stream)
    v_trans = cache.v_trans if form.v_trans is None else form.v_trans
    return replace(cache, n_stream=n_stream, v_trans=v_trans)


def indexer_caches(module: Module) -> frozenset[str]:
    """Return the caches of a kind of memory whose rows every llama.cpp rotates alike."""
    return frozenset(sub.name for sub in SUB_CACHES[module] if sub.indexer)


def _stream_counts(layout: Layout) -> list[int]:
    return [len(cache.streams) for cache in layout.caches if isinstance(cache, KVCache)]


def _filled(cache: KVCache) -> Stream | None:
    return next((stream for stream in cache.streams if len(stream.cells)), None)


def _size(piece: _Piece) -> int:
    return len(piece.source if isinstance(piece, _Transposed) else piece)


def _pieces(view: memoryview, layout: Layout, form: Form) -> Iterator[_Piece]:
    start = layout.caches[0].offset if layout.caches else len(view)
    yield view[:start]
    for cache in layout.caches:
        if isinstance(cache, KVCache):
            yield from _kv(view, layout, cache, form)
        else:
            yield view[cache.offset : cache.offset + cache.nbytes]


def _kv(view: memoryview, layout: Layout, cache: KVCache, form: Form) -> Iterator[_Piece]:
    streams = list(cache.streams)
    if form.n_stream is not None and layout.kind == "sequence":
        streams = _placed(_filled(cache), form.n_stream, layout.source)
    rotation = _rotation(layout, cache, form)
    yield U32.pack(len(streams))
    for stream in streams:
        yield U32.pack(len(stream.cells))
        if len(stream.cells):
            yield _cells(view, stream.cells, layout, form)
            yield from _tensors(view, stream, form, layout.version, rotation)


def _placed(filled: Stream | None, n_stream: int, source: int | None) -> list[Stream]:
    """Return the streams of a sequence state: the one with its cells is where it has its own."""
    streams = [Stream(0, 0)] * n_stream
    if filled:
        streams[source if source is not None and source < n_stream else 0] = filled
    return streams


def _cells(view: memoryview, cells: Cells, layout: Layout, form: Form) -> memoryview | bytes:
    end = cells.starts[-1]
    words = view[cells.starts[0] : end + 4 * _cell_words(view, end, cells.ext_words)].cast("i")
    n_ext = EXT_WORDS[form.version] if cells.ext_words else 0
    if n_ext == cells.ext_words:
        return words.cast("B")
    if layout.traits.ple:
        raise UnsupportedError("session version 9 has no n-gram embeddings")
    found = array("i")
    first_ext, first_id = 2, 2 + cells.ext_words
    at = 0
    for _ in range(len(cells)):
        cell = words[at : at + first_id + words[at + 1]].tolist()
        ext = (*cell[first_ext:first_id], _NO_TOKEN)[:n_ext]
        found.extend((*cell[:first_ext], *ext, *cell[first_id:]))
        at += len(cell)
    return found.tobytes()


def _cell_words(view: memoryview, start: int, ext_words: int) -> int:
    (n_seq,) = U32.unpack_from(view, start + 4)
    return 2 + ext_words + int(n_seq)


def _rotation(layout: Layout, cache: KVCache, form: Form) -> bytes:
    """Return the words that say how K and V are rotated; none before they were recorded."""
    stream = _filled(cache)
    if stream is None:
        return b""
    saved, wanted = (stream.n_rot_k, stream.n_rot_v), form.rotations.get(cache.name)
    was_recorded, is_recorded = None not in saved, form.version >= ROTATED_VERSION
    if layout.version != form.version:
        _check_rows_known(layout, cache, stream)
    if not is_recorded:
        return b""
    if was_recorded and wanted not in (None, saved):
        raise UnsupportedError(f"the rows of {cache.name} are rotated by {saved}, not by {wanted}")
    sizes = saved if was_recorded else wanted or (0, 0)
    return b"".join(U32.pack(size or 0) for size in sizes)


def _check_rows_known(layout: Layout, cache: KVCache, stream: Stream) -> None:
    """Refuse rows of which only session version 11 says whether they are rotated."""
    indexers = indexer_caches(layout.module)
    for block in chain(stream.k, stream.v):
        kind = TYPES[block.type_id]
        if kind.elements > 1 and cache.name not in indexers:
            raise UnsupportedError(
                f"before session version 11 no state says whether its {kind.name} rows are rotated"
            )


def _tensors(
    view: memoryview, stream: Stream, form: Form, version: int, rotation: bytes
) -> Iterator[_Piece]:
    v_trans = stream.v_trans if form.v_trans is None else form.v_trans
    yield U32.pack(bool(v_trans)) + U32.pack(stream.n_layer or 0) + rotation
    first = stream.tail + (16 if version >= ROTATED_VERSION else 8)
    end = stream.offset + stream.nbytes
    middle = stream.k[-1].end if stream.v else end
    yield view[first:middle]
    if v_trans == stream.v_trans or not stream.v:
        yield view[middle:end]
        return
    for block in stream.v:
        yield from _transposed(view, block, len(stream.cells), to_rows=not v_trans)


def _transposed(view: memoryview, block: Block, n_cell: int, *, to_rows: bool) -> Iterator[_Piece]:
    """Yield a V block the other way round."""
    kind = TYPES[block.type_id]
    if kind.elements > 1:
        raise UnsupportedError(f"V of type {kind.name} cannot be transposed: it is in blocks")
    n_embd = kind.values(block.row)
    if to_rows:
        yield ROW_HEAD.pack(block.type_id, block.row)
    else:
        yield TRANSPOSED_HEAD.pack(block.type_id, kind.nbytes, n_embd)
    source = view[block.offset : block.end]
    yield _Transposed(source, n_embd if to_rows else n_cell, kind.nbytes)
