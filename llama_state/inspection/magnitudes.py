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
_SAME = 1e-3
"""Values of a layer that differ by a smaller share are shown as the same."""


@dataclass(frozen=True, slots=True, eq=False)
class Magnitudes:
    """The magnitude of one kind of rows in a cache.

    Attributes:
        name: "K", "V", "R", "P", "S" or "score".
        layers: Index of each layer in the cache.
        rms: Root mean square of the values: (layers, buckets); NaN for a bucket without rows.
        edges: The limits of the buckets, on the axis *axis*. The first position has a bucket of
            its own: often it is an attention sink, whose values are far from those of others.
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
    if high - low > n_bucket:
        edges = np.concatenate([[low], np.linspace(low + 1, high, n_bucket)])
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
                    # Rotated or not: a rotation leaves the norm of a row as it is.
                    means = (values.stored(raw, tensor).astype(np.float64) ** 2).mean(axis=1)
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


def shades(heat: Magnitudes) -> npt.NDArray[np.float64]:
    """Return the magnitudes of each layer on a scale of its own.

    Layers differ more than the positions within one: on a common scale only the loudest are seen.
    What is further from the middle half than 1.5 times its width is far outside, as in a box plot.

    Returns:
        (layers, buckets): 0 to 1 from the lowest to the highest usual value of the layer, less or
        more for what is far outside; NaN for a bucket without rows or with no finite value.
    """
    import numpy as np

    out = np.full(heat.rms.shape, np.nan)
    for line, rms in zip(out, heat.rms, strict=True):
        finite = np.isfinite(rms)
        if not finite.any():
            continue
        found = rms[finite]
        first, middle, third = np.quantile(found, (0.25, 0.5, 0.75))
        reach = 1.5 * (third - first) + _SAME * middle
        usual = found[(found >= first - reach) & (found <= third + reach)]
        low, high = usual.min(), usual.max()
        half = max((high - low) / 2, _SAME * middle) or 1.0
        line[finite] = 0.5 + (found - (low + high) / 2) / (2 * half)
    return out


def _sample(n_row: int, n_stream: int) -> npt.NDArray[np.intp]:
    import numpy as np

    most = max(1, MOST_ROWS // n_stream)
    return np.unique(np.linspace(0, n_row - 1, min(n_row, most)).astype(np.intp))
