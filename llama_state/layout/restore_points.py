"""Restore points: partial states of one sequence, of earlier moments.

With one of them a sequence whose memory cannot be cut (recurrent, hybrid, sliding windows) goes
back there, without decoding its beginning again. Where they are kept does not matter here:
``appended`` knows how llama-server keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from .._io.arguments import checked
from ..errors import FormatError, UnsupportedError
from .conversion import Form, convert
from .parse import has_sequence_head, parse_sequence
from .spans import Span
from .state import Layout

if TYPE_CHECKING:
    from .._io import Buffer

_MAX_TOKENS: Final = 2**31 - 1


@checked
@dataclass(frozen=True, slots=True)
class RestorePoint:
    """A partial state of one sequence, of an earlier moment.

    ``Context.seq_restore(point.blob, partial=True)`` takes the sequence back to it.

    Attributes:
        n_tokens: Tokens of the prompt that were decoded then: the position to go on at.
        blob: What ``Context.seq_snapshot(partial=True)`` gave then.
        first: The first position of the sequence, as the file that it was read from records it.
            What is written is decided by *blob*: *last* for memory that cannot be cut at
            all (recurrent, hybrid, dsv4), else 0. (With another one llama-server aborts.)
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
        if not 0 <= self.span.first <= self.span.last < self.n_tokens <= _MAX_TOKENS:
            raise FormatError(
                f"a restore point after {self.n_tokens} tokens with positions {self.span.first} to "
                f"{self.span.last}: give the number of tokens that the sequence had then"
            )
        if not has_sequence_head(self.blob):
            raise FormatError(
                f"the blob of the restore point after {self.n_tokens} tokens has no head: give the "
                "partial snapshot of a sequence, of a llama.cpp of May 2026 or newer"
            )

    @property
    def span(self) -> Span:
        """Its first and last position."""
        return Span(self.first or 0, self.n_tokens - 1 if self.last is None else self.last)

    @property
    def nbytes(self) -> int:
        """Length of the blob."""
        return memoryview(self.blob).nbytes


def listed(points: Iterable[RestorePoint]) -> tuple[RestorePoint, ...]:
    """Return restore points as a tuple.

    Raises:
        TypeError: One is something else.
    """
    found = tuple(points)
    wrong = next((point for point in found if not isinstance(point, RestorePoint)), None)
    if wrong is not None:
        raise TypeError(f"restore_points must be RestorePoint values, not {type(wrong)}")
    return found


def copied(point: RestorePoint) -> RestorePoint:
    """Return a restore point with bytes of its own, which outlive the file."""
    return replace(point, blob=bytes(point.blob))


def parse_point(point: RestorePoint, layout: Layout) -> Layout:
    """Describe a restore point of the sequence in *layout*.

    Raises:
        FormatError: It is no partial state of such memory.
    """
    # A state that reads as several kinds of memory has restore points of one of them.
    traits = (layout.traits, *layout.alternatives)
    try:
        return parse_sequence(point.blob, version=layout.version, traits=traits, partial=True)
    except (FormatError, UnsupportedError) as error:
        raise FormatError(
            f"the restore point after {point.n_tokens} tokens is no partial state of this "
            f"sequence: {error}"
        ) from None


def check_point(point: RestorePoint, layout: Layout) -> RestorePoint:
    """Check that a restore point is a partial state of the sequence in *layout*.

    Returns:
        It, with the first position that llama-server records for such memory.

    Raises:
        FormatError: It is not.
    """
    parsed = parse_point(point, layout)
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
    # Not the first of its window, but how far back the sequence can be cut from there.
    last = point.span.last
    return replace(point, first=min(parsed.traits.rewind_min(0, last), last))


def first_known(point: RestorePoint, layout: Layout) -> RestorePoint:
    """Return a restore point that records a first position; errors as :func:`check_point`."""
    return check_point(point, layout) if point.first is None else point


def convert_point(point: RestorePoint, layout: Layout, form: Form) -> RestorePoint:
    """Return a restore point in another form; errors as those of :func:`convert`.

    Args:
        point: A restore point of the sequence in *layout*.
        layout: The state, in the form that the point has.
        form: The form that it is to have.
    """
    return replace(point, blob=convert(point.blob, parse_point(point, layout), form))
