"""Which model, and which settings of a context, a state belongs to.

llama.cpp records neither: a state restores without an error into a model of the same shape with
other weights, which then writes nonsense. A fingerprint describes model and settings field by
field, by content and not by path. ``docs/formats.md`` says how each field is computed.
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
from .._io.arguments import checked
from .._io.platform.files import read_at
from .._io.reading import open_regular
from ..errors import Difference, FormatError, TruncatedError
from ..layout import gguf
from ..layout.cursor import U32, U64
from ..layout.recognition import naming

__all__ = ["Fingerprint", "adapter_digest", "model_fields", "state_fields"]

MODEL_FILE: Final = "model file"
"""The key in :attr:`Fingerprint.unknown` for all the fields that are read from the file."""

ALL_WEIGHTS: Final = "all weights"
"""The model field of all bytes of the weights; "weights" is of samples."""

PLAIN: Final[Mapping[str, str]] = {"adapters": "none", "rope": "the model's own"}
"""Context fields of a context without adapters and with the model's own rope settings."""

_SECTIONS = ("model", "context", "unknown")
_MAX_FIELDS = 1 << 16
_MAX_TEXT = 1 << 14
_LONG_TEXT = 1 << 12
_LONG_ARRAY = 1 << 10
_SMALL_TENSOR = 16 << 10
_SAMPLE = 4 << 10
_PIECE = 1 << 20
_N_SAMPLE = 4
_ARRAY = Struct("<IQ")

# Model fields that llama.cpp gives for a model whose file is not known. The digests of the file
# make them superfluous.
_COMPARED_IF_BOTH = frozenset({"parameters", "tensor bytes"})
# What both sides must know: nothing else says whether a state means the same.
FROM_FILE: Final = ("tokenizer", "tensor types", "tensor table", "weights")
_DECLARED = ("adapters", "rope")
# The build changes nothing that is computed, and the kind of memory is a reading: that of a short
# state, or of a table, can be another one than that of a long state. A restore compares the bytes.
_NEVER_COMPARED = frozenset({"llama.cpp build", "module"})

Stamp: TypeAlias = "tuple[tuple[str, int, int, int], ...]"
"""(real path, inode, size, mtime_ns) of each file of a model."""


@checked
@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What must be equal for a state to mean the same in another context.

    Attributes:
        model: Field -> text: the architecture, the hyperparameters by their GGUF keys, and digests
            of tokenizer and weights. Compared field by field. "weights" is of samples of each
            tensor: it tells models apart, not a model from one with a few other bytes. That does
            "all weights", where it was asked for.
        context: Field -> text: adapters, rope settings, kind of memory, types of the cache.
        unknown: Field that is not known -> why, or what to do about it. "model file" stands for
            all the fields that are read from the model's file.
    """

    model: Mapping[str, str] = field(default_factory=dict)
    context: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Return the fingerprint as dictionaries of strings, to be written as JSON."""
        return {name: dict(getattr(self, name)) for name in _SECTIONS}

    @classmethod
    def from_json(cls, value: object) -> Fingerprint:
        """Return the fingerprint from the result of :meth:`to_json`.

        Raises:
            FormatError: *value* is not such a result.
        """
        if not isinstance(value, dict) or set(value) != set(_SECTIONS):
            raise FormatError(f"a fingerprint must be an object of {', '.join(_SECTIONS)}")
        return cls(*(_checked(name, value[name]) for name in _SECTIONS))

    def differences(self, current: Fingerprint) -> list[Difference]:
        """Return the fields that are not known to be equal in *current*.

        What is unknown on either side, or on both, is a difference: what was not compared is not
        equal. That goes for each field of the model, the rope settings, the adapters and whatever
        is in ``unknown``. What a state itself records (types of the cache, streams, ...) is
        compared if both sides know it.

        Returns:
            The differences of the model, then those of the context; empty if there are none. The
            text of a side that does not know a field says why, or what to do about it.
        """
        if not (self.model and current.model):
            # A side has no model fields at all: report that once, not for each field.
            names = [side.model.get("architecture", "not recorded") for side in (self, current)]
            return [Difference("model", *names)]
        of_model = self._needed_of_model(current)
        of_context = {*_DECLARED, *self.unknown, *current.unknown} - of_model - {MODEL_FILE}
        return [
            *_differing(self, current, "model", of_model),
            *_differing(self, current, "context", of_context),
        ]

    def _needed_of_model(self, current: Fingerprint) -> set[str]:
        told = {*self.model, *current.model}
        # If neither side knows the file, that is one difference, not four.
        of_file = FROM_FILE if told.intersection(FROM_FILE) else (MODEL_FILE,)
        needed = {"architecture", *of_file, *told} - _COMPARED_IF_BOTH
        return needed if ALL_WEIGHTS in self.model else needed - {ALL_WEIGHTS}


