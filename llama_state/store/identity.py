"""What decides the bytes of a state: the namespace of a store's prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby

from .. import layout
from ..checkpoint.fingerprint import Fingerprint
from ..errors import Difference, UnsupportedError
from ..layout.traits import SUB_CACHES

# Of a fingerprint's context: what changes the values. Streams, flash attention and the session
# version are form, and a state is converted as it is read.
_DECIDING = ("adapters", "rope", "rope factors")
# What llama.cpp says of a model whose file is not known; the digests of the file say more.
_SUPERFLUOUS = frozenset({"parameters", "tensor bytes"})
_NAMESPACE = "namespace"


def identity_fields(
    fingerprint: Fingerprint, geometry: layout.Geometry, namespace: str
) -> dict[str, str]:
    """Return all that must be equal for stored states to be those of a context.

    Raises:
        UnsupportedError: Something is not known of the context; the error says what to declare.
    """
    if unknown := fingerprint.differences(fingerprint):
        listed = "; ".join(f"{each.name}: {each.current}" for each in unknown)
        raise UnsupportedError(f"a store must know what a context computes with; {listed}")
    return {
        **{key: text for key, text in fingerprint.model.items() if key not in _SUPERFLUOUS},
        **{key: fingerprint.context[key] for key in _DECIDING if key in fingerprint.context},
        "memory": geometry.module,
        **_rows(geometry),
        _NAMESPACE: namespace,
    }


def to_json(fields: Mapping[str, str]) -> bytes:
    """Return fields as bytes, the same ones for the same fields."""
    return json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()


def from_json(data: bytes) -> dict[str, str]:
    """Return fields from the result of :func:`to_json`; none from anything else."""
    try:
        fields = json.loads(data)
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in fields.items()} if _is_object(fields) else {}


def compare(stored: Mapping[str, str], current: Mapping[str, str]) -> list[Difference]:
    """Return the fields in which two identities differ."""
    names = [*stored, *(name for name in current if name not in stored)]
    return [
        Difference(name, stored.get(name, "not recorded"), current.get(name, "not recorded"))
        for name in names
        if stored.get(name) != current.get(name)
    ]


def namespace_of(fields: Mapping[str, str]) -> str:
    """Return the caller's namespace."""
    return fields.get(_NAMESPACE, "")


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _row_text(type_id: int, nbytes: int) -> str:
    kind = layout.TYPES[type_id]
    return f"{kind.name} of {kind.values(nbytes)}"


def _rows(geometry: layout.Geometry) -> dict[str, str]:
    """Return the rows of each cache as text."""
    indexers = {sub.name for sub in SUB_CACHES[geometry.module] if sub.indexer}
    fields: dict[str, str] = {}
    for cache in geometry.caches:
        rows = [*(cache.k or ()), *(cache.v or ()), *(cache.r or ()), *(cache.s or ())]
        fields[f"rows of {cache.name}"] = ", ".join(
            f"{len(list(same))} x {_row_text(*row)}" for row, same in groupby(rows)
        )
        quantized = any(layout.TYPES[type_id].elements > 1 for type_id, _ in rows)
        if quantized and cache.name not in indexers:
            sizes = cache.n_rot_k, cache.n_rot_v
            text = "not recorded" if None in sizes else f"{sizes[0]}, {sizes[1]}"
            fields[f"rotation of {cache.name}"] = text
    return fields
