"""Putting a state into a context: compared before, verified after, undone on failure.

llama.cpp empties the destination first and looks at the state then; see ``docs/guarantees.md``
for the order of things here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

from .. import layout
from .._llama import calls
from .._llama.calls import Scope
from .._llama.facts import Facts
from .._llama.handles import Call, Handle
from ..errors import Difference, MismatchError, RestoreError, StateError, UnsupportedError
from . import refusals
from .fit import Fitting, Held

if TYPE_CHECKING:
    from .._io import Buffer

# The last session version whose whole restore keeps only the last stream of a split context.
LOSES_STREAMS: Final = 9


class Restoring:
    """Restores one context.

    Attributes:
        fitting: What is known of its caches.
    """

    def __init__(self, handle: Handle, facts: Facts) -> None:
        self._handle = handle
        self._facts = facts
        self._library = handle.library
        self.fitting = Fitting(facts, self._read_own)

    # -- the shape of this library's blobs

    @property
    def head_size(self) -> int:
        """Bytes in front of a sequence's payload in this library's blobs."""
        return layout.SEQUENCE_HEAD.size if self._library.sequence_head else 0

    def is_headed(self, data: memoryview) -> bool:
        """Whether a sequence blob has a head."""
        # Within session version 9 both forms are about: spring builds wrote no head.
        if self._library.session_version == LOSES_STREAMS:
            return layout.has_sequence_head(data)
        return self.head_size > 0

    def native(self, scope: Scope, data: memoryview, headed: bool) -> memoryview:
        """A sequence blob with the head that this library wants, or without."""
        if scope is None or headed == (self.head_size > 0):
            return data
        if headed:
            return data[layout.SEQUENCE_HEAD.size :]
        return memoryview(layout.SEQUENCE_HEAD.pack(layout.SEQUENCE_MAGIC, scope) + bytes(data))

    def parse(
        self, scope: Scope, blob: memoryview, *, headed: bool, partial: bool = False
    ) -> layout.Layout:
        """Describe a state of this library's version, read as this context's model says."""
        return layout.parse_state(
            "whole" if scope is None else "sequence",
            blob,
            version=self._library.session_version,
            headed=headed,
            traits=self._facts.traits,
            partial=partial,
        )

    def parse_own(self, scope: Scope, blob: Buffer) -> layout.Layout:
        """Parse what this context's library has just written."""
        return self.parse(scope, memoryview(blob), headed=self.head_size > 0)

    def _read_own(self, call: Call, seq_id: int) -> layout.Layout:
        with calls.lent(call, seq_id) as blob:
            return self.parse_own(seq_id, blob)

    # -- restoring

    def restore(
        self,
        call: Call,
        scope: Scope,
        blob: memoryview,
        parsed: layout.Layout | None,
        flags: int = 0,
    ) -> Held:
        """Put *blob* in place of what *scope* holds.

        Args:
            scope: A valid sequence id, or None for the whole context.
            blob: The state as this library wants it.
            parsed: What it is; None where it was not validated.
            flags: Those that it was taken with.

        Returns:
            The sequences that were restored, none of them empty.

        Raises:
            MismatchError, CapacityError: It does not fit; nothing was changed.
            RestoreError: llama.cpp refused it; ``rolled_back`` says what is left.
        """
        if parsed is None and scope is None and self._library.session_version == LOSES_STREAMS:
            self._refuse_to_lose_streams(call)
        before = calls.occupied(call, self._facts.n_seq_max)
        filled = bool(before) if scope is None else scope in before
        sure = parsed is not None and self.fitting.check(call, scope, parsed, before)
        partial = parsed is not None and flags != 0 and layout.has_partial(parsed.module)
        if parsed is not None and partial:
            _check_rewind(parsed, before.get(scope or 0))
        # Where anything is left that only llama.cpp can decide, what it would destroy is kept.
        # That of a sequence would lack what is outside a sliding window: then all is kept.
        kept = None if self._facts.n_swa else scope
        with calls.lent(call, kept) if filled and not sure else nullcontext() as backup:
            self._handle.shared.last_logits = None
            if parsed is not None and scope is not None and partial:
                consumed = self._put_partial(call, scope, blob, parsed, flags)
            else:
                self.empty(call, scope)
                consumed = self._put(call, scope, blob, parsed)
            after = calls.occupied(call, self._facts.n_seq_max)
            if not consumed or (parsed is not None and not _agrees(scope, parsed, before, after)):
                log = call.log()
                self.empty(call, scope)
                rolled_back = not filled
                if backup is not None:
                    rolled_back = self.put_back(call, kept, backup)
                raise self._refusal(parsed, log, consumed=consumed, rolled_back=rolled_back)
        if parsed is not None:
            self.fitting.learn(parsed)
        return {seq_id: span for seq_id, span in after.items() if scope in (None, seq_id)}

    def _put(
        self, call: Call, scope: Scope, blob: memoryview, parsed: layout.Layout | None
    ) -> bool:
        """Give *blob* to llama.cpp, over an emptied destination; whether all was consumed."""
        if parsed is not None and not parsed.sequences:
            return True  # llama.cpp ignores some empty states and reports success
        if parsed is not None and scope is None and self._loses_streams(parsed):
            return all(self._put_sequence(call, blob, parsed, i) for i in _cell_order(parsed))
        return calls.write(call, scope, blob) == len(blob)

    def _put_partial(
        self, call: Call, seq_id: int, blob: memoryview, parsed: layout.Layout, flags: int
    ) -> bool:
        """Put the window or recurrent part over a sequence, and cut off what came after it."""
        consumed = calls.write(call, seq_id, blob, flags) == len(blob)
        return consumed and calls.remove(call, seq_id, _last(parsed) + 1)

    def _loses_streams(self, parsed: layout.Layout) -> bool:
        streams = (n for name, n in parsed.cells_needed.items() if name != "recurrent")
        return self._library.session_version == LOSES_STREAMS and any(len(n) > 1 for n in streams)

    def _refuse_to_lose_streams(self, call: Call) -> None:
        if not self.fitting.one_stream(call):
            raise UnsupportedError(
                "of a split context this llama.cpp restores only the last sequence, unless the "
                "state is parsed first: leave validate=True"
            )

    def _put_sequence(
        self, call: Call, blob: memoryview, parsed: layout.Layout, seq_id: int
    ) -> bool:
        payload = layout.sequence_from_whole(blob, parsed, seq_id)
        data = self.native(seq_id, memoryview(payload), headed=False)
        return calls.write(call, seq_id, data) == len(data)

    def put_back(self, call: Call, scope: Scope, backup: Buffer) -> bool:
        """Put a state of this context back; False where the destination could only be emptied."""
        self.empty(call, scope)
        try:
            parsed = self.parse_own(scope, backup)
        except UnsupportedError:  # a format that was restored without validation
            parsed = None
        if self._put(call, scope, memoryview(backup), parsed):
            return True
        self.empty(call, scope)
        return False

    def empty(self, call: Call, scope: Scope) -> None:
        """Remove what *scope* holds."""
        if scope is None:
            calls.clear(call, data=False)
        else:
            calls.remove(call, scope)

    def _refusal(
        self,
        parsed: layout.Layout | None,
        log: Sequence[str],
        *,
        consumed: bool,
        rolled_back: bool,
    ) -> StateError:
        """The error for a state that llama.cpp would not have, or did not bring back rightly."""
        if rolled_back and parsed is not None:
            known = refusals.explain(
                log, parsed, types=self._facts.asked.types, cells=self._facts.n_ctx_seq
            )
            if known is not None:
                return known
        what = "the positions are not those of the state" if consumed else "llama.cpp refused it"
        return RestoreError(f"the state was not restored: {what}", log=log, rolled_back=rolled_back)


