"""An object of a store: a piece of a state, the tokens that it belongs to, and digests of both.

``docs/formats.md`` describes every byte.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from xxhash import xxh3_128

from .. import layout
from .._io.buffers import flat
from ..errors import ChecksumError, FormatError, TruncatedError, VersionError
from .prompt import KEY_SIZE

if TYPE_CHECKING:
    from .._io import Buffer

Kind: TypeAlias = Literal["R", "W", "S", "L", "N", "P"]
"""A group of a state's pieces; "L": logits; "N": the description of a namespace; "P": a pin."""

KINDS: Final[tuple[Kind, ...]] = ("R", "W", "S", "L", "N", "P")
MAGIC: Final = b"\x89LLSP\r\n\x1a"
VERSION: Final = 1
PAGE: Final = 4096
MAX_WORDS: Final = 1 << 20
_DIGEST: Final = 16
_END: Final = 24  # where a header has it
_HEAD_SIZE: Final = layout.SEQUENCE_HEAD.size
KEYED: Final = 1

HEADER = Struct("<8sHcBIIiiI32s32s32sQ16s")
assert HEADER.size % 4 == 0

NO_PARENT: Final = bytes(KEY_SIZE)


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """What an object is found by.

    Attributes:
        parent: Key of the prefix that it goes on from.
        key: Key of the prefix that ends with it.
        n_positions: Positions of its tokens.
        kind: What it holds.
    """

    parent: bytes
    key: bytes
    n_positions: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Header:
    """What an object says of itself.

    Attributes:
        name: What it is found by.
        root: Key of its namespace.
        words: Its tokens, as they are hashed.
        first: First position that it has rows of; where the sequence goes on, for what has none.
        end: The position behind the last one.
        session_version: Of the llama.cpp that wrote the piece; 0 for what is none.
        nbytes: Bytes of the payload.
        digest: Digest of the payload.
        size: Bytes of header, tokens and padding.
    """

    name: Name
    root: bytes
    words: bytes
    first: int
    end: int
    session_version: int
    nbytes: int
    digest: bytes
    size: int

    @property
    def whole(self) -> int:
        """Bytes of all of it."""
        return self.size + self.nbytes

    @property
    def start(self) -> int:
        """The position of its first token."""
        return self.end - self.name.n_positions


Seal: TypeAlias = "Callable[[Iterable[Buffer]], bytes]"
"""Buffers that follow one another -> their digest of 16 bytes."""


def sealer(secret: bytes | None) -> Seal:
    """Return what digests objects: XXH3-128, or half of an HMAC-SHA256 for a store with a key."""
    if secret is not None:
        return lambda parts: _updated(hmac.new(secret, b"object", hashlib.sha256), parts)[:_DIGEST]
    return lambda parts: _updated(xxh3_128(), parts)


def _updated(hasher: Any, parts: Iterable[Buffer]) -> bytes:
    for part in parts:
        hasher.update(part)
    return bytes(hasher.digest())


def header_size(n_bytes_of_words: int) -> int:
    """Return the bytes before the payload, which ends no page that a header begins."""
    need = HEADER.size + _DIGEST + n_bytes_of_words + _HEAD_SIZE
    return -(-need // PAGE) * PAGE


def head_size(n_bytes_of_words: int) -> int:
    """Return the bytes that :func:`parse` needs."""
    return HEADER.size + _DIGEST + n_bytes_of_words


def end_of(data: Buffer) -> int | None:
    """Return the position at which an object says that it ends; None where it is none."""
    view = flat(data)
    if len(view) < HEADER.size or bytes(view[: len(MAGIC)]) != MAGIC:
        return None
    return int.from_bytes(view[_END : _END + 4], "little", signed=True)


def pack(
    name: Name,
    root: bytes,
    words: bytes,
    parts: Iterable[Buffer],
    seal: Seal,
    *,
    first: int,
    end: int,
    session_version: int,
    keyed: bool,
) -> list[Buffer]:
    """Return an object as buffers that follow one another; see :class:`Header`.

    The payload of a piece stands behind the head of a sequence blob, of sequence 0.
    """
    views = [flat(part) for part in parts]
    fields = HEADER.pack(
        MAGIC,
        VERSION,
        name.kind.encode(),
        KEYED if keyed else 0,
        len(words) // 4,
        name.n_positions,
        first,
        end,
        session_version,
        name.key,
        name.parent,
        root,
        sum(map(len, views)),
        seal(views),
    )
    head = fields + seal([fields, words]) + words
    return [head + _padding(len(words)), *views]


def _padding(n_bytes_of_words: int) -> bytes:
    """Return what lies between the tokens and the payload: zeros, and the head of a blob."""
    used = HEADER.size + _DIGEST + n_bytes_of_words + _HEAD_SIZE
    return bytes(header_size(n_bytes_of_words) - used) + layout.sequence_head(0)


def parse(data: Buffer, seal: Seal, *, keyed: bool) -> Header:
    """Return the header of an object.

    Args:
        data: At least its first bytes: header and tokens.

    Raises:
        FormatError: It is none.
        VersionError: It is one of a later llama_state.
        TruncatedError: It ends before its payload.
        ChecksumError: The header is damaged, or was made with another key.
    """
    view = flat(data)
    if len(view) < HEADER.size:
        raise TruncatedError("the header of an object", need=HEADER.size, have=len(view))
    magic, version, kind, flags, n_words, n_positions, *rest = HEADER.unpack_from(view)
    first, end, session_version, key, parent, root, nbytes, digest = rest
    if magic != MAGIC:
        raise FormatError("not an object of a prefix store", offset=0)
    if version != VERSION:
        raise VersionError("object of a prefix store", found=version, expected=VERSION, offset=8)
    if bool(flags & KEYED) != keyed:
        made = "with a key" if flags & KEYED else "without a key"
        raise FormatError(f"this object was made {made}, the store is opened otherwise", offset=11)
    if flags & ~KEYED:
        raise FormatError(f"unknown flags in the header of an object: {flags:#x}", offset=11)
    if n_words > MAX_WORDS or kind.decode("latin-1") not in KINDS:
        raise FormatError("no header of an object", offset=10)
    at = HEADER.size + _DIGEST
    words = bytes(view[at : at + 4 * n_words])
    if len(words) < 4 * n_words:
        raise TruncatedError("the tokens of an object", need=at + 4 * n_words, have=len(view))
    sealed = seal([view[: HEADER.size], words])
    if not hmac.compare_digest(sealed, bytes(view[HEADER.size : at])):
        raise ChecksumError("the header of an object is damaged, or of another key", offset=0)
    name = Name(parent, key, n_positions, kind.decode())
    size = header_size(len(words))
    return Header(name, root, words, first, end, session_version, nbytes, digest, size)


def payload(data: memoryview, header: Header, seal: Seal) -> memoryview:
    """Return the payload of a whole object, verified, with the head of a blob before it.

    Raises:
        TruncatedError: It is not as long as its header says.
        ChecksumError: It is damaged.
    """
    need = header.whole
    if len(data) != need:
        raise TruncatedError("an object", need=need, have=len(data))
    between = data[HEADER.size + _DIGEST + len(header.words) : header.size]
    if between != _padding(len(header.words)):
        raise ChecksumError("an object is damaged before its payload", offset=HEADER.size)
    if not hmac.compare_digest(seal([data[header.size :]]), header.digest):
        raise ChecksumError("the payload of an object is damaged", offset=header.size)
    return data[header.size - _HEAD_SIZE :]
