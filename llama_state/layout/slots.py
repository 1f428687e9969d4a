"""The packed token list of llama-server's slot files.

A slot file is a sequence file. Since August 2026 llama-server packs the prompt into its token list:
such a list starts with -1, which is not a token, and can hold images and sounds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from struct import Struct
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from .._io.arguments import checked
from ..errors import FormatError, TruncatedError, VersionError
from .cursor import Cursor, open_view
from .headers import HEAD, FileHeader, Kind, pack_file_header, unpack_tokens

if TYPE_CHECKING:
    from .._io import Buffer

NULL_TOKEN = -1
"""The first word of a packed list. In its tokens: a token of an image or a sound."""

_VERSION = 1
_WORD = 4
_CHUNK_VERSIONS = (1, 2)  # they differ only in what is not read here
_CHUNK_KINDS: dict[int, Literal["image", "audio"]] = {1: "image", 2: "audio"}
_CHUNK_HEAD = Struct("<QIQ")
_IMAGE_HEAD = Struct("<5IQ")
_AUDIO_HEAD = Struct("<IQ")
_FLAG = Struct("<?")
_MAX_ID_BYTES = 256


@dataclass(frozen=True, slots=True)
class MediaChunk:
    """An image or a sound in a prompt. Slot files do not hold its pixels or samples.

    Attributes:
        start: Index of its first token.
        n_tokens: Number of its tokens.
        offset: Where its description starts, in bytes from the start of the packed list.
        nbytes: Length of the description.
        kind: "image" or "audio"; None for a description of an unknown version.
        grid: Columns and rows of tokens of an image; None if not known.
        id: llama-server's name for it, a hash of its content; None if not known.
    """

    start: int
    n_tokens: int
    offset: int
    nbytes: int
    kind: Literal["image", "audio"] | None = None
    grid: tuple[int, int] | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class SlotTokens:
    """The prompt of a slot.

    Attributes:
        version: Version of the packed list.
        tokens: The tokens of the prompt; -1 for each token of an image or a sound.
        media: The images and sounds, in order.
    """

    version: int
    tokens: array[int]
    media: tuple[MediaChunk, ...]


class Prompt(NamedTuple):
    """What a token list says of the prompt.

    Attributes:
        words: The list as it is in the file.
        slot: What llama-server packed into it; None for a list of tokens.
    """

    words: array[int]
    slot: SlotTokens | None = None

    @property
    def listed(self) -> array[int]:
        """The tokens; -1 for each token of an image or a sound."""
        return self.slot.tokens if self.slot else self.words

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that give the state when they are decoded; none where there are media."""
        return () if self.media else tuple(self.listed)

    @property
    def media(self) -> tuple[MediaChunk, ...]:
        """The images and sounds, in order."""
        return self.slot.media if self.slot else ()


NO_PROMPT: Final = Prompt(array("i"))
"""Where no token list says anything of it."""


@checked
def is_packed(tokens: Sequence[int]) -> bool:
    """Return whether the token list of a sequence file is a packed one."""
    return len(tokens) > 0 and tokens[0] == NULL_TOKEN


@checked
def listed_tokens(data: Buffer, header: FileHeader) -> Prompt:
    """Return what the token list of a session, sequence or slot file says of the prompt.

    Args:
        data: The file, or its first ``header.payload_offset`` bytes or more.
        header: Its header.

    Raises:
        FormatError: The list is a packed one, and damaged or of a version that is not known.
    """
    words = unpack_tokens(data, header)
    try:
        return read_prompt(header.kind, words)
    except FormatError as error:
        raise error.moved(HEAD.size) from None


def read_prompt(kind: Kind, words: array[int]) -> Prompt:
    """Return what the token list *words* of a file of a *kind* of state says of the prompt."""
    packed = kind == "sequence" and is_packed(words)
    return Prompt(words, parse_slot_tokens(words) if packed else None)


def pack_listed(kind: Kind, version: int, words: array[int]) -> bytes:
    """Return the header of a state file whose token list can be read again.

    Raises:
        FormatError: It could not: the first token is -1, as in a packed list.
    """
    try:
        read_prompt(kind, words)
    except FormatError as error:
        raise FormatError(
            f"a token list that starts with -1 must be one of llama-server: {error.reason}"
        ) from None
    return pack_file_header(kind, version, words)


def given_prompt(tokens: array[int], packed: array[int]) -> Prompt:
    """Return the prompt of which the caller has given the tokens, the packed list, or both."""
    if not packed:
        return Prompt(tokens)
    try:
        prompt = Prompt(packed, parse_slot_tokens(packed))
    except FormatError as error:
        raise FormatError(f"packed_tokens: {error.reason}") from None
    if tokens and tuple(tokens) != prompt.tokens:
        raise FormatError("the tokens are not those of packed_tokens")
    return prompt


