"""The settings of a context that a state records, and how those of two states differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

from .._io.arguments import checked
from ..errors import Difference
from .blocks import Block, Cache, Compressed, KVCache, RecurrentCache
from .formats import TYPES
from .traits import Module

Rows: TypeAlias = "tuple[tuple[int, int], ...]"
"""(type id, bytes of a row) of each layer."""

_ROW_NAMES = {"k": "K", "v": "V", "r": "R", "p": "P", "s": "S", "score": "score"}


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """The settings of one sub-cache; None: not known, or not a setting of this kind of cache.

    Attributes:
        layers: Model layer ids (deepseek4).
        k, v, r, p, s: Rows of each layer. A compressor's kv rows are *k*.
        score: Rows of each layer of a compressor.
    """

    name: str
    n_stream: int | None = None
    n_layer: int | None = None
    v_trans: bool | None = None
    n_rot_k: int | None = None
    n_rot_v: int | None = None
    ratio: int | None = None
    state_size: int | None = None
    layers: tuple[int, ...] | None = None
    k: Rows | None = None
    v: Rows | None = None
    r: Rows | None = None
    p: Rows | None = None
    s: Rows | None = None
    score: Rows | None = None


@dataclass(frozen=True, slots=True)
class Geometry:
    """The settings in which a state and the context that it is restored into must be equal.

    Attributes:
        arch: Architecture; None if the state does not record it.
        module: The kind of memory.
        caches: Its sub-caches; of a partial state, those that it holds.
    """

    arch: str | None
    module: Module
    caches: tuple[CacheGeometry, ...]


def geometry_of(cache: Cache) -> CacheGeometry:
    """Return the settings that *cache* records."""
    if isinstance(cache, KVCache):
        return _of_kv(cache)
    if isinstance(cache, RecurrentCache):
        r, p, s = _rows(cache.r), _rows(cache.p), _rows(cache.s)
        return CacheGeometry(cache.name, n_layer=cache.n_layer, r=r, p=p, s=s)
    if isinstance(cache, Compressed):
        return CacheGeometry(cache.name, layers=cache.layers, k=_rows(cache.k))
    settings = CacheGeometry(cache.name, ratio=cache.ratio, state_size=cache.state_size)
    return replace(settings, layers=cache.layers, k=_rows(cache.kv), score=_rows(cache.score))


@checked
def merge(a: Geometry, b: Geometry) -> Geometry:
    """Return *a*, with what is not known in it taken from *b*, of the same context."""
    if a.caches == b.caches:
        return Geometry(a.arch or b.arch, a.module, a.caches)
    others = {cache.name: cache for cache in b.caches}
    merged = [_fill(cache, others.pop(cache.name, cache)) for cache in a.caches]
    return Geometry(a.arch or b.arch, a.module, (*merged, *others.values()))


@checked
def differences(saved: Geometry, current: Geometry) -> tuple[Difference, ...]:
    """Return every setting in which the two are known to differ, with a readable name."""
    if None not in (saved.arch, current.arch) and saved.arch != current.arch:
        return (Difference("architecture", saved.arch, current.arch),)
    if saved.module != current.module:
        return (Difference("kind of memory", saved.module, current.module),)
    if saved.caches == current.caches:
        return ()
    others = {cache.name: cache for cache in current.caches}
    n_compared: Counter[str] = Counter()
    caches_of: dict[Difference, list[str]] = {}
    for cache in saved.caches:
        for compared in _comparisons(cache, others.get(cache.name, cache)):
            n_compared[compared.name] += 1
            if compared.saved != compared.current:
                caches_of.setdefault(compared, []).append(cache.name)
    return tuple(
        # A difference of all caches does not name them.
        difference
        if len(names) == n_compared[difference.name]
        else difference._replace(name=f"{difference.name} of {', '.join(names)}")
        for difference, names in caches_of.items()
    )


def _of_kv(cache: KVCache) -> CacheGeometry:
    n_stream = len(cache.streams)
    stream = next((stream for stream in cache.streams if len(stream.cells)), None)
    if stream is None:
        return CacheGeometry(cache.name, n_stream)
    settings = stream.n_layer, stream.v_trans, stream.n_rot_k, stream.n_rot_v
    return CacheGeometry(cache.name, n_stream, *settings, k=_rows(stream.k), v=_rows(stream.v))


def _rows(blocks: Sequence[Block]) -> Rows:
    return tuple((block.type_id, block.row) for block in blocks)


def _fill(a: CacheGeometry, b: CacheGeometry) -> CacheGeometry:
    pairs = ((getattr(a, field.name), getattr(b, field.name)) for field in fields(CacheGeometry))
    return CacheGeometry(*(second if first is None else first for first, second in pairs))


def _comparisons(saved: CacheGeometry, current: CacheGeometry) -> Iterator[Difference]:
    """Yield every setting that is known of both, equal or not."""
    for name in (field.name for field in fields(CacheGeometry)[1:]):
        a, b = getattr(saved, name), getattr(current, name)
        if a is None or b is None:
            continue
        if name in _ROW_NAMES:
            # If the layers differ, that is reported once, not again for each kind of row.
            if len(a) == len(b) or _layers(saved) == _layers(current):
                yield from _row_comparisons(name, a, b)
        elif name == "v_trans":
            on_off = "on", "off (V transposed)"
            yield Difference("flash attention", on_off[a], on_off[b])
        else:
            yield Difference("layer count" if name == "n_layer" else name, a, b)


def _layers(cache: CacheGeometry) -> tuple[Any, ...]:
    return cache.n_layer, cache.layers


def _row_comparisons(name: str, saved: Rows, current: Rows) -> Iterator[Difference]:
    letter = _ROW_NAMES[name]
    if len(saved) != len(current):
        yield Difference(f"{letter} layer count", len(saved), len(current))
        return
    type_name = f"type_{name}" if name in "kv" else f"{letter} type"
    yield from _by_layer(
        type_name, *([TYPES[i].name for i, _ in rows] for rows in (saved, current))
    )
    # Rows are compared in values, not in bytes: those follow from the type.
    sizes = ([f"{TYPES[i].values(n)} values" for i, n in rows] for rows in (saved, current))
    yield from _by_layer(f"{letter} row size", *sizes)


def _by_layer(name: str, saved: Sequence[Any], current: Sequence[Any]) -> Iterator[Difference]:
    """Yield a comparison for each layer, or one for all if it is the same in all."""
    pairs = list(zip(saved, current, strict=True))
    if len(set(pairs)) == 1:
        yield Difference(name, *pairs[0])
        return
    for layer, pair in enumerate(pairs):
        yield Difference(f"{name} (layer {layer})", *pair)
