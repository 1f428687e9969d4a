"""The metadata of a checkpoint: one set of rules for what is made, written and read."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final

from .. import layout
from .._io.buffers import flat
from ..errors import FormatError, VersionError
from ..layout import RestorePoint
from .fingerprint import Fingerprint

if TYPE_CHECKING:
    from .._io import Buffer

_FIELDS: Final = frozenset(
    ["kind", "source", "session version", "fingerprint", "logits of", "packed tokens", "meta"]
)
# Written only where there are some: files without them are as those of the first versions.
POINTS: Final = "restore points"
_MAX_ID: Final = 2**31 - 1
_FLOAT: Final = 4


def encode(fields: Mapping[str, Any]) -> bytes:
    """Return the JSON text of metadata that :func:`decode` takes.

    Raises:
        FormatError: They are not those of a checkpoint.
        VersionError: The session version is not known.
    """
    # What is read back is written: what cannot be read is refused here, and keys that are no
    # texts become some before they are sorted.
    read = decode(_text(fields))
    return _text({name: value for name, value in read.items() if name != POINTS or value})


def decode(text: bytes) -> dict[str, Any]:
    """Parse metadata and check each field. The fingerprint stays as it is in JSON.

    Raises:
        FormatError: They are not those of a checkpoint.
        VersionError: The session version is not known.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the metadata is not JSON: {error}", offset=64) from None
    if not isinstance(fields, dict) or fields.keys() - {POINTS} != _FIELDS:
        raise FormatError("the fields of the metadata are not those of a checkpoint", offset=64)
    fields.setdefault(POINTS, [])
    for name, rule in _RULES.items():
        if not rule(fields[name]):
            raise FormatError(f"{name} must not be {reprlib.repr(fields[name])}", offset=64)
    if (fields["kind"] == "whole") != (fields["source"] is None):
        raise FormatError("a sequence has a source, a whole context has none", offset=64)
    if fields["packed tokens"] and fields["kind"] == "whole":
        raise FormatError("only of a sequence llama-server packs the token list", offset=64)
    if fields[POINTS] and fields["kind"] == "whole":
        raise FormatError("only a sequence has restore points", offset=64)
    if (version := fields["session version"]) not in layout.SEQUENCE_VERSION:
        raise VersionError("state", found=version, expected=[*layout.SEQUENCE_VERSION])
    Fingerprint.from_json(fields["fingerprint"])
    return fields


def point_fields(points: Sequence[RestorePoint]) -> list[list[int | None]]:
    """Return what metadata say of restore points, whose blobs follow the state in the payload."""
    return [[point.n_tokens, point.first, point.last, point.nbytes] for point in points]


def split_payload(payload: Buffer, fields: Sequence[Sequence[int]]) -> list[memoryview]:
    """Return the state in the payload of a container, and the blobs of its restore points.

    Of an empty payload, which could not be read, all are empty.

    Args:
        payload: The payload.
        fields: What the metadata say of the restore points.

    Raises:
        FormatError: It is too short for them.
    """
    view = flat(payload)
    ends = [len(view), *(-nbytes for *_, nbytes in reversed(fields))]
    places = list(accumulate(ends))[::-1]
    if view and places[0] < 0:
        raise FormatError(f"a payload of {len(view)} bytes, less than its restore points have")
    return [view[at:end] for at, end in pairwise([0, *places])]


def points_of(fields: Sequence[Sequence[int]], blobs: Sequence[Buffer]) -> tuple[RestorePoint, ...]:
    """Return restore points, of what metadata say of them and their blobs.

    Raises:
        FormatError: They are none.
    """
    return tuple(
        RestorePoint(n_tokens, blob, first, last)
        for (n_tokens, first, last, _), blob in zip(fields, blobs, strict=True)
    )


def checked_logits(logits: Buffer | None) -> memoryview[float] | None:
    """Return logits as read-only float32.

    Raises:
        FormatError: They are none, or no float32 values.
    """
    if logits is None:
        return None
    data = flat(logits)
    if not data or len(data) % _FLOAT:
        raise FormatError(f"{len(data)} bytes of logits are not one float32 for each token")
    return data.cast("f").toreadonly()


def _text(fields: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"meta must be a JSON object: {error}") from None
    return text.encode()


def _is_id(value: object) -> bool:
    return value is None or (type(value) is int and 0 <= value <= _MAX_ID)


def _is_point(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 4:
        return False
    n_tokens, first, last, nbytes = value
    positions = [last] if first is None else [first, last]
    return (
        all(type(number) is int and number >= 0 for number in (n_tokens, nbytes, *positions))
        and max(positions) < n_tokens <= _MAX_ID
    )


_RULES: Final[Mapping[str, Callable[[Any], bool]]] = {
    "kind": lambda value: value in ("whole", "sequence"),
    "source": _is_id,
    "session version": lambda value: type(value) is int,
    "logits of": _is_id,
    "packed tokens": lambda value: isinstance(value, bool),
    "meta": lambda value: isinstance(value, dict),
    POINTS: lambda value: isinstance(value, list) and all(map(_is_point, value)),
}
