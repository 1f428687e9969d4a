"""The checkpoint container: one state with all that is needed to trust it.

A header, metadata as JSON, tokens, logits, the payload on a page boundary, a table of digests, and
a footer that commits it all. ``docs/formats.md`` describes every byte. This module does not
interpret the metadata and the payload.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from .._io.buffers import anonymous, flat
from .._io.threads import Threads
from ..errors import ChecksumError, FormatError, TruncatedError, VersionError
from ..layout.recognition import CHECKPOINT_MAGIC as MAGIC
from . import compression, digests
from .digests import Digest

if TYPE_CHECKING:
    from .._io import Buffer, Progress

__all__ = ["Container", "Part", "is_container", "open_container", "pack"]

MARK: Final = b"\x1aLLSTend"
VERSION: Final = 1
KEYED, COMPRESSED, PLANES = 1, 2, 4
PAGE: Final = 4096
CHUNK: Final = 4 << 20
MAX_CHUNK: Final = 64 << 20
RAW, ZSTD = 0, 1
KEEP_BELOW: Final = 0.98  # of a chunk's size: a frame that saves less is not worth its time
ONE_THREAD: Final = 4 * CHUNK  # up to this size one thread is done before a pool has started
MAX_SHRINK: Final = 1024  # a reader needs at most this times the file's size of memory

HEADER = Struct("<8sHHIQQQQ16s")
ENTRY = Struct("<16sQII")
COUNTS = Struct("<QQQ")
FOOTER_SIZE: Final = COUNTS.size + digests.SIZE + len(MARK)
HEAD_PARTS: Final = ("metadata", "tokens", "logits")

Method: TypeAlias = Literal["raw", "zstd"]
_METHODS: Final[tuple[Method, Method]] = ("raw", "zstd")


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a container with its own digest.

    Attributes:
        name: "metadata" (with the header), "tokens", "logits", or "payload chunk I of N".
        offset: Where it starts in the container.
        stored: Its length in the container.
        nbytes: Its length when decompressed; equal to *stored* if it is not compressed.
        method: How it is stored.
        digest: Its 16 bytes.
    """

    name: str
    offset: int
    stored: int
    nbytes: int
    method: Method
    digest: bytes

    @property
    def end(self) -> int:
        """Where it ends in the container."""
        return self.offset + self.stored


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed header: flags and counts, and the places of the parts that follow from them."""

    flags: int
    chunk: int
    n_metadata: int
    n_tokens: int
    n_logits: int
    n_payload: int

    @property
    def keyed(self) -> bool:
        """Whether the digests are keyed."""
        return bool(self.flags & KEYED)

    @property
    def compressed(self) -> bool:
        """Whether chunks of the payload can be compressed."""
        return bool(self.flags & COMPRESSED)

    @property
    def planes(self) -> bool:
        """Whether the frames are of byte planes."""
        return bool(self.flags & PLANES)

    @property
    def tokens_offset(self) -> int:
        """Where the tokens start, after header and metadata."""
        return _aligned(HEADER.size + self.n_metadata, 8)

    @property
    def logits_offset(self) -> int:
        """Where the logits start."""
        return _aligned(self.tokens_offset + 4 * self.n_tokens, 8)

    @property
    def payload_offset(self) -> int:
        """Where the payload starts."""
        return _aligned(self.logits_offset + 4 * self.n_logits, PAGE)

    @property
    def n_chunks(self) -> int:
        """The number of chunks of the payload."""
        return -(-self.n_payload // self.chunk)

    def pack(self) -> bytes:
        """Return the bytes of the header."""
        counts = (self.n_metadata, self.n_tokens, self.n_logits, self.n_payload)
        return HEADER.pack(MAGIC, VERSION, self.flags, self.chunk, *counts, bytes(16))


class Container:
    """A container whose structure was checked. Its parts are verified by :meth:`verify`.

    Attributes:
        data: The whole container.
        keyed: Whether its digests are keyed.
        compressed: Whether chunks of the payload can be compressed.
        planes: Whether the compressed ones are of byte planes; in the first files they are not.
        parts: Its parts with their digests, in order.
    """

    def __init__(
        self, data: memoryview, header: Header, parts: tuple[Part, ...], digest: Digest
    ) -> None:
        self.data = data
        self.keyed: bool = header.keyed
        self.compressed: bool = header.compressed
        self.planes: bool = header.planes
        self.parts = parts
        self._header = header
        self._digest = digest

    @property
    def metadata(self) -> memoryview:
        """A JSON object, as UTF-8 text."""
        return self.data[HEADER.size : HEADER.size + self._header.n_metadata]

    @property
    def tokens(self) -> memoryview:
        """The tokens, int32."""
        start = self._header.tokens_offset
        return self.data[start : start + 4 * self._header.n_tokens].cast("i")

    @property
    def logits(self) -> memoryview[float]:
        """The logits of the last token, float32, or empty."""
        start = self._header.logits_offset
        return self.data[start : start + 4 * self._header.n_logits].cast("f")

    def payload(self) -> memoryview:
        """Return the payload: a view, or new memory if chunks are compressed.

        Raises:
            FormatError: A compressed chunk is not a frame of the right size.
        """
        start, size = self._header.payload_offset, self._header.n_payload
        if not self.compressed or size == 0:
            return self.data[start : start + size]
        out, at = memoryview(anonymous(size)), 0
        for part in self.parts[len(HEAD_PARTS) :]:
            chunk: Buffer = self.data[part.offset : part.end]
            if part.method == "zstd":
                chunk = compression.decompress(chunk, part.nbytes, planes=self.planes)
            out[at : at + part.nbytes] = chunk
            at += part.nbytes
        return out.toreadonly()

    def damaged(self, progress: Progress | None = None) -> Iterator[Part]:
        """Verify all parts; yield those that are not what was written.

        Args:
            progress: Called after each part with the bytes verified and the bytes in total.
        """
        done, total = 0, sum(part.stored for part in self.parts)
        for part, intact in self._results():
            if not intact:
                yield part
            done += part.stored
            if progress is not None:
                progress(done, total)

    def verify(self, progress: Progress | None = None) -> None:
        """Compare every part with its digest.

        Args:
            progress: See :meth:`damaged`.

        Raises:
            ChecksumError: A part is not what was written.
        """
        for part in self.damaged(progress):
            raise ChecksumError(f"{part.name} is not what was written", offset=part.offset)

    def _results(self) -> Iterator[tuple[Part, bool]]:
        """Yield each part, and whether it is what was written."""
        if len(self.data) <= ONE_THREAD:
            yield from ((part, self._is_intact(part)) for part in self.parts)
            return
        # Threads help, since the digests release the GIL.
        with Threads(min(4, os.cpu_count() or 1)) as threads:
            asked = [(part, threads.ask(partial(self._is_intact, part))) for part in self.parts]
            for part, answer in asked:
                yield part, answer.result()

    def _is_intact(self, part: Part) -> bool:
        return hmac.compare_digest(self._digest(self.data[part.offset : part.end]), part.digest)


def pack(
    metadata: bytes,
    payload: Buffer,
    *,
    tokens: Buffer = b"",
    logits: Buffer = b"",
    more: Sequence[Buffer] = (),
    key: bytes | None = None,
    compress: bool = False,
    chunk: int = CHUNK,
) -> Iterator[Buffer]:
    """Yield the bytes of a container, piece by piece, in one pass over the payload.

    Args:
        metadata: A JSON object, as UTF-8 text.
        payload: The state.
        tokens: int32 values.
        logits: float32 values.
        more: What follows the state in the payload.
        key: Authenticate with this key: 16 bytes or more.
        compress: Compress the byte planes of the chunks that get at least 2 % smaller.
        chunk: Size of the chunks of the payload: a multiple of 4096, up to 64 MiB.

    Raises:
        ValueError: The key is too short.
        UnsupportedError: *compress* needs zstandard, which is not installed.
    """
    views = [flat(part) for part in (payload, *more)]
    token_bytes, logit_bytes = (bytes(flat(part)) for part in (tokens, logits))
    flags = (KEYED if key is not None else 0) | (COMPRESSED | PLANES if compress else 0)
    counts = (len(metadata), len(token_bytes) // 4, len(logit_bytes) // 4, sum(map(len, views)))
    functions = digests.plain() if key is None else digests.keyed(key)
    if compress:
        compression.require()
    heads = (metadata, token_bytes, logit_bytes)
    return _pieces(Header(flags, chunk, *counts), heads, views, *functions)


class _Table:
    """The table of digests of a container that is being written."""

    def __init__(self, digest: Digest) -> None:
        self._digest = digest
        self.entries = bytearray()
        self.end = 0
        """Where the last part ends."""

    def add(self, part: Buffer, method: int = RAW) -> Buffer:
        """Add the entry of the next part; return the part."""
        size = len(memoryview(part))
        self.entries += ENTRY.pack(self._digest(part), size, method, 0)
        self.end += size
        return part


def _pieces(
    header: Header,
    heads: tuple[bytes, bytes, bytes],
    payload: Sequence[memoryview],
    digest: Digest,
    table_digest: Digest,
) -> Iterator[Buffer]:
    """Yield the bytes of the container that consists of these parts."""
    table = _Table(digest)
    head = header.pack()
    ends = (header.tokens_offset, header.logits_offset, header.payload_offset)
    for part, end in zip((head + heads[0], *heads[1:]), ends, strict=True):
        yield table.add(part.ljust(end - table.end, b"\0"))
    for raw in _chunks(payload, header.chunk):
        frame = compression.compress(raw) if header.compressed else b""
        if len(raw) / MAX_SHRINK <= len(frame) < KEEP_BELOW * len(raw):
            yield table.add(frame, ZSTD)
        else:
            yield table.add(raw)
    table_offset = _aligned(table.end, 8)
    yield bytes(table_offset - table.end) + table.entries
    n_entries, size = len(table.entries) // ENTRY.size, len(table.entries) + FOOTER_SIZE
    counts = COUNTS.pack(table_offset, n_entries, table_offset + size)
    yield counts + table_digest(head + table.entries + counts) + MARK


def _chunks(views: Sequence[memoryview], size: int) -> Iterator[memoryview | bytes]:
    """Yield the bytes of *views*, one after the other, in chunks; copied where they meet."""
    pending: list[memoryview] = []
    room = size
    for view in views:
        at = 0
        while at < len(view):
            pending.append(view[at : at + room])
            at += len(pending[-1])
            room -= len(pending[-1])
            if not room:
                yield _joined(pending)
                pending, room = [], size
    if pending:
        yield _joined(pending)


def _joined(views: Sequence[memoryview]) -> memoryview | bytes:
    return views[0] if len(views) == 1 else b"".join(views)


def at_most(
    n_metadata: int, n_payload: int, *, n_tokens: int = 0, n_logits: int = 0, chunk: int = CHUNK
) -> int:
    """Return an upper bound of the bytes that :func:`pack` yields."""
    header = Header(0, chunk, n_metadata, n_tokens, n_logits, n_payload)
    entries = ENTRY.size * (len(HEAD_PARTS) + header.n_chunks)
    return _aligned(header.payload_offset + n_payload, 8) + entries + FOOTER_SIZE


def is_container(data: Buffer) -> bool:
    """Return whether *data* starts like a container."""
    return bytes(flat(data)[: len(MAGIC)]) == MAGIC


def is_keyed(data: Buffer) -> bool:
    """Return whether *data* starts like a container that can be opened only with a key."""
    view = flat(data)
    return is_container(view) and len(view) >= HEADER.size and bool(view[10] & KEYED)


def open_container(
    data: Buffer, *, key: bytes | None = None, max_size: int | None = None
) -> Container:
    """Check the structure of a container, but not its parts: :meth:`Container.verify` does.

    Args:
        data: The whole container.
        key: The key that it must be authenticated with. None: it must not be authenticated.
        max_size: The most bytes that its payload may have when it is decompressed.

    Raises:
        FormatError: Not a container, or one that was not finished, or larger than *max_size*.
        VersionError: Its version is not known.
        TruncatedError: It is cut off.
        ChecksumError: The table of digests is damaged; or the key is missing, wrong or not
            needed. Then only the fixed header and the footer were read.
    """
    view = flat(data).toreadonly()
    header = _read_header(view)
    if max_size is not None and header.n_payload > max_size:
        reason = f"a state of {header.n_payload:,} bytes, more than max_size={max_size:,} allows"
        raise FormatError(reason, offset=HEADER.size - 24)
    digest, table_digest = _choose_digest(header, key)
    table, n_entries = _read_footer(view)
    digest_at = len(view) - FOOTER_SIZE + COUNTS.size
    signed = bytes(view[: HEADER.size]) + bytes(view[table:digest_at])
    found = view[digest_at : digest_at + digests.SIZE]
    if not hmac.compare_digest(table_digest(signed), found):
        reason = "its table of digests is damaged"
        if key is not None:
            reason = "the key is not the one that it was saved with, or it was changed since"
        raise ChecksumError(reason, offset=table)
    _check_counts(header, len(view))
    if n_entries != len(HEAD_PARTS) + header.n_chunks:
        raise FormatError(f"a table of {n_entries} parts", offset=table)
    return Container(view, header, tuple(_read_table(view, header, table)), digest)


def _read_header(view: memoryview) -> Header:
    start = bytes(view[: len(MAGIC)])
    if start != MAGIC[: len(start)] or not start:
        raise FormatError("not a checkpoint", offset=0)
    if len(view) < HEADER.size:
        raise TruncatedError("checkpoint header", need=HEADER.size, have=len(view))
    _, version, flags, chunk, *counts, reserved = HEADER.unpack_from(view)
    if version != VERSION:
        raise VersionError("checkpoint", found=version, expected=VERSION, offset=8)
    if flags & ~(KEYED | COMPRESSED | PLANES) or any(reserved):
        reason = f"a checkpoint with features that this version does not know (flags {flags:#x}): "
        raise FormatError(f"{reason}update llama_state", offset=10)
    if flags & PLANES and not flags & COMPRESSED:
        raise FormatError("byte planes in a checkpoint that is not compressed", offset=10)
    if not 0 < chunk <= MAX_CHUNK or chunk % PAGE:
        raise FormatError(f"payload chunks of {chunk} bytes", offset=12)
    return Header(flags, chunk, *counts)


def _check_counts(header: Header, size: int) -> None:
    """Raise TruncatedError unless the counts are possible in a container of *size* bytes."""
    head = header.payload_offset
    payload = 0 if header.compressed else header.n_payload
    if head + payload > size or header.n_payload > MAX_SHRINK * size:
        raise TruncatedError("checkpoint", need=head + header.n_payload, have=size)


def _choose_digest(header: Header, key: bytes | None) -> tuple[Digest, Digest]:
    if header.keyed and key is None:
        raise ChecksumError("it is authenticated with a key: pass key=", offset=10)
    if key is not None and not header.keyed:
        raise ChecksumError("it is not authenticated: the key cannot be checked", offset=10)
    return digests.plain() if key is None else digests.keyed(key)


def _read_footer(view: memoryview) -> tuple[int, int]:
    """Read the footer; return where the table starts and its number of entries."""
    footer = len(view) - FOOTER_SIZE
    if footer < HEADER.size:
        raise TruncatedError("checkpoint", need=HEADER.size + FOOTER_SIZE, have=len(view))
    if bytes(view[-len(MARK) :]) != MARK:
        raise FormatError("no commit mark at the end: cut off, or not finished", offset=footer)
    table, n_entries, size = COUNTS.unpack_from(view, footer)
    if size != len(view):
        raise TruncatedError("checkpoint", need=size, have=len(view))
    if not HEADER.size <= table <= footer or footer - table != n_entries * ENTRY.size:
        raise FormatError("its table of digests is damaged", offset=footer)
    return table, n_entries


def _read_table(view: memoryview, header: Header, table: int) -> Iterator[Part]:
    at = 0
    entries = ENTRY.iter_unpack(view[table : len(view) - FOOTER_SIZE])
    expected = _expected(header)
    for (name, nbytes), (digest, stored, method, reserved) in zip(expected, entries, strict=True):
        possible = stored == nbytes
        if method == ZSTD and header.compressed and name not in HEAD_PARTS:
            possible = nbytes / MAX_SHRINK <= stored < nbytes
        if method not in (RAW, ZSTD) or reserved or not possible or at + stored > table:
            raise FormatError(
                f"an impossible entry for {name} in the table of digests", offset=table
            )
        yield Part(name, at, stored, nbytes, _METHODS[method], digest)
        at += stored
    if table != _aligned(at, 8) or any(view[at:table]):
        raise FormatError("the parts do not end where the table of digests starts", offset=at)


def _expected(header: Header) -> Iterator[tuple[str, int]]:
    """Yield the name and the size of each part."""
    start = 0
    ends = (header.tokens_offset, header.logits_offset, header.payload_offset)
    for name, end in zip(HEAD_PARTS, ends, strict=True):
        yield name, end - start
        start = end
    for index in range(header.n_chunks):
        rest = header.n_payload - index * header.chunk
        yield f"payload chunk {index + 1} of {header.n_chunks}", min(header.chunk, rest)


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
