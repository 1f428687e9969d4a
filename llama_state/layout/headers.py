"""The header of the two native files: three integers and a token list, before the payload."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Literal

from .._io.arguments import checked
from ..errors import FormatError, TruncatedError, VersionError
from .cursor import open_view
from .formats import (
    SEQUENCE_FILE_MAGIC,
    SEQUENCE_HEAD,
    SEQUENCE_MAGIC,
    SEQUENCE_VERSION,
    WHOLE_FILE_MAGIC,
)

if TYPE_CHECKING:
    from .._io import Buffer

Kind = Literal["whole", "sequence"]
"""What a state holds: a whole context, or one sequence."""

HEAD = Struct("<III")  # magic, version, n_tokens
TOKEN_BYTES = 4
_MAGIC: dict[Kind, int] = {"whole": WHOLE_FILE_MAGIC, "sequence": SEQUENCE_FILE_MAGIC}
_VERSIONS: dict[Kind, tuple[int, ...]] = {
    "whole": tuple(SEQUENCE_VERSION),
    "sequence": tuple(SEQUENCE_VERSION.values()),
}


@dataclass(frozen=True, slots=True)
class FileHeader:
    """The header of a state file: what precedes the payload.

    Attributes:
        kind: "whole" (session file) or "sequence".
        version: The version in the file: a session version, or a sequence version.
        n_tokens: Length of the token list.
        payload_offset: Bytes before the payload.
    """

    kind: Kind
    version: int
    n_tokens: int
    payload_offset: int

    @property
    def is_known(self) -> bool:
        """Whether the version is known."""
        return self.version in _VERSIONS[self.kind]

    @property
    def session_version(self) -> int:
        """The session version; of a sequence file, the one that belongs to its sequence version."""
        return list(SEQUENCE_VERSION)[_VERSIONS[self.kind].index(self.version)]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """How a state's blob lies over its file.

    Most blobs of one sequence begin with a head that a file does not have. Laid over the file
    with the payload in its place, such a blob begins where the file's header ends: its head
    covers the last bytes of the header. So a file is read, or written, without moving the payload.

    Attributes:
        payload_offset: Bytes before the payload in the file.
        head_size: Bytes before the payload in the blob.
    """

    payload_offset: int
    head_size: int

    @property
    def blob_offset(self) -> int:
        """Where in the file the blob begins."""
        return self.payload_offset - self.head_size

    def file_size(self, blob_size: int) -> int:
        """Return the bytes of the file for a blob of *blob_size* bytes."""
        return self.blob_offset + blob_size

    def payload(self, blob: memoryview) -> memoryview:
        """Return the part of *blob* that the file has."""
        return blob[self.head_size :]


@checked
def sequence_head(source: int) -> bytes:
    """Return the head of the blob of a sequence whose id was *source*."""
    return SEQUENCE_HEAD.pack(SEQUENCE_MAGIC, source)


@checked
def parse_file_header(
    data: Buffer, *, size: int | None = None, any_version: bool = False
) -> FileHeader:
    """Read the header of a state file.

    Args:
        data: The file, or its first 12 bytes or more.
        size: Bytes of the whole file; default: the length of *data*.
        any_version: Accept unknown versions: the caller checks the version.

    Raises:
        FormatError: Not a state file.
        VersionError: A version that is not known.
        TruncatedError: The file is shorter than its header says.
    """
    view = open_view(data)
    size = len(view) if size is None else size
    if min(size, len(view)) < HEAD.size:
        raise TruncatedError("state file header", need=HEAD.size, have=min(size, len(view)))
    magic, version, n_tokens = HEAD.unpack_from(view)
    kind = next((kind for kind, number in _MAGIC.items() if number == magic), None)
    if kind is None:
        raise FormatError(f"not a llama.cpp state file (magic {magic:#010x})", offset=0)
    if not any_version:
        _check_version(kind, version)
    payload_offset = HEAD.size + TOKEN_BYTES * n_tokens
    if payload_offset > size:
        what = f"list of {n_tokens} tokens"
        raise TruncatedError(what, need=payload_offset, have=size, offset=HEAD.size)
    return FileHeader(kind, version, n_tokens, payload_offset)


@checked
def unpack_tokens(data: Buffer, header: FileHeader) -> array[int]:
    """Return the token list of a file whose first ``header.payload_offset`` bytes are in *data*."""
    view = open_view(data)
    if len(view) < header.payload_offset:
        raise TruncatedError("token list", need=header.payload_offset, have=len(view))
    tokens = array("i")
    tokens.frombytes(view[HEAD.size : header.payload_offset])
    return tokens


@checked
def token_array(tokens: Iterable[int]) -> array[int]:
    """Return *tokens* as int32 values.

    Raises:
        FormatError: A value is not a 32-bit integer.
    """
    try:
        return array("i", [operator.index(token) for token in tokens])
    except (OverflowError, TypeError) as error:
        raise FormatError(f"tokens must be 32-bit integers: {error}") from error


@checked
def pack_file_header(kind: Kind, version: int, tokens: array[int] | bytes = b"") -> bytes:
    """Return the header of a state file: the bytes before the payload.

    Args:
        kind: "whole" or "sequence".
        version: The session version, or for a sequence file the sequence version.
        tokens: int32 values, as ``array("i")`` or as their bytes.

    Raises:
        ValueError: *tokens* is not int32 values.
    """
    raw = open_view(tokens)
    if len(raw) % TOKEN_BYTES or getattr(tokens, "itemsize", TOKEN_BYTES) != TOKEN_BYTES:
        raise ValueError("tokens must be int32 values")
    return HEAD.pack(_MAGIC[kind], version, len(raw) // TOKEN_BYTES) + raw


def _check_version(kind: Kind, version: int) -> None:
    if version not in _VERSIONS[kind]:
        what = "session file" if kind == "whole" else "sequence file"
        raise VersionError(what, found=version, expected=_VERSIONS[kind], offset=4)
