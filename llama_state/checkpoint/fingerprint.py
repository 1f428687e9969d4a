"""Which model, and which settings of a context, a state belongs to.

llama.cpp records neither: other weights of the same shape restore without an error and go on with
nonsense. A fingerprint names what decides, field by field, by content and not by path. How each
field is computed: ``docs/formats.md``.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from struct import Struct
from typing import Final, NamedTuple, TypeAlias

from .. import layout
from .._io import StrPath
from .._io.reading import open_regular
from ..errors import Difference, FormatError, TruncatedError
from ..layout import gguf
from ..layout.cursor import U32, U64

__all__ = ["Fingerprint", "adapter_digest", "model_fields", "state_fields"]

MODEL_FILE: Final = "model file"
"""The name in :attr:`Fingerprint.unknown` that stands for every field read from the file."""

PLAIN: Final[Mapping[str, str]] = {"adapters": "none", "rope": "the model's own"}
"""Context fields of a context in which nothing changes what the model's file says."""

_SECTIONS = ("model", "context", "unknown")
_MAX_FIELDS = 1 << 16
_MAX_TEXT = 1 << 14
_LONG_TEXT = 1 << 12
_LONG_ARRAY = 1 << 10
_SMALL_TENSOR = 16 << 10
_SAMPLE = 4 << 10
_N_SAMPLE = 4
_ARRAY = Struct("<IQ")

# Model fields that llama.cpp tells where the file is not known, and that the file's own digests
# make superfluous; context fields that are no settings of what was computed.
_COMPARED_IF_BOTH = frozenset({"parameters", "tensor bytes"})
_ALWAYS_COMPARED = frozenset({"adapters", "rope"})
_NEVER_COMPARED = frozenset({"llama.cpp build"})

Stamp: TypeAlias = "tuple[tuple[str, int, int, int], ...]"
"""(real path, inode, size, mtime_ns) of each file of a model."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What decides whether a state means the same somewhere else.

    Attributes:
        model: Field -> text: the architecture, the hyperparameters by their GGUF keys, and digests
            of tokenizer and weights. Compared field by field.
        context: Field -> text: adapters, rope settings, kind of memory, types of the cache.
        unknown: What could not be learned -> why, or what to do so that it can. "model file"
            stands for all fields that only the model's file tells.
    """

    model: Mapping[str, str] = field(default_factory=dict)
    context: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The fingerprint as objects of strings, to be written as JSON."""
        return {name: dict(getattr(self, name)) for name in _SECTIONS}

    @classmethod
    def from_json(cls, value: object) -> Fingerprint:
        """The fingerprint that :meth:`to_json` gave.

        Raises:
            FormatError: It gave anything else.
        """
        if not isinstance(value, dict) or set(value) != set(_SECTIONS):
            raise FormatError(f"a fingerprint is an object of {', '.join(_SECTIONS)}")
        return cls(*(_checked(name, value[name]) for name in _SECTIONS))

    def differences(self, current: Fingerprint) -> list[Difference]:
        """Everything in which *current* is not known to be the same.

        A field of the model, the rope settings or the adapters that only one side knows is a
        difference: nothing that was not compared is called equal. What a state itself records
        (types of the cache, streams, ...) is compared where both sides know it.

        Returns:
            The differences of the model, then those of the context; none where all agrees.
        """
        if bool(self.model) != bool(current.model):
            # Nothing at all is recorded of one: one difference says so better than all fields.
            names = [side.model.get("architecture", "not recorded") for side in (self, current)]
            return [Difference("model", *names)]
        return [
            *_differing(self, current, "model", strict=self._strict_in_model(current)),
            *_differing(self, current, "context", strict=_ALWAYS_COMPARED),
        ]

    def _strict_in_model(self, current: Fingerprint) -> frozenset[str]:
        return frozenset((*self.model, *current.model)) - _COMPARED_IF_BOTH


def model_fields(path: StrPath) -> dict[str, str]:
    """What the file of a model says about it.

    Read are its header and samples of its tensors, once for each version of a file.

    Args:
        path: The GGUF file; of a split model any of its parts.

    Returns:
        Field -> text: "architecture", each hyperparameter by its GGUF key, "tokenizer",
        "tensor types", "tensor table" and "weights".

    Raises:
        OSError: The file, or a part of a split model, cannot be read.
        FormatError: Not a GGUF file, or damaged.
        UnsupportedError: It is big-endian.
    """
    return dict(read_model(file_stamp(path)).fields)


def adapter_digest(path: StrPath) -> str:
    """The digest of a LoRA adapter or control vector: of its settings and weights.

    Args:
        path: Its GGUF file.

    Returns:
        32 hexadecimal digits.

    Raises:
        OSError: It cannot be read.
        FormatError: Not a GGUF file, or damaged.
        UnsupportedError: It is big-endian.
    """
    return _adapter_digest(file_stamp(path))


def state_fields(parsed: layout.Layout) -> dict[str, str]:
    """What a state records of the context that it was saved from; little for an empty one.

    Returns:
        Field -> text: "module", "session version", and where known "streams",
        "flash attention", "type_k" and "type_v".
    """
    return {**geometry_fields(parsed.geometry), "session version": str(parsed.version)}


def geometry_fields(geometry: layout.Geometry) -> dict[str, str]:
    """The same of the part of a layout that is a property of the context."""
    caches = geometry.caches
    streams = {cache.n_stream for cache in caches} - {None}
    transposed = {cache.v_trans for cache in caches} - {None}
    fields = {"module": str(geometry.module)}
    if streams:
        fields["streams"] = _joined(streams)
    if transposed:
        fields["flash attention"] = "off" if True in transposed else "on"
    for name in "kv":
        # Compressors and recurrent states have types of their own.
        rows = (getattr(cache, name) for cache in caches if cache.v_trans is not None)
        if types := {layout.TYPES[type_id].name for row in rows for type_id, _ in row or ()}:
            fields[f"type_{name}"] = _joined(types)
    return fields


def file_stamp(path: StrPath) -> Stamp:
    """What changes when a file of the model at *path* is replaced.

    Raises:
        OSError: A file is not there.
    """
    return tuple(
        (os.path.realpath(part), info.st_ino, info.st_size, info.st_mtime_ns)
        for part in gguf.part_paths(path)
        for info in (part.stat(),)
    )


def shortened(text: str) -> str:
    """*text*, or its digest where it is long."""
    return text if len(text) <= _LONG_TEXT else f"sha256 {digest([text.encode()])}"


def digest(chunks: Iterable[bytes | memoryview]) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of *chunks*, one after the other."""
    hashed = hashlib.sha256()
    for chunk in chunks:
        hashed.update(chunk)
    return hashed.hexdigest()[:32]


