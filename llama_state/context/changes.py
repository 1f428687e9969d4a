"""What is about to change in a context, and the code that keeps count of it.

A :class:`Keeper` is called before a sequence changes and after it. That of our own contexts counts
tokens. A binding may list them itself, as a ``Llama`` does; its adapter brings its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from .._llama.calls import Target
from .._llama.handles import Call
from ..layout import Span

T = TypeVar("T")
ChangeKind: TypeAlias = Literal["decode", "remove", "copy", "replace", "undo"]
ChangeState: TypeAlias = Literal["untouched", "touched", "done", "undone", "emptied"]


@dataclass(slots=True)
class Change:
    """A change of the sequences of a context.

    Attributes:
        kind: "decode" appends, "remove" takes away, "copy" and "replace" put something in the
            place of what is there, "undo" brings back what was there before.
        target: The sequence that changes; None for all of them.
        spans: The positions that come in, or that go, by their sequence; None where only
            llama.cpp can read the state that comes in.
        tokens: The tokens at these positions, of sequence 0 where all change; None: not known.
        state: How far it is. Any line can be the last before an exception, so this, and not
            where the exception came from, says what the target holds: what was there before
            ("untouched", "undone"), what came in ("done"), nothing ("emptied"), or something
            between ("touched").
    """

    kind: ChangeKind
    target: Target
    spans: Mapping[int, Span] | None
    tokens: Sequence[int] | None = None
    state: ChangeState = "untouched"


def add_note(error: BaseException, note: str) -> None:
    """Add *note* to what is printed of an exception, as ``add_note`` of Python 3.11 does."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        vars(error).setdefault("__notes__", []).append(note)


def attempt(change: Change, act: Callable[[], T], settle: Callable[[BaseException], None]) -> T:
    """Act, and call *settle* with an exception that leaves the change half made.

    Twice, if that is interrupted too: it may be called again. This is no context manager, since
    one whose ``__exit__`` is interrupted ends when the exception is forgotten, and not before.
    """
    try:
        try:
            return act()
        except BaseException as error:
            if change.state == "touched":
                settle(error)
            raise
    except BaseException as error:
        if change.state == "touched":
            settle(error)
        raise


class Keeper:
    """Keeps count of what a context holds: this one of nothing."""

    def tokens(self, target: Target) -> tuple[int, ...] | None:
        """Return the tokens that are listed of a sequence; None where none are.

        Args:
            target: The sequence; None for the one that the binding uses.
        """
        return None

    def held(self, seq_id: int) -> tuple[int, ...] | None:
        """Return the tokens that a sequence is known to hold; None where they are not known."""
        return self.tokens(seq_id)

    def shared(self) -> None:
        """Note that other code can change the context from now on."""

    def known_tokens(self, call: Call, target: Target) -> tuple[int, ...] | None:
        """Return what :meth:`tokens` does, if that is what the cache holds.

        Raises:
            StateError: The list is not as long as the sequence.
        """
        return None

    def before(self, call: Call, change: Change) -> None:
        """Refuse a change by an error of this library, or let it happen."""

    def check(self, call: Call, change: Change) -> None:
        """Refuse, by an error, a state that only llama.cpp could read, now that it is there."""

    def after(self, call: Call, change: Change) -> None:
        """Count what the context holds now, by the change's state. It may be called twice."""

    def count(self, call: Call, change: Change, act: Callable[[], T]) -> T:
        """Act between :meth:`before` and :meth:`after`; no context manager, as :func:`attempt`."""
        self.before(call, change)
        try:
            try:
                return act()
            finally:
                self.after(call, change)
        except BaseException:
            self.after(call, change)  # the first may be what was interrupted
            raise


class HeldTokens(Keeper):
    """Counts the tokens of each sequence of a context that this library made.

    It is what a prefix store compares a prompt with. Nothing is known of a sequence that something
    else than tokens came into; of none, once other code was told where the context is.
    """

    def __init__(self) -> None:
        self._held: dict[int, array[int]] = {}
        self._alone = True

    def held(self, seq_id: int) -> tuple[int, ...] | None:
        """Return the tokens of a sequence; None where they are not known."""
        known = self._held.get(seq_id) if self._alone else None
        return None if known is None else tuple(known)

    def shared(self) -> None:
        """Note that other code can change the context from now on."""
        self._alone = False

    def after(self, call: Call, change: Change) -> None:
        """Count a change; the same again where it is called twice."""
        if change.state in ("untouched", "undone"):
            return
        if change.target is None:
            self._held.clear()
        elif change.state != "done" or not self._count(change.target, change):
            self._held.pop(change.target, None)

    def _count(self, seq_id: int, change: Change) -> bool:
        """Count a change that is done; False where what is there now is not known."""
        if change.spans is None or seq_id not in change.spans:
            return False
        first, last = change.spans[seq_id]
        known = self._held.setdefault(seq_id, array("i"))
        if change.kind == "remove":
            cut_off = last + 1 >= len(known) >= first
            del known[first:]
            return cut_off and first > 0
        if change.kind == "decode":
            if len(known) < first or change.tokens is None:
                return False
            known[first:] = array("i", change.tokens)
            return True
        if change.tokens is None or len(change.tokens) != last + 1:
            return False
        known[:] = array("i", change.tokens)
        return True
