"""The pieces of a payload: cells, and blocks of tensor bytes, given by offset and length.

Offsets and lengths are in bytes; offsets count from the start of the buffer that was parsed.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

UNKNOWN_ID = -1
"""Stands for the sequence of a recurrent cell in a payload that does not name its sequence."""


@dataclass(frozen=True, slots=True)
class Block:
    """Tensor bytes of one layer.

    Attributes:
        type_id: ggml type.
        row: Bytes of one row (one cell).
        offset: Where the tensor bytes start, after the block's own header.
        nbytes: Length of the tensor bytes.
    """

    type_id: int
    row: int
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """Where the tensor bytes end."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of a stream or of a recurrent cache, in the order of their rows.

    Attributes:
        positions: Position of each cell.
        owners: Sequence id -> indices of its cells, increasing.
        starts: Byte offset of each cell.
        ext_words: 32-bit words between a cell's sequence count and its ids: x, y, and from
            session version 10 on the token id; 0 without M-RoPE.
    """

    positions: array[int] = field(default_factory=lambda: array("i"))
    owners: Mapping[int, Sequence[int]] = field(default_factory=dict)
    starts: Sequence[int] = ()
    ext_words: int = 0

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        return f"<{len(self)} cells of the sequences {sorted(self.owners)}>"

    def positions_of(self, seq_id: int) -> Sequence[int]:
        """Return the positions of the cells of *seq_id*; empty if it has no cell."""
        indices = self.owners.get(seq_id, ())
        if len(indices) == len(self.positions):
            return self.positions
        return [self.positions[index] for index in indices]


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream of a KV cache. An empty stream records no settings: they are None.

    Attributes:
        offset: Where the stream starts (its cell count).
        nbytes: Length of the stream.
        tail: Where the cells end and the settings start.
        v_trans: Whether V is stored transposed (flash attention disabled).
        n_layer: Layers in this cache.
        n_rot_k: Size of the rotation applied to K; None before session version 11.
        n_rot_v: The same for V.
        k: One block a layer.
        v: One block a layer; empty for a cache without V.
    """

    offset: int
    nbytes: int
    cells: Cells = Cells()
    tail: int = 0
    v_trans: bool | None = None
    n_layer: int | None = None
    n_rot_k: int | None = None
    n_rot_v: int | None = None
    k: tuple[Block, ...] = ()
    v: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True)
class KVCache:
    """An attention cache: one stream, or one for each sequence of the context."""

    name: str
    offset: int
    nbytes: int
    streams: tuple[Stream, ...]

    @property
    def cells(self) -> tuple[Cells, ...]:
        """The cells of each stream."""
        return tuple(stream.cells for stream in self.streams)


@dataclass(frozen=True, slots=True)
class RecurrentCache:
    """Recurrent states: a cell holds one state, which one sequence or several share.

    Attributes:
        tail: Where the cells end and the settings start.
        n_layer: Layers of the model, not the number of blocks.
        r: One block a recurrent layer (convolution or token-shift states).
        p: n-gram states of the layers that have them.
        s: One block a recurrent layer (state-space or linear-attention states).
    """

    name: str
    offset: int
    nbytes: int
    rows: Cells
    tail: int
    n_layer: int
    r: tuple[Block, ...]
    p: tuple[Block, ...]
    s: tuple[Block, ...]

    @property
    def cells(self) -> tuple[Cells, ...]:
        """The cells, as those of a single stream."""
        return (self.rows,)


@dataclass(frozen=True, slots=True)
class Compressed:
    """A compressed K cache of deepseek4: *n_rows* rows for each of *n_stream* streams."""

    name: str
    offset: int
    nbytes: int
    n_rows: int
    n_stream: int
    layers: tuple[int, ...]
    k: tuple[Block, ...]

    @property
    def cells(self) -> tuple[Cells, ...]:
        """Empty: rows of this cache have no positions of their own."""
        return ()


@dataclass(frozen=True, slots=True)
class Compressor:
    """The running state of a deepseek4 compressor, for each of *n_stream* streams."""

    name: str
    offset: int
    nbytes: int
    ratio: int
    state_size: int
    n_embd: int
    n_stream: int
    layers: tuple[int, ...]
    kv: tuple[Block, ...]
    score: tuple[Block, ...]

    @property
    def cells(self) -> tuple[Cells, ...]:
        """Empty: this state has no positions of its own."""
        return ()


Cache: TypeAlias = "KVCache | RecurrentCache | Compressed | Compressor"
"""One of the caches in a payload."""
