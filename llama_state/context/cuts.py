"""Where a sequence can be cut: what llama.cpp would refuse, or do wrongly, is refused before."""

from __future__ import annotations

from .._llama.facts import Facts
from ..errors import UnsupportedError
from ..layout import Span


def clip(span: Span, start: int, end: int | None) -> tuple[int, int]:
    """Return ``start <= position < end`` without what no position of a sequence reaches."""
    n_past = span.last + 1
    return max(start, 0), n_past if end is None else min(end, n_past)


def begin(facts: Facts, span: Span) -> int:
    """Return the position at which a sequence begins, as far as llama.cpp reports it."""
    # Of recurrent memory it names the last one, of a window the first that is still there.
    return 0 if facts.recurrent or facts.n_swa else max(span.first, 0)


def check_cut(
    facts: Facts, seq_id: int, span: Span, first: int, last: int, rewind_min: int
) -> None:
    """Refuse to remove ``first <= position < last`` where decoding could not go on after it.

    Args:
        span: What the sequence holds.
        rewind_min: The smallest position to which it can truthfully be cut back.

    Raises:
        UnsupportedError: The memory cannot be cut there.
    """
    tail = last > span.last
    if facts.recurrent or (tail and first < rewind_min):
        raise cannot_cut(facts, seq_id, first, last)


def cannot_cut(facts: Facts, seq_id: int, first: int, last: int) -> UnsupportedError:
    """Return the error for positions that the memory cannot lose."""
    return UnsupportedError(
        f"the memory of a {facts.arch} model cannot lose positions {first} to {last - 1} of "
        f"sequence {seq_id} and go on: restore a snapshot of before, or empty the sequence "
        "and decode its beginning again"
    )
