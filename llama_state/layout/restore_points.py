"""What llama-server appends to a slot file: restore points, which it calls context checkpoints.

A restore point is the partial state of an earlier moment: with it a sequence whose memory cannot
be cut goes back there. The format is that of llama.cpp pull request 26004, as build 11549 writes
it: ``SCKP``, u32 version, u32 count; then of each u64 tokens, i32 first and last position, u64
length of the blob, the blob with its head, and two u64 lengths of further blobs, always 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from .._io.arguments import checked
from .._io.buffers import flat
from ..errors import FormatError, UnsupportedError, VersionError
from .blocks import RecurrentCache
from .cursor import Cursor, open_view
from .formats import SEQUENCE_HEAD
from .headers import FileHeader
from .parse import has_sequence_head, parse_sequence, parse_state
from .spans import Span
from .state import Layout
from .traits import Traits

if TYPE_CHECKING:
    from .._io import Buffer

MAGIC: Final = b"SCKP"
VERSION: Final = 1
_HEAD: Final = Struct("<4sII")
_POINT: Final = Struct("<QiiQ")
_FURTHER: Final = Struct("<QQ")
_MAX_TOKENS: Final = 2**31 - 1
_BEGINNING: Final = re.compile(re.escape(MAGIC))
# Tensor bytes can look like the beginning, once in 2**32: many do only on purpose.
_TRIES: Final = 8


@checked
@dataclass(frozen=True, slots=True)
class RestorePoint:
    """A partial state of one sequence, of an earlier moment.

    ``Context.seq_restore(point.blob, partial=True)`` takes the sequence back to it.

    Attributes:
        n_tokens: Tokens of the prompt that were decoded then: the position to go on at.
        blob: What ``Context.seq_snapshot(partial=True)`` gave then.
        first: The first position of the sequence, as the file that it was read from records it.
            What is written is decided by *blob*: *last* for recurrent and hybrid memory, which
            cannot go back further, else 0. (With another one llama-server aborts.)
        last: The last one; None: *n_tokens* - 1, as where the prompt has no images or sounds.

    Raises:
        FormatError: These are no positions of *n_tokens* tokens, or *blob* has no head.
    """

    n_tokens: int
    blob: Buffer = field(repr=False)
    first: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        if self.last is None:
            object.__setattr__(self, "last", self.n_tokens - 1)
        if not (
            0 <= self.span.first <= self.span.last < self.n_tokens <= _MAX_TOKENS
            and has_sequence_head(self.blob)
        ):
            raise FormatError(
                f"a restore point after {self.n_tokens} tokens with positions {self.span.first} to "
                f"{self.span.last}: give the snapshot of a sequence, and its tokens then"
            )

    @property
    def span(self) -> Span:
        """Its first and last position."""
        return Span(self.first or 0, self.n_tokens - 1 if self.last is None else self.last)

    @property
    def nbytes(self) -> int:
        """Length of the blob."""
        return memoryview(self.blob).nbytes


def copied(point: RestorePoint) -> RestorePoint:
    """Return a restore point with bytes of its own, which outlive the file."""
    return replace(point, blob=bytes(point.blob))


class FilePayload(NamedTuple):
    """What is behind the header of a session, sequence or slot file.

    Attributes:
        layout: The state.
        end: The offset in the file at which it ends.
        restore_points: What follows it, the earliest first; their blobs are views of the file.
    """

    layout: Layout
    end: int
    restore_points: tuple[RestorePoint, ...] = ()


def parse_payload(
    data: Buffer,
    header: FileHeader,
    *,
    version: int,
    traits: Traits | Sequence[Traits] | None = None,
) -> FilePayload:
    """Parse the state in a session, sequence or slot file, and the restore points behind it.

    Nothing says where a payload ends but the payload itself. So it is read to the end of the
    file, and where that fails, to each place where restore points could begin.

    Args:
        data: The file.
        header: Its header.
        version: The session version of the file.
        traits: What is known of the model (:func:`model_traits`).

    Raises:
        FormatError: Not such a state, or damaged; its offset is that in the file.
        UnsupportedError: As :func:`parse_state`.
    """
    view = open_view(data)
    refusals: list[FormatError | UnsupportedError] = []
    for end in chain([len(view)], _beginnings(view, header)):
        try:
            layout = _state(view, header, end, version, traits)
        except (FormatError, UnsupportedError) as error:
            refusals.append(error.with_traceback(None))
            continue
        points = read_points(view, end) if end < len(view) else ()
        for point in points:
            check_point(point, layout)
        return FilePayload(layout, end, points)
    raise _most_telling(refusals)


def _most_telling(
    refusals: list[FormatError | UnsupportedError],
) -> FormatError | UnsupportedError:
    """Return the refusal to raise, and empty *refusals*.

    A raised error that a frame of its own traceback refers to keeps the file until a collection.
    """
    # The first took restore points for a part of the state, the second is of the state alone.
    refusal = refusals[min(1, len(refusals) - 1)]
    refusals.clear()
    return refusal


def split_points(data: Buffer, header: FileHeader) -> tuple[int, tuple[RestorePoint, ...]]:
    """Return where the payload of a file ends that is not parsed, and the restore points."""
    view = open_view(data)
    for end in _beginnings(view, header):
        try:
            return end, read_points(view, end)
        except (FormatError, UnsupportedError):
            continue
    return len(view), ()


def check_point(point: RestorePoint, layout: Layout) -> RestorePoint:
    """Check that a restore point is a partial state of the sequence in *layout*.

    Returns:
        It, with the first position that llama-server records for such memory.

    Raises:
        FormatError: It is not.
    """
    try:
        parsed = parse_sequence(
            point.blob, version=layout.version, traits=layout.traits, partial=True
        )
    except FormatError as error:
        raise FormatError(
            f"the restore point after {point.n_tokens} tokens is no partial state of this "
            f"sequence: {error}"
        ) from None
    # The first is that of the whole sequence, of which a window leaves out the beginning.
    if [held.last for held in parsed.spans.values()] != [point.span.last]:
        raise FormatError(
            f"a restore point whose last position is not {point.span.last}: its number of "
            "tokens must be that of the moment of its snapshot"
        )
    if all(held.last < point.span.last for held in layout.spans.values()):
        raise FormatError(
            f"a restore point after {point.n_tokens} tokens, which the sequence has not reached"
        )
    recurrent = any(isinstance(cache, RecurrentCache) for cache in parsed.caches)
    return replace(point, first=point.span.last if recurrent else 0)


def pack_points(points: Sequence[RestorePoint]) -> Iterator[Buffer]:
    """Yield the bytes of restore points, to be put behind the payload of a sequence file.

    Args:
        points: The earliest first; none give nothing.
    """
    if points:
        yield _HEAD.pack(MAGIC, VERSION, len(points))
    for point in points:
        yield _POINT.pack(point.n_tokens, *point.span, point.nbytes)
        yield point.blob
        yield _FURTHER.pack(0, 0)


def packed_size(points: Sequence[RestorePoint]) -> int:
    """Return how many bytes :func:`pack_points` yields."""
    each = sum(_POINT.size + point.nbytes + _FURTHER.size for point in points)
    return _HEAD.size + each if points else 0


def read_points(data: Buffer, at: int) -> tuple[RestorePoint, ...]:
    """Read restore points that begin at *at* and end with *data*; their blobs are views of it.

    Raises:
        FormatError: They are damaged.
        VersionError: Their version is not known.
        UnsupportedError: They are those of a draft model too.
    """
    cursor = Cursor(flat(data), at)
    magic, version, count = cursor.read(_HEAD, "restore points")
    if magic != MAGIC:
        raise FormatError("restore points that do not begin as such", offset=at)
    if version != VERSION:
        raise VersionError("restore points", found=version, expected=VERSION, offset=at + 4)
    cursor.require(count * (_POINT.size + SEQUENCE_HEAD.size + _FURTHER.size), "restore points")
    points = tuple(_read_point(cursor) for _ in range(count))
    if cursor.at != cursor.end:
        more = cursor.end - cursor.at
        raise FormatError(f"{more} bytes after the restore points", offset=cursor.at)
    return points


def _read_point(cursor: Cursor) -> RestorePoint:
    n_tokens, first, last, nbytes = cursor.read(_POINT, "restore point")
    offset = cursor.skip(nbytes, "blob of a restore point")
    if any(cursor.read(_FURTHER, "lengths of further blobs")):
        raise UnsupportedError("restore points of a draft model, which are not known here")
    try:
        return RestorePoint(n_tokens, cursor.view[offset : offset + nbytes], first, last)
    except ValueError as error:
        reason = getattr(error, "reason", str(error))
        raise FormatError(reason, offset=offset) from None


def beginning(data: memoryview, header: FileHeader) -> int:
    """Return where restore points could begin first; the end of the file, if they cannot."""
    return next(_beginnings(data, header), len(data))


def _beginnings(data: memoryview, header: FileHeader) -> Iterator[int]:
    """Yield where restore points could begin: only a sequence has some."""
    if header.kind == "sequence":
        found = _BEGINNING.finditer(data, header.payload_offset)
        yield from (match.start() for match in islice(found, _TRIES))


def _state(
    view: memoryview,
    header: FileHeader,
    end: int,
    version: int,
    traits: Traits | Sequence[Traits] | None,
) -> Layout:
    start = header.payload_offset
    try:
        return parse_state(
            header.kind, view[start:end], version=version, headed=False, traits=traits
        )
    except FormatError as error:
        raise error.moved(start) from None