def _cell_order(parsed: layout.Layout) -> list[int]:
    """The sequences in the order of their recurrent cells, so that these come back in it."""
    order = list(parsed.sequences)
    for cache in parsed.caches:
        if isinstance(cache, layout.RecurrentCache):
            order.sort(key=lambda seq_id: min(cache.rows.owners.get(seq_id, [len(cache.rows)])))
    return order


def _last(parsed: layout.Layout) -> int:
    """The largest position of a state of one sequence; -1 when it is empty."""
    return max((high for _, high in parsed.spans.values()), default=-1)


def _check_rewind(parsed: layout.Layout, held: calls.Positions | None) -> None:
    """A partial state goes only over the sequence that it was taken from, or a longer one."""
    last, current = _last(parsed), held.last if held else -1
    if last < 0 or current < last:
        raise MismatchError([Difference("last position of the sequence", last, current)])


def _agrees(
    scope: Scope,
    parsed: layout.Layout,
    before: Held,
    after: Held,
) -> bool:
    """Whether every sequence of the context holds what it must after the restore."""
    spans = {i: calls.Positions(*span) for i, span in parsed.spans.items()}
    if scope is None:
        return spans == after
    if list(spans.values()) != [span for i, span in after.items() if i == scope]:
        return False
    # In a cache with a sliding window llama.cpp may reuse cells of the other sequences that
    # are outside their windows: their beginnings may move, their ends may not.
    return _ends(before, scope) == _ends(after, scope)


def _ends(spans: Held, scope: Scope) -> dict[int, int]:
    return {i: span.last for i, span in spans.items() if i != scope}
