"""Which layer of the model each layer of a cache is. States do not say it: cells do not need it."""

from __future__ import annotations

from typing import Final

from ..layout import Compressed, Compressor, KVCache, Layout

PERIODS: Final = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "llama4": 4,
    "olmo2": 4,
}
"""Of models with a sliding window: the last of this many layers sees all positions.

From ``set_swa_pattern`` in llama.cpp's ``src/models``. A GGUF file can say otherwise, so numbers
are given only where the caches have as many layers as this makes.
"""


def layer_numbers(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return for each cache whose layers are known their numbers in the model, in its order."""
    counts = {
        cache.name: max((len(stream.k) for stream in cache.streams), default=0)
        for cache in layout.caches
        if isinstance(cache, KVCache)
    }
    numbers = {
        cache.name: range(max(cache.layers, default=-1) + 1)  # their indices are of the model
        for cache in layout.caches
        if isinstance(cache, (Compressed, Compressor))
    }
    found = {name: tuple(own) for name, own in numbers.items()}
    if layout.module == "kv":
        return found | {name: tuple(range(n)) for name, n in counts.items()}
    if layout.module == "iswa" and (period := PERIODS.get(layout.arch or "")):
        every = range(sum(counts.values()))
        base = tuple(layer for layer in every if layer % period == period - 1)
        swa = tuple(layer for layer in every if layer % period != period - 1)
        if counts == {"base": len(base), "swa": len(swa)}:
            return found | {"base": base, "swa": swa}
    return found
