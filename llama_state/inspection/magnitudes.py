"""How large the values of a state are, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from ..layout import UNKNOWN_ID, Cache, KVCache, RecurrentCache
from . import values
from .rows import Layer, layers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MOST_ROWS = 2048
"""The most rows of a layer that are read; of more, evenly spaced ones."""
BUCKETS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Magnitudes:
    """The magnitude of one kind of rows in a cache.

    Attributes:
        name: "K", "V", "R", "P", "S" or "score".
        layers: Index of each layer.
        rms: Root mean square of the values: (layers, buckets); NaN for a bucket without rows.
        edges: The limits of the buckets, on the axis *axis*.
        axis: "position", "row", or "sequence" (one bucket each).
    """

    name: str
    layers: tuple[int, ...]
    rms: npt.NDArray[np.float64]
    edges: npt.NDArray[np.float64]
    axis: str


def magnitudes(state: memoryview, cache: Cache) -> list[Magnitudes]:
    """Return the magnitudes of each kind of rows in a cache.

    Args:
        state: The bytes that the offsets of *cache* refer to.

    Raises:
        UnsupportedError: numpy, or for quantized rows gguf, is not installed.
    """
    values.require("numpy")
    grouped: dict[str, list[Layer]] = {}
    for layer in layers(cache):
        if any(tensor and tensor.n_row * tensor.row for tensor in layer.streams):
            grouped.setdefault(layer.name, []).append(layer)
    return [_of_kind(state, cache, name, kind) for name, kind in grouped.items()]


def _of_kind(state: memoryview, cache: Cache, name: str, listed: Sequence[Layer]) -> Magnitudes:
    import numpy as np

    axis, places = _places(cache, listed[0])
    low, high = min(map(min, places)), max(map(max, places)) + 1
    n_bucket = min(high - low, BUCKETS)
    edges = np.linspace(low, high, n_bucket + 1)
    rms = np.full((len(listed), n_bucket), np.nan)
    for index, layer in enumerate(listed):
        squares, counts = np.zeros(n_bucket), np.zeros(n_bucket)
        filled = (tensor for tensor in layer.streams if tensor and tensor.n_row)
        for tensor, own in zip(filled, places, strict=True):
            rows = _sample(tensor.n_row, len(places))
            buckets = np.searchsorted(edges, np.asarray(own)[rows], side="right") - 1
            for piece in values.pieces(len(rows), tensor.row):
                raw = values.rows_of(state, tensor, rows[piece])
                with np.errstate(all="ignore"):
                    means = (values.decode(raw, tensor).astype(np.float64) ** 2).mean(axis=1)
                squares += np.bincount(buckets[piece], means, n_bucket)
                counts += np.bincount(buckets[piece], minlength=n_bucket)
        rms[index] = np.sqrt(np.divide(squares, counts, out=rms[index], where=counts > 0))
    return Magnitudes(name, tuple(layer.index for layer in listed), rms, edges, axis)


def _places(cache: Cache, layer: Layer) -> tuple[str, list[Sequence[int]]]:
    """Return the axis, and for each stream with cells the place of each row on it."""
    if isinstance(cache, KVCache):
        return "position", [cells.positions for cells in cache.cells if len(cells)]
    if isinstance(cache, RecurrentCache):
        return "sequence", [list(_first_owners(cache))]
    return "row", [range(tensor.n_row) for tensor in layer.streams if tensor and tensor.n_row]


def _first_owners(cache: RecurrentCache) -> Iterator[int]:
    """Yield the first owner of each cell of a recurrent cache."""
    owners = sorted(cache.rows.owners.items(), reverse=True)
    first = {index: seq_id for seq_id, own in owners for index in chain(own)}
    for index in range(len(cache.rows)):
        yield 0 if first[index] == UNKNOWN_ID else first[index]


def _sample(n_row: int, n_stream: int) -> npt.NDArray[np.intp]:
    import numpy as np

    most = max(1, MOST_ROWS // n_stream)
    return np.unique(np.linspace(0, n_row - 1, min(n_row, most)).astype(np.intp))
