"""The tokens that the sequences of a context hold, as far as only this library changes them."""

from __future__ import annotations

from array import array

from .._llama.handles import Call
from .changes import Change, Keeper


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
