"""Take a sequence state to pieces, by positions and by sub-caches, and put it together again.

A piece is itself a payload of a sequence, of one stream and of sequence 0, in which only the
sub-caches of its group have something. ``docs/formats.md`` says which these are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from .._io.arguments import checked
from .._io.matrix import copy_lines
from .blocks import Block, Compressed, Compressor, KVCache, RecurrentCache, Stream
from .cursor import U32, open_view
from .cut import Pieces, ratio_of, recurrent_states, rows, runs
from .dsv4 import COMPRESSED_HEAD, HEAD, TENSOR_HEAD
from .formats import DSV4_MAGIC, MAX_POSITION, TYPES
from .state import Layout
from .traits import SUB_CACHES, Module, SubCache

if TYPE_CHECKING:
    from .._io import Buffer

Group: TypeAlias = Literal["R", "W", "S"]
"""What is kept apart: rows, which stay what they are; rows of a window, of which only the last ones
are needed; the state at one position, which is good for no other."""

GROUPS: Final[tuple[Group, ...]] = ("R", "W", "S")
_WINDOW: Final = "swa"


@dataclass(frozen=True, slots=True)
class Part:
    """What is taken of a sequence state.

    Attributes:
        data: The state: a payload, or a blob with its head.
        layout: The result of parsing *data*.
        groups: The groups that are taken.
        start: First position of the rows that are taken.
        end: The position behind the last one.
    """

    data: memoryview
    layout: Layout
    groups: frozenset[Group] = frozenset(GROUPS)
    start: int = 0
    end: int = MAX_POSITION + 1


@checked
def groups_of(module: Module) -> tuple[Group, ...]:
    """Return the groups that the states of a kind of memory have something in."""
    present = {group_of(sub_cache) for sub_cache in SUB_CACHES[module]}
    return tuple(group for group in GROUPS if group in present)


def group_of(sub_cache: SubCache) -> Group:
    """Return the group of a sub-cache."""
    if sub_cache.kind in ("recurrent", "compressor"):
        return "S"
    return "W" if sub_cache.name == _WINDOW else "R"


@checked
def take(
    data: Buffer,
    layout: Layout,
    group: Group,
    start: int = 0,
    end: int = MAX_POSITION + 1,
) -> list[memoryview | bytes]:
    """Return one piece of a sequence state, as buffers that follow one another.

    Args:
        data: The state.
        layout: The result of parsing *data*, with *loose* where its cells name no sequence.
        group: What is taken: "R" rows, "W" rows of the window, "S" the state at its last position.
        start: First position of the rows.
        end: The position behind the last one.

    Returns:
        A payload without head. Large buffers are views of *data*.
    """
    part = Part(open_view(data), layout, frozenset([group]), start, end)
    return list(compose([part]))


def compose(parts: Sequence[Part], *, seq_id: int = 0, n_stream: int = 1) -> Pieces:
    """Yield the payload of a sequence that *parts* are the pieces of.

    Args:
        parts: States of one kind of memory, in one form, in the order of their positions.
        seq_id: The sequence of its cells.
        n_stream: Streams of its KV caches.
    """
    module = parts[0].layout.module
    if module == "dsv4":
        yield HEAD.pack(DSV4_MAGIC, 1, 0)
    for sub_cache in SUB_CACHES[module]:
        group = group_of(sub_cache)
        every = [(part, cache) for part in parts if (cache := _named(part, sub_cache.name))]
        taken = [(part, cache) for part, cache in every if group in part.groups]
        if sub_cache.kind == "kv" and (every or not sub_cache.optional):
            yield from _kv([_selected(*each) for each in taken], seq_id, n_stream)
        elif not every:
            continue
        elif sub_cache.kind == "compressed":
            yield from _compressed(every[0], taken)
        else:
            yield from _state(every, taken)


def _named(part: Part, name: str) -> object:
    return next((cache for cache in part.layout.caches if cache.name == name), None)


# -- attention caches


@dataclass(frozen=True, slots=True)
class _Rows:
    """Cells of one stream: *indices*, by increasing position."""

    view: memoryview
    stream: Stream
    indices: Sequence[int]

    @property
    def whole(self) -> bool:
        return self.indices == range(len(self.stream.cells))


def _selected(part: Part, cache: object) -> _Rows | None:
    assert isinstance(cache, KVCache)
    stream = next((stream for stream in cache.streams if len(stream.cells)), None)
    if stream is None:
        return None
    indices = _by_position(stream.cells.positions, part.start, part.end)
    return _Rows(part.data, stream, indices) if indices else None


def _by_position(positions: array[int], start: int, end: int) -> Sequence[int]:
    """Return the indices of the cells from *start* to *end*, those of one position as they lie."""
    found = [i for i, position in enumerate(positions) if start <= position < end]
    if any(map(int.__gt__, (positions[i] for i in found), (positions[i] for i in found[1:]))):
        found.sort(key=positions.__getitem__)
    if found == list(range(len(positions))):
        return range(len(positions))
    return found


def _kv(selected: Iterable[_Rows | None], seq_id: int, n_stream: int) -> Pieces:
    taken = [rows for rows in selected if rows is not None]
    place = seq_id if n_stream > 1 else 0
    yield U32.pack(n_stream) + U32.pack(0) * place
    yield U32.pack(sum(len(each.indices) for each in taken))
    if taken:
        for each in taken:
            yield _cells(each, seq_id)
        yield from _tensors(taken)
    yield U32.pack(0) * (n_stream - 1 - place)


def _cells(taken: _Rows, seq_id: int) -> bytes:
    """Return the cells, each of *seq_id* alone."""
    cells = taken.stream.cells
    count, n_ext = len(cells), cells.ext_words
    start, end = cells.starts[0], taken.stream.tail
    stride = (end - start) // 4 // count
    words = array("i")
    words.frombytes(taken.view[start:end])
    found = array("i", bytes(4 * (3 + n_ext) * len(taken.indices)))
    for column in (0, *range(2, 2 + n_ext)):
        values = words[column::stride]
        if not taken.whole:
            values = array("i", map(values.__getitem__, taken.indices))
        found[column :: 3 + n_ext] = values
    found[1 :: 3 + n_ext] = array("i", [1]) * len(taken.indices)
    found[2 + n_ext :: 3 + n_ext] = array("i", [seq_id]) * len(taken.indices)
    return found.tobytes()


def _tensors(taken: Sequence[_Rows]) -> Pieces:
    """Yield settings and blocks of the first, with the rows of all in each block."""
    first = taken[0]
    if len(taken) == 1 and first.whole:
        yield first.view[first.stream.tail : first.stream.offset + first.stream.nbytes]
        return
    at = first.stream.tail
    for name in ("k", "v"):
        transposed = name == "v" and bool(first.stream.v_trans)
        for blocks in zip(*(getattr(each.stream, name) for each in taken), strict=True):
            yield first.view[at : blocks[0].offset]
            yield from _block(taken, blocks, transposed=transposed)
            at = blocks[0].end
    yield first.view[at : first.stream.offset + first.stream.nbytes]  # settings without layers


def _block(taken: Sequence[_Rows], blocks: Sequence[Block], *, transposed: bool) -> Pieces:
    if not transposed:
        for each, block in zip(taken, blocks, strict=True):
            yield from rows(each.view, runs(each.indices), block)
        return
    yield memoryview(_columns(taken, blocks))


def _columns(taken: Sequence[_Rows], blocks: Sequence[Block]) -> bytearray:
    """Return a transposed block: a line for each element of a row, with the cells of all."""
    size = TYPES[blocks[0].type_id].nbytes
    width = size * sum(len(each.indices) for each in taken)
    n_line = blocks[0].row // size
    out = bytearray(n_line * width)
    at = 0
    for each, block in zip(taken, blocks, strict=True):
        line = size * len(each.stream.cells)
        for first, end in runs(each.indices):
            source = each.view[block.offset + size * first : block.end]
            copy_lines(source, line, memoryview(out)[at:], width, n_line, size * (end - first))
            at += size * (end - first)
    return out


# -- what has no rows, or other ones


def _state(every: Sequence[tuple[Part, object]], taken: Sequence[tuple[Part, object]]) -> Pieces:
    """Yield the last state that is taken; where none is, that there is none."""
    for part, cache in reversed(taken):
        if isinstance(cache, Compressor) or (isinstance(cache, RecurrentCache) and cache.rows):
            yield part.data[cache.offset : cache.offset + cache.nbytes]
            return
    part, cache = every[0]
    if isinstance(cache, RecurrentCache):
        yield from recurrent_states(part.data, cache, ())


def _compressed(like: tuple[Part, object], taken: Sequence[tuple[Part, object]]) -> Pieces:
    """Yield the compressed rows of the positions that are taken."""
    found = [
        (part.data, cache, compressed_range(part, cache))
        for part, cache in taken
        if isinstance(cache, Compressed)
    ]
    _, shape = like
    assert isinstance(shape, Compressed)
    n_rows = sum(len(numbers) for _, _, numbers in found)
    yield COMPRESSED_HEAD.pack(2, n_rows, 1, len(shape.layers))
    for index, (layer, block) in enumerate(zip(shape.layers, shape.k, strict=True)):
        width = TYPES[block.type_id].values(block.row)
        yield U32.pack(layer) + TENSOR_HEAD.pack(block.type_id, width, n_rows, block.row)
        for view, cache, numbers in found:
            yield from rows(view, runs(numbers), cache.k[index])


def compressed_range(part: Part, cache: Compressed) -> range:
    """Return the numbers of the compressed rows that the positions of *part* complete."""
    ratio = ratio_of(part.layout.caches, cache)
    if ratio is None:  # a piece without compressors: all that it has
        return range(cache.n_rows)
    return range(min(part.start // ratio, cache.n_rows), min(part.end // ratio, cache.n_rows))
