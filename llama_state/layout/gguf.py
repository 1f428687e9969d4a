"""The headers of GGUF files: keys and tensor table, without the tensors.

Files are not trusted: every length is compared with the file's size before it is used, and no more
than :data:`MAX_HEADER` is read, however long the file is.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from math import prod
from pathlib import Path
from struct import Struct
from types import MappingProxyType
from typing import Final

from .._io import StrPath
from .._io.reading import open_regular
from ..errors import FormatError, TruncatedError, UnsupportedError, VersionError
from . import TYPES, TensorType
from .cursor import U32, U64, Cursor
from .recognition import GGUF_MAGIC, recognize

MAX_HEADER: Final = 1 << 28
"""The most bytes of a header that are read; the largest vocabularies take about 32 MiB."""

_VERSIONS = (2, 3)
_BIG_ENDIAN = tuple(version << 24 for version in _VERSIONS)
_PIECE = 1 << 20
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_DIMENSIONS = 4
_MAX_NAME = 1 << 10
_MAX_PARTS = 1 << 10

# GGUF value types.
_U32, _F32, _BOOL, _STRING, _ARRAY, _F64 = 4, 6, 7, 8, 9, 12
_NUMBER = {
    0: Struct("<B"),
    1: Struct("<b"),
    2: Struct("<H"),
    3: Struct("<h"),
    _U32: U32,
    5: Struct("<i"),
    _F32: Struct("<f"),
    _BOOL: Struct("<?"),
    10: U64,
    11: Struct("<q"),
    _F64: Struct("<d"),
}
TENSOR_TYPES: Mapping[int, TensorType] = MappingProxyType(
    {
        **TYPES,
        10: TensorType("q2_K", 256, 84),
        11: TensorType("q3_K", 256, 110),
        12: TensorType("q4_K", 256, 144),
        13: TensorType("q5_K", 256, 176),
        14: TensorType("q6_K", 256, 210),
        16: TensorType("iq2_xxs", 256, 66),
        17: TensorType("iq2_xs", 256, 74),
        18: TensorType("iq3_xxs", 256, 98),
        19: TensorType("iq1_s", 256, 50),
        21: TensorType("iq3_s", 256, 110),
        22: TensorType("iq2_s", 256, 82),
        23: TensorType("iq4_xs", 256, 136),
        24: TensorType("i8", 1, 1),
        25: TensorType("i16", 1, 2),
        26: TensorType("i32", 1, 4),
        27: TensorType("i64", 1, 8),
        28: TensorType("f64", 1, 8),
        29: TensorType("iq1_m", 256, 56),
        34: TensorType("tq1_0", 256, 54),
        35: TensorType("tq2_0", 256, 66),
        39: TensorType("mxfp4", 32, 17),
        40: TensorType("nvfp4", 64, 36),
        41: TensorType("q1_0", 128, 18),
    }
)
"""ggml type id -> type: those that a cache can have, and those of weights only."""


@dataclass(frozen=True, slots=True)
class Value:
    """The value of a key, as its bytes.

    Attributes:
        type: GGUF value type.
        item: GGUF value type of the items of an array; None if it is not an array.
        count: Number of items of an array; 1 if it is not an array.
        raw: The bytes in the file: the items of an array, a string with its length.
    """

    type: int
    item: int | None
    count: int
    raw: memoryview

    def text(self) -> str:
        """Return the value as ``llama_model_meta_val_str`` does."""
        items = self._items()
        if self.item is None:
            return _up_to_nul(items[0])
        if self.item == _STRING:
            items = ['"' + item.replace("\\", "\\\\").replace('"', '\\"') + '"' for item in items]
        return _up_to_nul(f"[{', '.join(items)}]")

    def number(self) -> int:
        """Return the value of an integer key.

        Raises:
            FormatError: It is not an integer.
        """
        form = _NUMBER.get(self.type)
        if form is None or self.type in (_F32, _BOOL, _F64):
            raise FormatError(f"a value of type {self.type} instead of an integer")
        return int(form.unpack(self.raw)[0])

    def _items(self) -> list[str]:
        kind = self.type if self.item is None else self.item
        if kind == _STRING:
            return list(_strings(self.raw, self.count))
        return [_number_text(kind, number) for (number,) in _NUMBER[kind].iter_unpack(self.raw)]


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """An entry of the tensor table.

    Attributes:
        shape: Values along each dimension, in GGUF's order.
        type_id: ggml type.
        part: Index of the file of the model that it is in.
        offset: Where its bytes start in that file.
        nbytes: Length in bytes; if its type is not in :data:`TENSOR_TYPES`, up to the next tensor.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    part: int
    offset: int
    nbytes: int

    @property
    def type(self) -> str:
        """The name of its type."""
        kind = TENSOR_TYPES.get(self.type_id)
        return kind.name if kind else f"type {self.type_id}"


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The keys and tensor table of a model: of one GGUF file, or of all parts of a split one."""

    keys: Mapping[str, Value]
    tensors: tuple[GGUFTensor, ...]


def part_paths(path: StrPath) -> list[Path]:
    """Return the paths of all files of a model, given one of them; only the name is looked at."""
    given = Path(path)
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", given.name, re.DOTALL)
    if match is None or not 1 <= int(match[2]) <= int(match[3]) <= _MAX_PARTS:
        return [given]
    n_part = int(match[3])
    return [given.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, n_part + 1)]


def read_header(paths: Sequence[StrPath]) -> GGUFHeader:
    """Read the header of a model.

    Args:
        paths: Its files, from :func:`part_paths`.

    Returns:
        The keys of the first file and the tensors of all.

    Raises:
        OSError: A file cannot be read; the error names it.
        FormatError: Not a GGUF file, damaged, or parts that do not belong together.
        TruncatedError: A file ends before its tensors do.
        UnsupportedError: A file is big-endian.
    """
    keys: Mapping[str, Value] = {}
    tensors: dict[str, GGUFTensor] = {}
    for part, path in enumerate(paths):
        try:
            own, table = _read_one(path, part)
            _check_part(own, part, len(paths))
        except FormatError as error:
            if len(paths) > 1:  # else the caller knows by which name it was asked for
                error.of_file(path)
            raise
        keys = keys or own
        for tensor in table:
            if tensor.name in tensors:
                raise FormatError(f"{Path(path).name}: tensor {tensor.name!r} occurs twice")
            tensors[tensor.name] = tensor
    n_tensor = keys.get("split.tensors.count")
    if len(paths) > 1 and n_tensor and n_tensor.number() != len(tensors):
        raise FormatError(f"{len(tensors)} tensors instead of {n_tensor.number()}")
    return GGUFHeader(keys, tuple(tensors.values()))


class _HeaderCursor(Cursor):
    """A cursor that reads a file forward, no further than it is asked to."""

    __slots__ = ("_file", "_size", "filled")

    def __init__(self, file: FileIO, size: int) -> None:
        # Pages take memory only when they are written to; and a view of them never moves.
        super().__init__(memoryview(mmap.mmap(-1, min(size, MAX_HEADER) or 1)))
        self.end = min(size, MAX_HEADER)
        self.filled = 0
        self._file = file
        self._size = size

    def require(self, nbytes: int, what: str) -> None:
        """Read what is missing of the next *nbytes*; errors as :meth:`Cursor.require`."""
        if self.end < self._size and nbytes > self.end - self.at:
            raise FormatError(f"{what}: a header of more than {self.end} bytes", offset=self.at)
        super().require(nbytes, what)
        while self.filled < self.at + nbytes:
            got = self._file.readinto(self.view[self.filled : min(self.filled + _PIECE, self.end)])
            if not got:
                raise TruncatedError(
                    "the file shrank while it was read", need=self.end, have=self.filled
                )
            self.filled += got

    def u64(self, what: str) -> int:
        """Read one unsigned 64-bit number."""
        number: int = self.read(U64, what)[0]
        return number

    def name(self, what: str) -> str:
        """Read a string that is a name."""
        offset = self.at
        length = self.u64(what)
        if length > _MAX_NAME:
            raise FormatError(f"{what} of {length} bytes", offset=offset)
        start = self.skip(length, what)
        try:
            return str(self.view[start : self.at], "utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{what} is not UTF-8", offset=start) from None

    def skip_strings(self, count: int, what: str) -> None:
        """Step over *count* strings."""
        self.require(8 * count, what)  # a length each, at least
        # Local names: a vocabulary has several 100,000 strings.
        unpack, view, at, filled = U64.unpack_from, self.view, self.at, self.filled
        for _ in range(count):
            if at + 8 > filled:
                self.at = at
                self.require(8, what)
                filled = self.filled
            at += 8 + unpack(view, at)[0]
        self.at = at
        self.require(0, what)


def _read_one(path: StrPath, part: int) -> tuple[Mapping[str, Value], list[GGUFTensor]]:
    with open_regular(path) as (file, size):
        cursor = _HeaderCursor(file, size)
        n_tensor, n_key = _read_preamble(cursor)
        keys = _read_keys(cursor, n_key)
        return keys, _read_tensors(cursor, n_tensor, part, size, _alignment(keys))


def _read_preamble(cursor: _HeaderCursor) -> tuple[int, int]:
    """Read what precedes the keys; return the numbers of tensors and of keys."""
    start = cursor.skip(len(GGUF_MAGIC), "magic")
    if bytes(cursor.view[start : cursor.at]) != GGUF_MAGIC:
        found = recognize(cursor.view[start:])
        raise FormatError(f"this is {found.what}, not a GGUF file: {found.use}", offset=start)
    version = cursor.u32("version")
    if version in _BIG_ENDIAN:
        raise UnsupportedError("a big-endian GGUF file")
    if version not in _VERSIONS:
        raise VersionError("GGUF", found=version, expected=_VERSIONS, offset=start + 4)
    n_tensor, n_key = cursor.u64("tensor count"), cursor.u64("key count")
    if n_tensor > _MAX_TENSORS or n_key > _MAX_KEYS:
        raise FormatError(f"{n_tensor} tensors and {n_key} keys", offset=8)
    return n_tensor, n_key


def _read_keys(cursor: _HeaderCursor, n_key: int) -> dict[str, Value]:
    keys: dict[str, Value] = {}
    for _ in range(n_key):
        offset = cursor.at
        name = cursor.name("key")
        if name in keys:
            raise FormatError(f"key {name!r} occurs twice", offset=offset)
        keys[name] = _read_value(cursor, name)
    return keys


def _read_value(cursor: _HeaderCursor, name: str) -> Value:
    offset = cursor.at
    kind, item, count = cursor.u32(name), None, 1
    if kind == _ARRAY:
        item, count = cursor.u32(name), cursor.u64(name)
    of = kind if item is None else item
    start = cursor.at
    if of == _STRING:
        cursor.skip_strings(count, name)
    elif of in _NUMBER:
        cursor.skip(count * _NUMBER[of].size, name)
    else:
        raise FormatError(f"{name}: value type {of}", offset=offset)
    return Value(kind, item, count, cursor.view[start : cursor.at])


def _alignment(keys: Mapping[str, Value]) -> int:
    value = keys.get("general.alignment")
    if value is None:
        return 32
    alignment = value.number() if value.type == _U32 else 0
    if alignment <= 0 or alignment & (alignment - 1):
        raise FormatError("an alignment that is not a power of two")
    return alignment


def _read_tensors(
    cursor: _HeaderCursor, n_tensor: int, part: int, size: int, alignment: int
) -> list[GGUFTensor]:
    entries = [_read_entry(cursor) for _ in range(n_tensor)]
    begin = -(-cursor.at // alignment) * alignment
    ends = sorted({begin + offset for *_, offset in entries} | {size})
    following = dict(pairwise(ends))
    tensors = []
    for name, shape, type_id, offset in entries:
        start = begin + offset
        nbytes = _nbytes(name, shape, type_id)
        if nbytes is None:
            nbytes = following.get(start, start) - start
        if start + nbytes > size:
            raise TruncatedError(f"tensor {name!r}", need=start + nbytes, have=size)
        tensors.append(GGUFTensor(name, shape, type_id, part, start, nbytes))
    return tensors


def _read_entry(cursor: _HeaderCursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read the name, shape, type and offset of a tensor."""
    name = cursor.name("tensor name")
    offset = cursor.at
    n_dimension = cursor.u32(name)
    if n_dimension > _MAX_DIMENSIONS:
        raise FormatError(f"tensor {name!r} of {n_dimension} dimensions", offset=offset)
    shape = tuple(cursor.u64(name) for _ in range(n_dimension))
    return name, shape, cursor.u32(name), cursor.u64(name)


