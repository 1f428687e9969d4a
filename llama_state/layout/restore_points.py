"""What llama-server appends to a slot file: restore points, which it calls context checkpoints.

A restore point is the partial state of an earlier moment: with it a sequence whose memory cannot
be cut goes back there. The format is that of llama.cpp pull request 26004, as build 11549 writes
it: ``SCKP``, u32 version, u32 count; then of each u64 tokens, i32 first and last position, u64
length of the blob, the blob with its head, and two u64 lengths of further blobs, always 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from .._io.arguments import checked
from ..errors import FormatError, UnsupportedError
from .cursor import Cursor, open_view
from .formats import SEQUENCE_HEAD, SEQUENCE_MAGIC
from .headers import FileHeader
from .parse import parse_sequence, parse_state
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
_BEGINNING: Final = re.compile(re.escape(MAGIC + VERSION.to_bytes(4, "little")))
# Tensor bytes can look like the beginning, once in 2**64: more often only on purpose.
_TRIES: Final = 8


class RestorePoint(NamedTuple):
    """A partial state of one sequence in a slot file.

    Attributes:
        n_tokens: Tokens of the prompt that were decoded then: the position to go on at.
        span: The positions that it holds.
        offset: Where its blob starts in the file.
        nbytes: Length of the blob, with its head.
    """

    n_tokens: int
    span: Span
    offset: int
    nbytes: int


class FilePayload(NamedTuple):
    """What is behind the header of a session, sequence or slot file.

    Attributes:
        layout: The state.
        end: The offset in the file at which it ends.
        restore_points: What follows it, the earliest first.
    """

    layout: Layout
    end: int
    restore_points: tuple[RestorePoint, ...] = ()


@checked
def parse_payload(
    data: Buffer,
    header: FileHeader,
    *,
    traits: Traits | Sequence[Traits] | None = None,
) -> FilePayload:
    """Parse the state in a session, sequence or slot file, and the restore points behind it.

    Nothing says where a payload ends but the payload itself. So it is read to the end of the
    file, and where that fails, to each place where restore points begin.

    Args:
        data: The file.
        header: Its header.
        traits: What is known of the model (:func:`model_traits`).

    Raises:
        FormatError: Not such a state, or damaged; its offset is that in the file.
        UnsupportedError: As :func:`parse_state`.
    """
    view = open_view(data)
    try:
        return FilePayload(_state(view, header, len(view), traits), len(view))
    except (FormatError, UnsupportedError) as error:
        refusal = error.with_traceback(None)
    if header.kind == "sequence":
        for end, points in _endings(view, header.payload_offset):
            try:
                layout = _state(view, header, end, traits)
            except (FormatError, UnsupportedError) as error:
                refusal = error.with_traceback(None)  # of the payload alone: it says more
            else:
                for point in points:
                    _check(view, point, layout)
                return FilePayload(layout, end, points)
    raise refusal


def _state(
    view: memoryview, header: FileHeader, end: int, traits: Traits | Sequence[Traits] | None
) -> Layout:
    start, version = header.payload_offset, header.session_version
    try:
        return parse_state(
            header.kind, view[start:end], version=version, headed=False, traits=traits
        )
    except FormatError as error:
        raise error.moved(start) from None


def _check(view: memoryview, point: RestorePoint, layout: Layout) -> None:
    """Raise FormatError if a restore point is not the partial state that it is said to be."""
    blob = view[point.offset : point.offset + point.nbytes]
    try:
        parsed = parse_sequence(
            blob, version=layout.version, traits=layout.traits, partial=True, headed=True
        )
    except FormatError as error:
        raise error.moved(point.offset) from None
    # The first is that of the whole sequence, of which a window leaves out the beginning.
    if [held.last for held in parsed.spans.values()] != [point.span.last]:
        raise FormatError("a restore point with other positions", offset=point.offset)


def pack_points(points: Sequence[tuple[int, Span, Buffer]]) -> Iterator[Buffer]:
    """Yield the bytes of restore points, to be put behind the payload of a sequence file.

    Args:
        points: Tokens, positions and headed blob of each, the earliest first; none give nothing.
    """
    if points:
        yield _HEAD.pack(MAGIC, VERSION, len(points))
    for n_tokens, span, blob in points:
        yield _POINT.pack(n_tokens, span.first, span.last, memoryview(blob).nbytes)
        yield blob
        yield _FURTHER.pack(0, 0)


def _endings(data: memoryview, start: int) -> Iterator[tuple[int, tuple[RestorePoint, ...]]]:
    """Yield where restore points begin that end with the file, and these points."""
    for found in islice(_BEGINNING.finditer(data, start), _TRIES):
        try:
            yield found.start(), _read_points(data, found.start())
        except FormatError:
            continue


def _read_points(data: memoryview, at: int) -> tuple[RestorePoint, ...]:
    cursor = Cursor(data, at)
    _, _, count = cursor.read(_HEAD, "restore points")
    cursor.require(count * (_POINT.size + SEQUENCE_HEAD.size + _FURTHER.size), "restore points")
    points = tuple(_read_point(cursor) for _ in range(count))
    if cursor.at != cursor.end:
        more = cursor.end - cursor.at
        raise FormatError(f"{more} bytes after the restore points", offset=cursor.at)
    return points


def _read_point(cursor: Cursor) -> RestorePoint:
    n_tokens, first, last, nbytes = cursor.read(_POINT, "restore point")
    offset = cursor.skip(nbytes, "blob of a restore point")
    head = bytes(cursor.view[offset : offset + 4])
    if head != SEQUENCE_MAGIC.to_bytes(4, "little") or not 0 <= first <= last < n_tokens:
        raise FormatError("a restore point of no sequence", offset=offset)
    further = cursor.read(_FURTHER, "lengths of further blobs")
    if any(further):
        raise UnsupportedError("restore points of a draft model, which are not known here")
    return RestorePoint(n_tokens, Span(first, last), offset, nbytes)
