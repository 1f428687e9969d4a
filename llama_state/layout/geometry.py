"""The part of a layout that is a property of the context, and how two of them differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

from ..errors import Difference
from .blocks import Block, Cache, Compressed, KVCache, RecurrentCache
from .formats import TYPES
from .traits import Module

Rows: TypeAlias = "tuple[tuple[int, int], ...]"
"""(type id, bytes of a row) of each layer."""

_ROW_NAMES = {"k": "K", "v": "V", "r": "R", "p": "P", "s": "S", "score": "score"}


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """The settings of one sub-cache; None: not known, or not a property of this kind of cache.

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
    """What must be equal in a state and in the context that it is restored into.

    Attributes:
        arch: Architecture; None where the state does not say.
        module: The kind of memory.
        caches: Its sub-caches, those of a partial state only.
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


def merge(a: Geometry, b: Geometry) -> Geometry:
    """Return *a* with what it does not know filled in from *b*, of the same context."""
    if a.caches == b.caches:
        return Geometry(a.arch or b.arch, a.module, a.caches)
    others = {cache.name: cache for cache in b.caches}
    merged = [_fill(cache, others.pop(cache.name, cache)) for cache in a.caches]
    return Geometry(a.arch or b.arch, a.module, (*merged, *others.values()))


def differences(saved: Geometry, current: Geometry) -> tuple[Difference, ...]:
    """Return every property in which the two are known to differ, named for people."""
    if None not in (saved.arch, current.arch) and saved.arch != current.arch:
        return (Difference("architecture", saved.arch, current.arch),)
    if saved.module != current.module:
        return (Difference("kind of memory", saved.module, current.module),)
    if saved.caches == current.caches:
        return ()
    others = {cache.name: cache for cache in current.caches}
    seen: Counter[str] = Counter()
    found: dict[Difference, list[str]] = {}
    for cache in saved.caches:
        for fact in _facts(cache, others.get(cache.name, cache)):
            seen[fact.name] += 1
            if fact.saved != fact.current:
                found.setdefault(fact, []).append(cache.name)
    return tuple(
        fact if len(names) == seen[fact.name] else _of(fact, names) for fact, names in found.items()
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
    values = ((getattr(a, field.name), getattr(b, field.name)) for field in fields(CacheGeometry))
    return CacheGeometry(*(theirs if ours is None else ours for ours, theirs in values))


def _of(fact: Difference, caches: Sequence[str]) -> Difference:
    """Say of which caches a difference is true, where it is not true of all."""
    return fact._replace(name=f"{fact.name} of {', '.join(caches)}")


def _facts(saved: CacheGeometry, current: CacheGeometry) -> Iterator[Difference]:
    """Yield every property that both know, equal or not."""
    for name in (field.name for field in fields(CacheGeometry)[1:]):
        a, b = getattr(saved, name), getattr(current, name)
        if a is None or b is None:
            continue
        if name in _ROW_NAMES:
            # Where the layers differ, that is said once, not again for each kind of row.
            if len(a) == len(b) or _layers(saved) == _layers(current):
                yield from _row_facts(name, a, b)
        elif name == "v_trans":
            on_off = "on", "off (V transposed)"
            yield Difference("flash attention", on_off[a], on_off[b])
        else:
            yield Difference("layer count" if name == "n_layer" else name, a, b)


def _layers(cache: CacheGeometry) -> tuple[Any, ...]:
    return cache.n_layer, cache.layers


def _row_facts(name: str, saved: Rows, current: Rows) -> Iterator[Difference]:
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
    """Yield one fact a layer, or only one where it is the same in all."""
    pairs = list(zip(saved, current, strict=True))
    if len(set(pairs)) == 1:
        yield Difference(name, *pairs[0])
        return
    for layer, pair in enumerate(pairs):
        yield Difference(f"{name} (layer {layer})", *pair)