def _checked(part: str, value: object) -> dict[str, str]:
    """The fields of one part of a fingerprint's JSON."""
    if not isinstance(value, dict) or len(value) > _MAX_FIELDS:
        raise FormatError(f"{part} of a fingerprint is no object of at most {_MAX_FIELDS} texts")
    for item in value.items():
        if not all(isinstance(text, str) and len(text) <= _MAX_TEXT for text in item):
            raise FormatError(
                f"{part} of a fingerprint has a name or value that is no text of at most "
                f"{_MAX_TEXT} characters"
            )
    return dict(value)


def _differing(
    saved: Fingerprint, current: Fingerprint, part: str, *, strict: frozenset[str]
) -> Iterator[Difference]:
    """Yield the differences of one part; one side is enough for the fields in *strict*."""
    ours: Mapping[str, str] = getattr(saved, part)
    theirs: Mapping[str, str] = getattr(current, part)
    for name in {**ours, **theirs}:
        both = name in ours and name in theirs
        if name in _NEVER_COMPARED or not (both or name in strict):
            continue
        if ours.get(name) != theirs.get(name):
            yield Difference(name, _shown(saved, ours, name), _shown(current, theirs, name))


def _shown(side: Fingerprint, fields: Mapping[str, str], name: str) -> str:
    if name in fields:
        return fields[name]
    why = side.unknown.get(name) or (fields is side.model and side.unknown.get(MODEL_FILE))
    return f"not known: {why}" if why else "not recorded"


class ModelFile(NamedTuple):
    """What is read of a model.

    Attributes:
        fields: Its :func:`model_fields`.
        told: What llama.cpp tells of it without the file: the architecture, hyperparameters
            that are no lists, parameters and bytes of all tensors.
        long_rope: It has rope factors of its own for contexts longer than the original ones.
    """

    fields: Mapping[str, str]
    told: Mapping[str, str]
    long_rope: bool


