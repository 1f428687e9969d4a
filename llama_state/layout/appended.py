"""What llama-server appends to a slot file: restore points, which it calls context checkpoints.

The format is that of llama.cpp pull request 26004, as build 11549 writes it: ``SCKP``, u32
version, u32 count; then of each u64 tokens, i32 first and last position, u64 length of the blob,
the blob with its head, and two u64 lengths of further blobs, always 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from .._io.buffers import flat
from ..errors import FormatError, UnsupportedError, VersionError
from .cursor import U32, Cursor, open_view
from .formats import SEQUENCE_HEAD, SEQUENCE_MAGIC
from .headers import FileHeader
from .parse import parse_state
from .restore_points import RestorePoint, check_point
from .state import Layout
from .traits import Traits

if TYPE_CHECKING:
    from .._io import Buffer

MAGIC: Final = b"SCKP"
VERSION: Final = 1
_HEAD: Final = Struct("<4sII")
_POINT: Final = Struct("<QiiQ")
_FURTHER: Final = Struct("<QQ")
# How they can be found where their magic is damaged: by the head of the first blob.
_MARKS: Final = (
    (re.compile(re.escape(MAGIC)), 0),
    (re.compile(re.escape(U32.pack(SEQUENCE_MAGIC))), _HEAD.size + _POINT.size),
)
# Tensor bytes can look like a mark, once in 2**32: many do only on purpose.
_TRIES: Final = 8


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

    Args:
        data: The file.
        header: Its header.
        version: The session version of the file.
        traits: What is known of the model (:func:`model_traits`).

    Raises:
        FormatError: Not such a state, or damaged; its offset is that in the file.
        UnsupportedError: As :func:`parse_state`.
    """
    layout, end = parse_before_points(data, header, version=version, traits=traits)
    return FilePayload(layout, end, points_behind(data, end, layout))


def parse_before_points(
    data: Buffer,
    header: FileHeader,
    *,
    version: int,
    traits: Traits | Sequence[Traits] | None = None,
    others: bool = False,
) -> tuple[Layout, int]:
    """Return the state in a file, and the offset at which it ends.

    Nothing says where a payload ends but the payload itself. So it is read to the end of the
    file, and where that fails, to each place where restore points could begin.

    Args and errors are those of :func:`parse_payload`; *others* as in :func:`parse_state`.
    """
    view = open_view(data)
    refusals: list[FormatError | UnsupportedError] = []
    for end in _ends(view, header, refusals):
        payload = view[header.payload_offset : end]
        try:
            layout = parse_state(
                header.kind, payload, version=version, headed=False, traits=traits, others=others
            )
        except FormatError as error:
            refusals.append(error.moved(header.payload_offset).with_traceback(None))
        except UnsupportedError as error:
            refusals.append(error.with_traceback(None))
        else:
            return layout, end
    raise _most_telling(refusals)


def points_behind(data: Buffer, end: int, layout: Layout) -> tuple[RestorePoint, ...]:
    """Read the restore points behind the state in a file, and check that they are of it.

    Args:
        data: The file.
        end: Where the state ends.
        layout: The state.

    Raises:
        FormatError: They are damaged, or those of another sequence.
        UnsupportedError: As :func:`read_points`.
    """
    view = open_view(data)
    points = read_points(view, end) if end < len(view) else ()
    for point in points:
        check_point(point, layout)
    return points


def begin(data: Buffer) -> bool:
    """Return whether *data* begins as restore points do."""
    return bytes(flat(data)[: len(MAGIC)]) == MAGIC


def _ends(
    view: memoryview, header: FileHeader, refusals: list[FormatError | UnsupportedError]
) -> Iterator[int]:
    """Yield where the payload of a file can end.

    Args:
        refusals: Why it cannot end at those that were yielded so far.
    """
    yield len(view)
    if header.kind != "sequence":
        return
    # They are behind what was read: a KV cache says where it ends, a recurrent one where it begins.
    reached = max(header.payload_offset, _reached(refusals[0], header) - _HEAD.size)
    for mark, before in _MARKS:
        found = (match.start() - before for match in mark.finditer(view, reached))
        yield from (end for end in islice(found, _TRIES) if end >= header.payload_offset)


def _reached(refusal: FormatError | UnsupportedError, header: FileHeader) -> int:
    """Return how far a state was read; the start of the payload where that is not known."""
    if isinstance(refusal, FormatError):
        return refusal.offset or 0
    cause = refusal.__cause__
    offset = cause.offset if isinstance(cause, FormatError) else None
    return header.payload_offset + (offset or 0)


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
        reason = "restore points that do not begin as such: their first bytes are damaged"
        raise FormatError(reason, offset=at)
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
