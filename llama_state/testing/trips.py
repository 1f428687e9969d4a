"""The ways of a state from one context into another, one for each function that saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..context.context import Context
from ..context.state import Restored
from .runs import NEXT_TOKEN, SPARE, Run


@dataclass(frozen=True)
class Method:
    """A method to save and restore.

    Attributes:
        function: Name in the report: the functions that it calls.
        call: Saves and restores. Returns what was restored, None if the functions do not tell.
        whole: Whether it saves all sequences, or only the first.
        dest: The id that the first sequence gets, if only that is saved.
        tokens: Whether it saves the tokens of the first sequence too.
        in_place: Whether source and target hold the same before: the target is rolled back.
    """

    function: str
    call: Callable[[Trip], Restored | None]
    whole: bool = True
    dest: int = 0
    tokens: bool = False
    in_place: bool = False


@dataclass(frozen=True)
class Trip:
    """A round trip by *method* from *source*, which holds *expected*, to *target* (*before*)."""

    method: Method
    expected: Run
    before: Sequence[Sequence[int]]
    source: Context
    target: Context
    path: Path

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens that are saved with the state."""
        return self.expected.texts[0] if self.method.tokens else ()

    @property
    def arriving(self) -> Mapping[int, Sequence[int]]:
        """Sequence id in the target -> the tokens of each sequence that is restored."""
        texts = self.expected.texts
        return dict(enumerate(texts)) if self.method.whole else {self.method.dest: texts[0]}

    def state_of(self, context: Context) -> bytes:
        """Return the state that was saved, or restored, as it is saved from *context* now."""
        if self.method.whole:
            return context.snapshot()
        return context.seq_snapshot(self.method.dest if context is self.target else 0)


class _Abandon(Exception):
    """Raised to leave a savepoint."""


def _snapshot(trip: Trip) -> Restored:
    return trip.target.restore(trip.source.snapshot())


def _snapshot_out(trip: Trip) -> Restored:
    return trip.target.restore(trip.source.snapshot(out=bytearray(trip.source.state_size())))


def _save(trip: Trip) -> Restored:
    trip.source.save_state(trip.path, tokens=trip.tokens, durable=False)
    return trip.target.load_state(trip.path)


def _seq_snapshot(trip: Trip) -> Restored:
    return trip.target.seq_restore(trip.source.seq_snapshot(), trip.method.dest)


def _seq_save(trip: Trip) -> Restored:
    trip.source.seq_save_state(trip.path, tokens=trip.tokens, durable=False)
    return trip.target.seq_load_state(trip.path, trip.method.dest)


def _checkpoint(trip: Trip) -> Restored:
    return trip.target.resume(trip.source.checkpoint(tokens=trip.tokens))


def _seq_checkpoint(trip: Trip) -> Restored:
    return trip.target.resume(trip.source.checkpoint(0, tokens=trip.tokens), trip.method.dest)


def _savepoint(trip: Trip) -> None:
    try:
        with trip.target.savepoint():
            trip.target.decode([NEXT_TOKEN] * (SPARE // 2))
            raise _Abandon
    except _Abandon:
        return


_WHOLE = Method("snapshot/restore", _snapshot)
_WHOLE_FILE = Method("save_state/load_state", _save, tokens=True)
_ONE = Method("seq_snapshot/seq_restore", _seq_snapshot, whole=False)
_ONE_FILE = Method("seq_save_state/seq_load_state", _seq_save, whole=False)


def methods(n_seq: int) -> Iterator[Method]:
    """Yield all methods for contexts of *n_seq* sequences."""
    yield from (_WHOLE, Method("snapshot(out=)/restore", _snapshot_out), _WHOLE_FILE)
    yield from (_ONE, _ONE_FILE, replace(_ONE_FILE, function="seq_save_state, tokens", tokens=True))
    if n_seq > 1:
        yield replace(_ONE, function="seq_restore, other id", dest=n_seq - 1)
        yield replace(_ONE_FILE, function="seq_load_state, other id", dest=n_seq - 1)
    yield Method("checkpoint/resume", _checkpoint, tokens=True)
    yield Method("checkpoint(0)/resume", _seq_checkpoint, whole=False, dest=n_seq - 1, tokens=True)
    yield Method("savepoint", _savepoint, in_place=True)


def methods_for_empty() -> Iterator[Method]:
    """Yield the methods to use for an empty context."""
    for method in (_WHOLE, _WHOLE_FILE, _ONE, _ONE_FILE):
        yield replace(method, function=f"empty {method.function}")
