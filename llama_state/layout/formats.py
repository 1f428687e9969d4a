"""The constants of the state format: versions, magic numbers, limits, tensor types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from types import MappingProxyType

from ..errors import FormatError, UnsupportedError

SEQUENCE_VERSION: Mapping[int, int] = MappingProxyType({9: 2, 10: 3, 11: 4})
"""Session version -> the sequence version of the same llama.cpp."""

EXT_WORDS: Mapping[int, int] = MappingProxyType({9: 2, 10: 3, 11: 3})
"""Session version -> extra words of an M-RoPE cell: x, y and, from version 10 on, the token."""

WHOLE_FILE_MAGIC = 0x6767736E
SEQUENCE_FILE_MAGIC = 0x67677371
SEQUENCE_MAGIC = 0xAF143CD8
"""The first word of a sequence blob."""

DSV4_MAGIC = 0x34565344

SEQUENCE_HEAD = Struct("<Ii")
"""The head of the blob of one sequence: magic, sequence id."""

MAX_SEQUENCES = 256
"""The largest number of sequences in a context."""

MAX_LAYERS = 512
MAX_ARCH_BYTES = 64
MAX_POSITION = 2**31 - 2
"""llama.cpp can neither remove a cell at the next position, INT32_MAX, nor decode after it."""

F32 = 0


@dataclass(frozen=True, slots=True)
class TensorType:
    """A ggml type that can occur in a cache: *elements* values are stored in *nbytes* bytes."""

    name: str
    elements: int
    nbytes: int

    def values(self, nbytes: int) -> int:
        """Return how many values *nbytes* bytes of this type hold."""
        return nbytes // self.nbytes * self.elements


TYPES: Mapping[int, TensorType] = MappingProxyType(
    {
        F32: TensorType("f32", 1, 4),
        1: TensorType("f16", 1, 2),
        30: TensorType("bf16", 1, 2),
        2: TensorType("q4_0", 32, 18),
        3: TensorType("q4_1", 32, 20),
        6: TensorType("q5_0", 32, 22),
        7: TensorType("q5_1", 32, 24),
        8: TensorType("q8_0", 32, 34),
        20: TensorType("iq4_nl", 32, 18),
    }
)
"""Type id of ggml -> the type."""


def require_version(version: int) -> None:
    """Raise UnsupportedError unless *version* is a known session version."""
    if version not in SEQUENCE_VERSION:
        known = ", ".join(map(str, SEQUENCE_VERSION))
        raise UnsupportedError(f"session version {version} is not known (known: {known})")


def tensor_type(type_id: int, what: str, offset: int) -> TensorType:
    """Return the type of an id; raise FormatError if no cache can have it."""
    if type_id not in TYPES:
        raise FormatError(f"{what}: unknown tensor type {type_id}", offset=offset)
    return TYPES[type_id]


def check_row(type_id: int, row: int, what: str, offset: int) -> None:
    """Raise FormatError unless a row of *row* bytes is whole blocks of a known type."""
    block = tensor_type(type_id, what, offset)
    if row % block.nbytes:
        raise FormatError(f"{what}: a row of {row} bytes is not whole {block.name}", offset=offset)


def check_layers(n_layer: int, what: str, offset: int) -> None:
    """Raise FormatError if no model has *n_layer* layers."""
    if n_layer > MAX_LAYERS:
        raise FormatError(f"{what}: {n_layer} layers", offset=offset)