@checked
def model_fields(path: StrPath, *, full: bool = False) -> dict[str, str]:
    """Return the model fields of a fingerprint, from the model's file.

    Its header and samples of its tensors are read, once for each version of the file. Bytes
    between the samples do not count, unless *full* is given.

    Args:
        path: The GGUF file; of a split model any part.
        full: Read all bytes of the tensors, for "all weights".

    Returns:
        Field -> text: "architecture", each hyperparameter by its GGUF key, "tokenizer",
        "tensor types", "tensor table", "weights" (of samples), and with *full* "all weights".

    Raises:
        OSError: The file, or a part of a split model, cannot be read.
        FormatError: Not a GGUF file, or damaged.
        UnsupportedError: It is big-endian.
    """
    with naming(path):
        stamp = file_stamp(path)
        fields = dict(read_model(stamp).fields)
        return {**fields, ALL_WEIGHTS: all_weights(stamp)} if full else fields


@checked
def adapter_digest(path: StrPath, *, full: bool = False) -> str:
    """Return the digest of the settings and weights of a LoRA adapter or control vector.

    Args:
        path: Its GGUF file.
        full: Of all bytes of its tensors. A fingerprint has the digest of samples.

    Returns:
        32 hexadecimal digits.

    Raises:
        OSError: It cannot be read.
        FormatError: Not a GGUF file, or damaged.
        UnsupportedError: It is big-endian.
    """
    with naming(path):
        return _adapter_digest(file_stamp(path), full)


def state_fields(parsed: layout.Layout) -> dict[str, str]:
    """Return the context fields of a fingerprint that a state records: few if it is empty.

    Returns:
        Field -> text: "module", "session version", and if known "streams", "flash attention",
        "type_k" and "type_v".
    """
    return {**geometry_fields(parsed.geometry), "session version": str(parsed.version)}


def geometry_fields(geometry: layout.Geometry) -> dict[str, str]:
    """Return :func:`state_fields` of a geometry, without the session version."""
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
    """Return what changes if a file of the model at *path* is replaced.

    Raises:
        OSError: A file does not exist.
    """
    stamps = []
    for part in gguf.part_paths(path):
        info = part.stat()
        stamps.append((os.path.realpath(part), info.st_ino, info.st_size, info.st_mtime_ns))
    return tuple(stamps)


def shortened(text: str) -> str:
    """Return *text*, or its digest if it is long."""
    return text if len(text) <= _LONG_TEXT else f"sha256 {digest([text.encode()])}"


def digest(chunks: Iterable[bytes | memoryview]) -> str:
    """Return 32 hexadecimal digits: half the SHA-256 of *chunks*, joined."""
    hashed = hashlib.sha256()
    for chunk in chunks:
        hashed.update(chunk)
    return hashed.hexdigest()[:32]


def _checked(section: str, value: object) -> dict[str, str]:
    """Return the fields of a section of a fingerprint's JSON, if they are valid."""
    if not isinstance(value, dict) or len(value) > _MAX_FIELDS:
        raise FormatError(
            f"{section} of a fingerprint must be an object of at most {_MAX_FIELDS} texts"
        )
    for item in value.items():
        if not all(isinstance(text, str) and len(text) <= _MAX_TEXT for text in item):
            raise FormatError(
                f"names and values in {section} of a fingerprint must be texts of at most "
                f"{_MAX_TEXT} characters"
            )
    return dict(value)


def _differing(
    saved: Fingerprint, current: Fingerprint, section: str, needed: set[str]
) -> Iterator[Difference]:
    """Yield the differences of a section; those in *needed* must be known to both sides."""
    a: Mapping[str, str] = getattr(saved, section)
    b: Mapping[str, str] = getattr(current, section)
    for name in dict.fromkeys((*a, *b, *sorted(needed))):
        both = name in a and name in b
        if name in _NEVER_COMPARED or not (both or name in needed):
            continue
        if not both or a[name] != b[name]:
            yield Difference(name, _shown(saved, a, name), _shown(current, b, name))


def _shown(side: Fingerprint, fields: Mapping[str, str], name: str) -> str:
    if name in fields:
        return fields[name]
    why = side.unknown.get(name) or (fields is side.model and side.unknown.get(MODEL_FILE))
    return f"not known: {why}" if why else "not recorded"


