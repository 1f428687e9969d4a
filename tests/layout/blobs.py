"""Writes llama.cpp states from a description, by the grammar and not by the parser's tables.

Tensor bytes depend on cache, layer and cell only, so that a sequence cut out of a whole
state can be compared with the same sequence written by itself.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from random import Random

Cell = tuple[int, tuple[int, ...]]
"""Position and sequence ids."""
Stored = tuple[int, tuple[int, ...], str]
"""A cell as it is written, and what its tensor bytes depend on."""

F32, F16, Q8_0 = 0, 1, 8


@dataclass(frozen=True)
class State:
    """A state: *cells* of all sequences, and how it is stored.

    Attributes:
        split: Number of streams of a context that is not unified; 0 for a unified one.
        seq: The sequence that is saved; None for the whole context.
        window: Cells of each sequence that "swa" has; None for all.
        ngrams: Recurrent layers that have n-gram rows.
    """

    module: str
    version: int = 11
    cells: tuple[Cell, ...] = ((0, (0,)), (1, (0,)), (2, (0,)))
    split: int = 0
    seq: int | None = None
    partial: bool = False
    k_only: bool = False
    ext: bool = False
    ple: bool = False
    v_trans: bool = False
    window: int | None = None
    n_layer: int = 2
    type_k: int = F16
    row_k: int = 64
    type_v: int = F16
    row_v: int = 32
    rotation: tuple[int, int] = (0, 0)
    n_recurrent: int = 3
    row_r: int = 24
    row_s: int = 40
    ngrams: tuple[int, ...] = ()
    indexer: bool = True
    arch: str = "made-up"

    def blob(self) -> bytes:
        """Return what llama.cpp's buffer functions would write."""
        if self.seq is None:
            return u32(len(self.arch)) + self.arch.encode() + self.payload()
        return struct.pack("<Ii", 0xAF143CD8, self.seq) + self.payload()

    def payload(self) -> bytes:
        return {
            "none": lambda: b"",
            "kv": lambda: self._kv("kv"),
            "iswa": self._iswa,
            "recurrent": self._recurrent,
            "hybrid": lambda: self._full("attn") + self._recurrent(),
            "hybrid-iswa": lambda: self._iswa() + self._recurrent(),
            "hybrid-idx": lambda: self._full("attn") + self._recurrent() + self._idx(),
            "dsa": self._dsa,
            "dsa-iswa": lambda: (b"" if self.partial else self._dsa()) + self._swa(k_only=True),
            "msa": self._msa,
            "dsv4": self._dsv4,
        }[self.module]()

    def only(self, seq: int) -> State:
        """Return the state of one sequence of this whole state."""
        return replace(self, seq=seq)

    def _full(self, tag: str, **changes: bool) -> bytes:
        return b"" if self.partial else self._kv(tag, **changes)

    def _iswa(self) -> bytes:
        return self._full("base") + self._swa()

    def _swa(self, **changes: bool) -> bytes:
        return self._kv("swa", windowed=True, **changes)

    def _dsa(self) -> bytes:
        return self._kv("mla", k_only=True) + self._kv("lid", k_only=True, ext=False)

    def _msa(self) -> bytes:
        return self._kv("base", k_only=False) + self._kv("idx", k_only=False, ext=False, n_layer=1)

    def _idx(self) -> bytes:
        if not self.indexer or self.partial:
            return b""
        return self._kv("idx", k_only=True, ext=False, n_layer=1)

    def _streams(self, windowed: bool) -> list[list[Stored]]:
        cells = [(pos, ids, f"{pos} of {ids}") for pos, ids in self.cells]
        if windowed and self.window is not None:
            last = self._last()
            kept = [any(last[i] - pos < self.window for i in ids) for pos, ids, _ in cells]
            cells = list(compress(cells, kept))
        if self.seq is not None:
            cells = [(pos, (self.seq,), key) for pos, ids, key in cells if self.seq in ids]
        if not self.split:
            return [cells]
        return [
            [(pos, (s,), key) for pos, ids, key in cells if s in ids] for s in range(self.split)
        ]

    def _last(self) -> dict[int, int]:
        last: dict[int, int] = {}
        for pos, ids in self.cells:
            last.update({i: max(pos, last.get(i, -1)) for i in ids})
        return last

    def _kv(
        self,
        tag: str,
        *,
        windowed: bool = False,
        k_only: bool | None = None,
        ext: bool | None = None,
        n_layer: int | None = None,
    ) -> bytes:
        streams = self._streams(windowed)
        k_only = self.k_only if k_only is None else k_only
        ext = (self.ext if ext is None else ext) or self.ple
        layers = range(self.n_layer if n_layer is None else n_layer)
        return u32(len(streams)) + b"".join(
            self._stream(tag, cells, k_only=k_only, ext=ext, layers=layers) for cells in streams
        )

    def _stream(
        self, tag: str, cells: Sequence[Stored], *, k_only: bool, ext: bool, layers: Sequence[int]
    ) -> bytes:
        if not cells:
            return u32(0)
        out = [u32(len(cells))]
        for pos, ids, _ in cells:
            words = (pos, pos, 77)[: 2 if self.version == 9 else 3] if ext else ()
            out.append(struct.pack(f"<iI{len(words)}i{len(ids)}i", pos, len(ids), *words, *ids))
        out.append(u32(self.v_trans, len(layers)))
        if self.version >= 11:
            out.append(u32(*self.rotation))
        for layer in layers:
            rows = [noise(f"{tag}k{layer}", key, self.row_k) for _, _, key in cells]
            out.append(struct.pack("<iQ", self.type_k, self.row_k) + b"".join(rows))
        for layer in layers if not k_only else ():
            rows = [noise(f"{tag}v{layer}", key, self.row_v) for _, _, key in cells]
            if self.v_trans:
                size = 2 if self.type_v == F16 else 4
                out.append(struct.pack("<iII", self.type_v, size, self.row_v // size))
                columns = range(0, self.row_v, size)
                out.extend(row[at : at + size] for at in columns for row in rows)
            else:
                out.append(struct.pack("<iQ", self.type_v, self.row_v) + b"".join(rows))
        return b"".join(out)

    def _recurrent(self) -> bytes:
        last = self._last()
        own = sorted(last) if self.seq is None else [i for i in last if i == self.seq]
        out = [u32(len(own))]
        for i in own:
            ids = (i,) if self.seq is None else ()
            out.append(struct.pack(f"<iI{len(ids)}i", last[i], len(ids), *ids))
        others = 0 if self.module == "recurrent" else self.n_layer
        out.append(u32(0, others + self.n_recurrent))
        for layer in range(self.n_recurrent):
            rows = [noise(f"r{layer}", i, self.row_r) for i in own]
            out.append(struct.pack("<iQ", F32, self.row_r) + b"".join(rows))
            if layer in self.ngrams:
                rows = [noise(f"p{layer}", i, 16) for i in own]
                out.append(struct.pack("<Q", 16) + b"".join(rows))
        for layer in range(self.n_recurrent):
            rows = [noise(f"s{layer}", i, self.row_s) for i in own]
            out.append(struct.pack("<iQ", F32, self.row_s) + b"".join(rows))
        return b"".join(out)

    def _dsv4(self) -> bytes:
        raw = self._full("base", k_only=True) + self._swa(k_only=True)
        out = [u32(0x34565344, 1, self.partial), raw]
        owned = [pos for pos, ids in self.cells if self.seq in ids]
        streams = range(self.split or 1) if self.seq is None else [self.seq]
        for tag, ratio, _, _ in () if self.partial else COMPRESSORS:
            n_rows = 8 if self.seq is None else min(8, (max(owned, default=-1) + 1) // ratio)
            out.append(u32(2, n_rows, len(streams), 1, 3))
            out.append(tensor(f"{tag}", streams, n_rows, 16))
        for tag, ratio, size, width in COMPRESSORS:
            out.append(u32(1, ratio, size, width, len(streams), 1, 3))
            out.append(tensor(f"{tag}kv", streams, size, width))
            out.append(tensor(f"{tag}score", streams, size, width))
        return b"".join(out)


COMPRESSORS = (("csa", 4, 8, 4), ("hca", 128, 4, 2), ("lid", 4, 8, 4))
"""Name, ratio, rows and width of each compressor."""


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def noise(tag: str, key: object, nbytes: int) -> bytes:
    return Random(f"{tag} {key}").randbytes(nbytes)


def tensor(tag: str, streams: Sequence[int], n_rows: int, width: int) -> bytes:
    head = struct.pack("<iQQQ", F32, width, n_rows, 4 * width)
    rows = [noise(f"{tag} {s}", row, 4 * width) for s in streams for row in range(n_rows)]
    return head + b"".join(rows)


def text(n: int, *ids: int, start: int = 0) -> tuple[Cell, ...]:
    """Return *n* cells at following positions, each of the sequences *ids*."""
    return tuple((start + i, ids or (0,)) for i in range(n))
