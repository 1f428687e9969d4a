"""Undoing a block: sequences come back as they were before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial as bound
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from .._llama.calls import Target
from .._llama.handles import Call, Handle
from ..errors import StateError
from .changes import Change, Keeper, add_note
from .restore import Restorer, called

if TYPE_CHECKING:
    from .._io import Buffer


class _Kept(NamedTuple):
    target: Target
    copy: Buffer
    tokens: tuple[int, ...] | None


class Savepoint:
    """Puts *targets* back as they were when the block raises. A context manager.

    Nothing is undone but by ``__exit__``: one that was entered and dropped leaves all as it is.

    Args:
        handle: The context.
        restorer: Restores into it.
        keeper: Keeps count of what it holds.
        snapshot: Takes a state of a target.
        targets: What to put back.
    """

    def __init__(
        self,
        handle: Handle,
        restorer: Restorer,
        keeper: Keeper,
        snapshot: Callable[[Target], Buffer],
        targets: Sequence[Target],
    ) -> None:
        self._handle = handle
        self._restorer = restorer
        self._keeper = keeper
        self._snapshot = snapshot
        self._targets = targets
        self._kept: list[_Kept] = []

    def __enter__(self) -> None:
        with self._handle.use():
            self._kept = [
                _Kept(each, self._snapshot(each), self._keeper.tokens(each))
                for each in self._targets
            ]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._undo(error)
        except BaseException:
            self._undo(error)  # it was interrupted, and the copies are still at hand
            raise

    def _undo(self, error: BaseException | None) -> None:
        """Put everything back; what fails is a note of the block's *error*, which goes on."""
        # There is nothing to be put back into where the block has closed the context, or has
        # forked the process and this is the child.
        if error is None or not self._handle.usable:
            return
        with self._handle.use() as call:
            for target, copy, tokens in self._kept:
                change = Change("undo", target, None, tokens)
                try:
                    self._keeper.count(call, change, bound(self._put_back, call, change, copy))
                except StateError as refused:
                    add_note(error, f"{called(target)} was not undone: {refused}")
                if change.state == "emptied":
                    why = "; ".join(call.log()) or "llama.cpp refused the copy"
                    add_note(error, f"{called(target)} was emptied, not undone: {why}")

    def _put_back(self, call: Call, change: Change, copy: Buffer) -> None:
        change.state = "touched"
        put_back = self._restorer.put_back(call, change.target, copy)
        change.state = "done" if put_back else "emptied"