class ModelFile(NamedTuple):
    """What the file of a model says.

    Attributes:
        fields: Its :func:`model_fields`.
        reported: The fields that llama.cpp gives without the file: the architecture,
            hyperparameters that are not lists, and the numbers of parameters and bytes of all
            tensors.
        long_rope: Whether it has other rope factors for contexts longer than the original one.
    """

    fields: Mapping[str, str]
    reported: Mapping[str, str]
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
    reported = {
        "architecture": arch,
        **{key: text for key, text in values.items() if header.keys[key].item is None},
        "parameters": str(sum(prod(tensor.shape) for tensor in header.tensors)),
        "tensor bytes": str(sum(tensor.nbytes for tensor in header.tensors)),
    }
    names = (tensor.name for tensor in header.tensors)
    return ModelFile(fields, reported, any("rope_factors_long" in name for name in names))


@lru_cache(maxsize=64)
def all_weights(stamp: Stamp) -> str:
    """Return the digest of all bytes of all tensors of a model."""
    paths = [path for path, *_ in stamp]
    return _weights(paths, gguf.read_header(paths), full=True)


@lru_cache(maxsize=64)
def _adapter_digest(stamp: Stamp, full: bool) -> str:
    paths = [path for path, *_ in stamp]
    header = gguf.read_header(paths)
    arch = _architecture(header)
    fields = {
        "architecture": arch,
        **(_values(header, f"{arch}.") if arch else {}),
        **_values(header, "adapter."),
        "tensor table": _tensor_table(header),
        "weights": _weights(paths, header, full=full),
    }
    return digest(_packed(text) for item in sorted(fields.items()) for text in item)


def _architecture(header: gguf.GGUFHeader) -> str:
    value = header.keys.get("general.architecture")
    return value.text() if value is not None and value.item is None else ""


def _values(header: gguf.GGUFHeader, prefix: str) -> dict[str, str]:
    """Return the keys that start with *prefix*, with their values as text."""
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
    """Return the digest of the tokenizer: its keys and values, as their bytes in the file."""
    chunks: list[bytes | memoryview] = []
    for key, value in sorted(header.keys.items()):
        if key.startswith("tokenizer.ggml."):
            array = b"" if value.item is None else _ARRAY.pack(value.item, value.count)
            chunks += [_packed(key), U32.pack(value.type), array, value.raw]
    return digest(chunks)


def _tensor_table(header: gguf.GGUFHeader) -> str:
    """Return the digest of the names, types and shapes of all tensors."""
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


def _weights(paths: Sequence[str], header: gguf.GGUFHeader, *, full: bool = False) -> str:
    """Return the digest of samples of all tensors, or of all of their bytes."""
    pieces = _pieces if full else _samples
    hashes: dict[str, bytes] = {}
    for part, path in enumerate(paths):
        with open_regular(path) as (file, _):
            for tensor in header.tensors:
                if tensor.part == part:
                    hashes[tensor.name] = _hashed(file.fileno(), tensor, pieces(tensor.nbytes))
    return digest(chunk for name, own in sorted(hashes.items()) for chunk in (_packed(name), own))


def _hashed(fd: int, tensor: gguf.GGUFTensor, pieces: Iterable[tuple[int, int]]) -> bytes:
    """Return the SHA-256 of pieces of a tensor."""
    hashed = hashlib.sha256()
    for at, size in pieces:
        piece = read_at(fd, size, tensor.offset + at)
        if len(piece) < size:
            raise TruncatedError(
                f"tensor {tensor.name!r}", need=tensor.nbytes, have=at + len(piece)
            )
        hashed.update(piece)
    return hashed.digest()


def _samples(nbytes: int) -> list[tuple[int, int]]:
    """Return (offset, length) of each sample: the start, the end, and evenly between them."""
    if nbytes <= _SMALL_TENSOR:
        return [(0, nbytes)]
    last = _N_SAMPLE - 1
    return [(i * (nbytes - _SAMPLE) // last, _SAMPLE) for i in range(_N_SAMPLE)]


def _pieces(nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of pieces that are together the whole tensor."""
    for at in range(0, nbytes, _PIECE):
        yield at, min(_PIECE, nbytes - at)


def _packed(text: str) -> bytes:
    """Return *text* after its length: then different lists of texts have different bytes."""
    data = text.encode()
    return U64.pack(len(data)) + data


def _joined(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, values)))