@lru_cache(maxsize=64)
def read_model(stamp: Stamp) -> ModelFile:
    """Read the files of a model."""
    paths = [path for path, *_ in stamp]
    header = gguf.read_header(paths)
    arch = _architecture(header)
    types = Counter(tensor.type for tensor in header.tensors)
    ordered = sorted(types.items(), key=lambda item: (-item[1], item[0]))
    values = _values(header, f"{arch}.") if arch else {}
    fields = {
        "architecture": arch,
        **values,
        "tokenizer": _tokenizer(header),
        "tensor types": ", ".join(f"{kind} x {count}" for kind, count in ordered),
        "tensor table": _tensor_table(header),
        "weights": _weights(paths, header),
    }
    told = {
        "architecture": arch,
        **{key: text for key, text in values.items() if header.keys[key].item is None},
        "parameters": str(sum(prod(tensor.shape) for tensor in header.tensors)),
        "tensor bytes": str(sum(tensor.nbytes for tensor in header.tensors)),
    }
    names = (tensor.name for tensor in header.tensors)
    return ModelFile(fields, told, any("rope_factors_long" in name for name in names))


@lru_cache(maxsize=64)
def _adapter_digest(stamp: Stamp) -> str:
    paths = [path for path, *_ in stamp]
    header = gguf.read_header(paths)
    arch = _architecture(header)
    fields = {
        "architecture": arch,
        **(_values(header, f"{arch}.") if arch else {}),
        **_values(header, "adapter."),
        "tensor table": _tensor_table(header),
        "weights": _weights(paths, header),
    }
    return digest(_packed(text) for item in sorted(fields.items()) for text in item)


def _architecture(header: gguf.GGUFHeader) -> str:
    value = header.keys.get("general.architecture")
    return value.text() if value is not None and value.item is None else ""


def _values(header: gguf.GGUFHeader, prefix: str) -> dict[str, str]:
    """The keys that begin with *prefix*, with their values as text."""
    return {
        key: _value_text(value)
        for key, value in sorted(header.keys.items())
        if key.startswith(prefix)
    }


def _value_text(value: gguf.Value) -> str:
    if value.item is not None and len(value.raw) > _LONG_ARRAY:
        return f"{value.count} values, sha256 {digest([value.raw])}"
    return shortened(value.text())


def _tokenizer(header: gguf.GGUFHeader) -> str:
    """The digest of what turns text into tokens, as its bytes in the file."""
    chunks: list[bytes | memoryview] = []
    for key, value in sorted(header.keys.items()):
        if key.startswith("tokenizer.ggml."):
            array = b"" if value.item is None else _ARRAY.pack(value.item, value.count)
            chunks += [_packed(key), U32.pack(value.type), array, value.raw]
    return digest(chunks)


def _tensor_table(header: gguf.GGUFHeader) -> str:
    """The digest of the names, types and shapes of all tensors."""
    return digest(
        chunk
        for tensor in sorted(header.tensors, key=lambda tensor: tensor.name)
        for chunk in (
            _packed(tensor.name),
            U32.pack(tensor.type_id),
            U32.pack(len(tensor.shape)),
            *map(U64.pack, tensor.shape),
        )
    )


def _weights(paths: Sequence[str], header: gguf.GGUFHeader) -> str:
    """The digest of samples of all tensors."""
    sampled: dict[str, bytes] = {}
    for part, path in enumerate(paths):
        with open_regular(path) as (file, _):
            for tensor in header.tensors:
                if tensor.part == part:
                    sampled[tensor.name] = _sampled(file.fileno(), tensor)
    return digest(chunk for name, own in sorted(sampled.items()) for chunk in (_packed(name), own))


def _sampled(fd: int, tensor: gguf.GGUFTensor) -> bytes:
    """The SHA-256 of all of a small tensor, and of some pieces of a large one."""
    hashed = hashlib.sha256()
    for at, size in _samples(tensor.nbytes):
        piece = os.pread(fd, size, tensor.offset + at)
        if len(piece) < size:
            raise TruncatedError(
                f"tensor {tensor.name!r}", need=tensor.nbytes, have=at + len(piece)
            )
        hashed.update(piece)
    return hashed.digest()


def _samples(nbytes: int) -> list[tuple[int, int]]:
    """(offset, length) of what is read of a tensor: its beginning, its end, and evenly between."""
    if nbytes <= _SMALL_TENSOR:
        return [(0, nbytes)]
    last = _N_SAMPLE - 1
    return [(i * (nbytes - _SAMPLE) // last, _SAMPLE) for i in range(_N_SAMPLE)]


def _packed(text: str) -> bytes:
    """*text* with its length before it, so that no two lists of texts have the same bytes."""
    data = text.encode()
    return U64.pack(len(data)) + data


def _joined(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, values)))
