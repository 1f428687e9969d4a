"""Restores that are wrong in one small thing, to see that a check can fail."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from llama_state import layout
from llama_state.context.restore import Incoming, Restorer
from llama_state.inspection.rows import Layer, layers

Mutate = Callable[[memoryview, layout.Layout], None]


def wrong_layer(blob: memoryview, parsed: layout.Layout) -> None:
    """The K of one layer is that of the next one in the same cache."""
    every = ([one for one in layers(cache) if one.name == "K"] for cache in parsed.caches)
    first, second = next(listed for listed in every if len(listed) > 1)[:2]
    for one, other in zip(first.streams, second.streams, strict=True):
        if one and other:
            size = one.n_row * one.row
            blob[one.offset : one.offset + size] = blob[other.offset : other.offset + size]


def wrong_position(blob: memoryview, parsed: layout.Layout) -> None:
    """Two neighbours in the middle of a sequence have each other's position."""
    cells = parsed.caches[0].cells[0]
    middle = len(cells.positions_of(next(iter(cells.owners)))) // 2
    one, other = cells.starts[middle], cells.starts[middle + 1]
    words = struct.unpack_from("<i", blob, one) + struct.unpack_from("<i", blob, other)
    struct.pack_into("<i", blob, one, words[1])
    struct.pack_into("<i", blob, other, words[0])


def stale_cell(blob: memoryview, parsed: layout.Layout) -> None:
    """One cell has what another token left in it, in every layer."""
    for layer in layers(parsed.caches[0]):
        _stale(blob, layer)


def _stale(blob: memoryview, layer: Layer) -> None:
    tensor = layer.streams[0]
    if tensor is None or tensor.transposed:
        return
    source, stale = (tensor.offset + tensor.row * (tensor.n_row // n) for n in (3, 2))
    blob[stale : stale + tensor.row] = blob[source : source + tensor.row]


MUTANTS: tuple[Mutate, ...] = (wrong_layer, wrong_position, stale_cell)


def _ahead(blob: memoryview, parsed: layout.Layout) -> int:
    """Return how far the cells lie behind where they were parsed."""
    cells = next(cells for cells in parsed.caches[0].cells if len(cells) > 2)
    return next(
        ahead
        for ahead in range(0, 64, 4)
        if all(
            struct.unpack_from("<i", blob, start + ahead) == (position,)
            for start, position in zip(cells.starts, cells.positions, strict=True)
        )
    )


def install(monkeypatch: pytest.MonkeyPatch, mutate: Mutate) -> None:
    """Let every restore of this library change a state after it was verified, before llama.cpp."""
    put = Restorer._put

    def changed(self: Restorer, call: Any, target: Any, incoming: Incoming) -> bool:
        if incoming.parsed is not None and incoming.parsed.sequences:
            blob = bytearray(incoming.blob)
            parsed, view = incoming.parsed, memoryview(blob)
            if target is not None:  # that of a file counts from its end of the native head
                view = view[_ahead(view, parsed) :]
            mutate(view, parsed)
            incoming = replace(incoming, blob=memoryview(blob))
        return put(self, call, target, incoming)

    monkeypatch.setattr(Restorer, "_put", changed)