@checked
def parse_slot_tokens(data: Buffer) -> SlotTokens:
    """Parse the packed token list of a slot file.

    Args:
        data: The token list of the file, as ``array("i")`` or as its bytes.

    Raises:
        FormatError: Not a packed list, or damaged. Offsets count from the start of *data*.
        VersionError: A version that is not known.
        TruncatedError: A part does not fit into *data*.
    """
    cursor = Cursor(open_view(data))
    if cursor.u32("marker of a packed token list") != NULL_TOKEN % 2**32:
        raise FormatError("not a packed token list", offset=0)
    if (version := cursor.u32("version of a packed token list")) != _VERSION:
        raise VersionError("packed token list", found=version, expected=_VERSION, offset=_WORD)
    tokens = _read_words(cursor, "i", "tokens")
    starts = _read_words(cursor, "I", "media")
    _check_starts(tokens, starts, offset=2 * _WORD)
    media = tuple(_read_chunks(cursor, starts, _lengths(tokens, starts)))
    if cursor.end - cursor.at >= _WORD or any(cursor.view[cursor.at :]):
        raise FormatError("bytes after a packed token list", offset=cursor.at)
    return SlotTokens(version, tokens, media)


def _read_words(cursor: Cursor, typecode: Literal["i", "I"], what: str) -> array[int]:
    count = cursor.u32(f"count of {what}")
    start = cursor.skip(_WORD * count, f"{count} {what}")
    words = array(typecode)
    words.frombytes(cursor.view[start : cursor.at])
    return words


def _check_starts(tokens: array[int], starts: array[int], *, offset: int) -> None:
    """Raise FormatError unless chunks are in order and every run of -1 starts with one."""
    if any(a >= b for a, b in pairwise(starts)):
        raise FormatError("media of a packed token list are not in order", offset=offset)
    if any(start >= len(tokens) or tokens[start] != NULL_TOKEN for start in starts):
        raise FormatError(
            "media of a packed token list do not start at a media token", offset=offset
        )
    chunk_starts = set(starts)
    for index, token in enumerate(tokens):
        if token >= 0 or index in chunk_starts:
            continue
        if token != NULL_TOKEN or index == 0 or tokens[index - 1] != NULL_TOKEN:
            raise FormatError(f"token {token} in a packed token list", offset=offset)


def _lengths(tokens: array[int], starts: array[int]) -> list[int]:
    """Return the number of tokens of each chunk: it ends at the next chunk or text token."""
    lengths = []
    for start, limit in zip(starts, [*starts[1:], len(tokens)], strict=False):
        end = start
        while end < limit and tokens[end] == NULL_TOKEN:
            end += 1
        lengths.append(end - start)
    return lengths


def _read_chunks(cursor: Cursor, starts: array[int], lengths: list[int]) -> Iterator[MediaChunk]:
    for start, n_tokens in zip(starts, lengths, strict=True):
        nbytes = cursor.u32("size of a media chunk")
        if not nbytes:
            raise FormatError("an empty media chunk", offset=cursor.at - _WORD)
        offset = cursor.skip(nbytes, "media chunk")
        kind, grid, name = _describe(Cursor(cursor.view[offset : cursor.at]))
        yield MediaChunk(start, n_tokens, offset, nbytes, kind, grid, name)


def _describe(
    chunk: Cursor,
) -> tuple[Literal["image", "audio"] | None, tuple[int, int] | None, str | None]:
    """Return kind, grid and id of a media chunk, None for each that cannot be read.

    Only the start of a chunk is read: the rest is for the encoder of llama.cpp.
    """
    try:
        version, kind_id, n_text = chunk.read(_CHUNK_HEAD, "media chunk")
        kind = _CHUNK_KINDS.get(kind_id) if version in _CHUNK_VERSIONS else None
        if kind is None or n_text:
            return kind, None, None
        has_image = chunk.read(_FLAG, "media chunk")[0]
        if kind == "image" and has_image:
            columns, rows, _, _, _, length = chunk.read(_IMAGE_HEAD, "image")
            return kind, (columns, rows), _read_id(chunk, length)
        if kind == "audio" and not has_image and chunk.read(_FLAG, "media chunk")[0]:
            return kind, None, _read_id(chunk, chunk.read(_AUDIO_HEAD, "audio")[1])
    except TruncatedError:
        kind = None
    return kind, None, None


def _read_id(chunk: Cursor, length: int) -> str:
    start = chunk.skip(length, "media id")
    name = bytes(chunk.view[start : min(chunk.at, start + _MAX_ID_BYTES)])
    return name.decode("utf-8", "backslashreplace")