def _nbytes(name: str, shape: tuple[int, ...], type_id: int) -> int | None:
    """Return the bytes of a tensor, None if its type is not known."""
    if (kind := TENSOR_TYPES.get(type_id)) is None:
        return None
    row = shape[0] if shape else 1
    if row % kind.elements:
        raise FormatError(f"tensor {name!r}: rows of {row} values are not whole {kind.name}")
    return prod(shape) // kind.elements * kind.nbytes


def _check_part(keys: Mapping[str, Value], part: int, n_part: int) -> None:
    """Raise FormatError unless the keys are those of part *part*, from 0, of *n_part*."""
    count, number = (keys[name].number() if name in keys else None for name in _SPLIT_KEYS)
    if (count or 1) != n_part:
        raise FormatError(f"one of {count or 1} parts by its keys, one of {n_part} by its name")
    if n_part > 1 and number != part:
        raise FormatError(f"part {number} by its keys, part {part} by its name")


_SPLIT_KEYS = ("split.count", "split.no")


def _strings(raw: memoryview, count: int) -> Iterator[str]:
    at = 0
    for _ in range(count):
        start = at + 8
        at = start + U64.unpack_from(raw, at)[0]
        yield str(raw[start:at], "utf-8", "replace")


def _number_text(kind: int, number: float) -> str:
    """Return a number as llama.cpp writes one of the GGUF type *kind*."""
    if kind == _BOOL:
        return "true" if number else "false"
    return f"{number:f}" if kind in (_F32, _F64) else str(number)


def _up_to_nul(text: str) -> str:
    """Return *text* as C sees it: up to its first NUL."""
    return text.partition("\0")[0]
