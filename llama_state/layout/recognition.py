"""Say what a file is by its first bytes, and what reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Final

from .._io.arguments import checked
from ..errors import (
    CapacityError,
    FormatError,
    MismatchError,
    RestoreError,
    TruncatedError,
    UnsupportedError,
)
from .cursor import open_view
from .formats import SEQUENCE_FILE_MAGIC, SEQUENCE_MAGIC, WHOLE_FILE_MAGIC
from .slots import NULL_TOKEN

if TYPE_CHECKING:
    from .._io import Buffer, StrPath

CHECKPOINT_MAGIC: Final = b"\x89LLST\r\n\x1a"
GGUF_MAGIC: Final = b"GGUF"
# Magic, version, length of the token list, first token.
_NATIVE = Struct("<IIIi")
_NATIVE_HEAD: Final = 12
_ARCH_START = re.compile(rb"[\x02-\x40]\0\0\0[A-Za-z0-9_.-]{2}")
_UNPACK: Final = "unpack it first"
# What is said of the state in a file, and not of the call or the context.
_OF_FILES: Final = (FormatError, MismatchError, CapacityError, RestoreError, UnsupportedError)


@dataclass(frozen=True, slots=True)
class Recognized:
    """What a file seems to be.

    Attributes:
        kind: "checkpoint", "session file", "sequence file", "slot file", "whole blob",
            "sequence blob", "model", "packed", "empty", "cut" or "unknown".
        what: The same in words.
        use: What to do with it.
    """

    kind: str
    what: str
    use: str


_CHECKPOINT = Recognized(
    "checkpoint", "a checkpoint", "load it with Checkpoint.load() and give that to Context.resume()"
)
_SESSION = Recognized(
    "session file",
    "a whole state file (session file)",
    "load it with Context.load_state() or Checkpoint.from_native()",
)
_SEQUENCE = Recognized(
    "sequence file",
    "a sequence state file",
    "load it with Context.seq_load_state() or Checkpoint.from_native()",
)
_SLOT = Recognized("slot file", "a slot file of llama-server", _SEQUENCE.use)
_WHOLE_BLOB = Recognized(
    "whole blob", "the bytes of a snapshot", "read them and give them to Context.restore()"
)
_SEQUENCE_BLOB = Recognized(
    "sequence blob",
    "the bytes of a snapshot of a sequence",
    "read them and give them to Context.seq_restore()",
)
_EMPTY = Recognized("empty", "empty", "nothing was saved to it")
_CUT = Recognized("cut", "cut off after its first bytes", "save it again")

_STARTS: Final = {
    CHECKPOINT_MAGIC: _CHECKPOINT,
    WHOLE_FILE_MAGIC.to_bytes(4, "little"): _SESSION,
    SEQUENCE_FILE_MAGIC.to_bytes(4, "little"): _SEQUENCE,
    SEQUENCE_MAGIC.to_bytes(4, "little"): _SEQUENCE_BLOB,
    GGUF_MAGIC: Recognized("model", "a GGUF file (a model)", "load it with Model()"),
    b"PK\x03\x04": Recognized("packed", "a ZIP file", _UNPACK),
    b"\x1f\x8b": Recognized("packed", "a gzip file", _UNPACK),
    b"\x28\xb5\x2f\xfd": Recognized("packed", "a Zstandard file", _UNPACK),
}
_WANTED: Final = {
    "checkpoint": _CHECKPOINT.what,
    "session file": _SESSION.what,
    "sequence file": _SEQUENCE.what,
    "model": "a GGUF file",
}


@checked
def recognize(data: Buffer) -> Recognized:
    """Say what a file is.

    Args:
        data: The file, or its first 16 bytes or more.
    """
    start = bytes(open_view(data)[: _NATIVE.size])
    if not start:
        return _EMPTY
    for magic, found in _STARTS.items():
        if start.startswith(magic):
            return _of_tokens(start) if found is _SEQUENCE else found
    if any(magic.startswith(start) for magic in _STARTS):
        return _CUT
    if _ARCH_START.match(start):
        return _WHOLE_BLOB
    return Recognized(
        "unknown",
        f"no file that llama_state knows: it begins with the bytes {start[:8].hex(' ')}",
        "inspect_file() looks further",
    )


def expect(path: StrPath, data: Buffer, *kinds: str) -> None:
    """Raise an error, with the way to read it, unless the file is of one of *kinds*.

    Args:
        path: Its name.
        data: Its bytes.
        kinds: Of :attr:`Recognized.kind`; the first is named in the error.

    Raises:
        TruncatedError: It is empty, or too short to say.
        FormatError: It is something else.
    """
    found = recognize(data)
    if found.kind in kinds:
        return
    wanted = _WANTED[kinds[0]]
    if found.kind in ("empty", "cut"):
        reason = f"the file is {found.what}, not {wanted}: {found.use}"
        have = len(open_view(data))
        raise TruncatedError(reason, need=_NATIVE_HEAD, have=have).of_file(path)
    raise FormatError(f"this is {found.what}, not {wanted}: {found.use}").of_file(path)


@contextmanager
def naming(path: StrPath) -> Iterator[None]:
    """Put the name of the file into what the block says of its bytes, or does with them."""
    try:
        yield
    except _OF_FILES as error:
        error.of_file(path)
        raise


def _of_tokens(start: bytes) -> Recognized:
    if len(start) < _NATIVE.size:
        return _SEQUENCE
    _, _, n_tokens, first = _NATIVE.unpack(start)
    return _SLOT if n_tokens and first == NULL_TOKEN else _SEQUENCE
