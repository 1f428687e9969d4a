"""The sequences of one context: decode into them, look at them, cut and copy them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial as bound
from typing import TYPE_CHECKING

from .._io import arguments
from .._llama import calls
from .._llama.facts import Facts
from .._llama.handles import Call, Handle, LastLogits
from ..errors import CapacityError, RestoreError, StateError, UnsupportedError
from ..layout import Span, token_array
from ..layout.formats import MAX_POSITION
from . import cuts, engine
from .changes import Change, Keeper, attempt
from .fit import Fit
from .restore import Restorer

if TYPE_CHECKING:
    from .._io import Buffer


class Sequences:
    """What one context holds now. Sequence ids are checked here."""

    def __init__(
        self, handle: Handle, facts: Facts, fit: Fit, restorer: Restorer, keeper: Keeper
    ) -> None:
        self._handle = handle
        self._facts = facts
        self._fit = fit
        self._restorer = restorer
        self._keeper = keeper

    def decode(self, seq_id: int, ids: Sequence[int]) -> None:
        """Append tokens that are in the vocabulary to a sequence."""
        self._facts.check_sequence(seq_id)
        if self._facts.encoder:
            raise UnsupportedError(
                f"{self._facts.arch} models encode first: decode with the binding that does, "
                "attach() its context, and encode again after a restore"
            )
        if not ids:
            return
        with self._handle.use() as call:
            start = calls.positions(call, seq_id).last + 1
            n_past = start + len(ids)
            if n_past - 1 > MAX_POSITION:
                raise CapacityError("positions of a sequence", need=n_past, have=MAX_POSITION + 1)
            change = Change("decode", seq_id, {seq_id: Span(start, n_past - 1)}, ids)
            self._keeper.count(call, change, bound(self._decode, call, change, ids))

    def logits(self) -> memoryview[float]:
        """Return the logits of the last token decoded, or of the checkpoint that was resumed."""
        with self._handle.use() as call:
            last = self._handle.pointer.last_logits
            if last is not None and last.row is not None:
                return memoryview(bytes(last.row)).cast("f")
            row = engine.last_logits(call, self._facts.n_vocab) if last else None
        if row is None:
            raise StateError("no logits: decode a token first (a state does not contain logits)")
        return row

    def n_past(self, seq_id: int) -> int:
        """Return the position at which decoding of a sequence goes on."""
        self._facts.check_sequence(seq_id)
        with self._handle.use() as call:
            return calls.positions(call, seq_id).last + 1

    def remove(self, seq_id: int, start: int, end: int | None) -> None:
        """Remove the positions ``start <= position < end`` of a sequence."""
        arguments.check_positions(start, end)
        self._facts.check_sequence(seq_id)
        with self._handle.use() as call:
            span = calls.positions(call, seq_id)
            first, last = cuts.clip(span, start, end)
            if first >= last:
                return
            whole = first <= cuts.begin(self._facts, span) and last > span.last
            if not whole:
                self._check_cut(seq_id, span, first, last)
            change = Change("remove", seq_id, {seq_id: Span(first, last - 1)})
            cut = (-1, -1) if whole else (first, last)
            if not self._keeper.count(call, change, bound(_remove, call, change, cut)):
                raise cuts.cannot_cut(self._facts, seq_id, first, last)

    def copy(
        self, src: int, dest: int, start: int, end: int | None, tokens: Iterable[int] | None
    ) -> None:
        """Make *dest* a copy of the positions ``start <= position < end`` of *src*."""
        self._facts.check_sequence(dest)
        self._facts.check_sequence(src)
        arguments.check_positions(start, end)
        listed = None if tokens is None else tuple(token_array(tokens))
        with self._handle.use() as call:
            if src == dest:
                return
            span = calls.positions(call, src)
            first, last = cuts.clip(span, start, end)
            begin = cuts.begin(self._facts, span)
            left_out = [cut for cut in ((begin, first), (last, span.last + 1)) if cut[0] < cut[1]]
            if last <= max(first, begin):
                left_out, last = [], first  # nothing is there to copy
            for cut in left_out:
                self._check_cut(src, span, *cut)
            change = Change("copy", dest, {dest: Span(first, last - 1)}, listed)
            copy = bound(self._copy, call, change, src, dest, part=bool(left_out))
            self._keeper.count(call, change, copy)

    def clear(self) -> None:
        """Empty every sequence."""
        change = Change("remove", None, {})
        with self._handle.use() as call:
            self._keeper.count(call, change, bound(self._clear, call, change))

    def _clear(self, call: Call, change: Change) -> None:
        change.state = "touched"
        self._handle.pointer.last_logits = None
        calls.empty(call, None)

    def _check_cut(self, seq_id: int, span: Span, first: int, last: int) -> None:
        cuts.check_cut(self._facts, seq_id, span, first, last, self._fit.rewind_min(span))

    # -- decoding

    def _decode(self, call: Call, change: Change, ids: Sequence[int]) -> None:
        """Append the tokens of *change*, or leave the sequence as it was."""
        [(seq_id, span)] = (change.spans or {}).items()
        # What was written over, in a window or in a recurrent state, no cut brings back.
        written_over = self._facts.recurrent or self._facts.n_swa
        keeps = written_over and span.first > 0 and len(ids) > self._facts.n_batch
        with calls.lent(call, seq_id) if keeps else nullcontext() as copy:
            attempt(
                change,
                bound(self._decode_pieces, call, change, ids, seq_id, span),
                bound(self._take_back, call, change, seq_id, span.first, copy),
            )

    def _decode_pieces(
        self, call: Call, change: Change, ids: Sequence[int], seq_id: int, span: Span
    ) -> None:
        change.state = "touched"
        self._handle.pointer.last_logits = None
        engine.decode(call, ids, seq_id, span.first, self._facts.n_batch)
        self._handle.pointer.last_logits = LastLogits(seq_id, span.last + 1)
        change.state = "done"

    def _take_back(
        self,
        call: Call,
        change: Change,
        seq_id: int,
        start: int,
        copy: Buffer | None,
        error: BaseException,
    ) -> None:
        """Leave a sequence as it was before the pieces that were decoded."""
        span = calls.positions(call, seq_id)
        if span.last < start:
            change.state = "undone"
        elif start == 0 or start >= self._fit.rewind_min(span):
            calls.remove(call, seq_id, start)
            change.state = "undone"
        elif copy is not None and self._restorer.put_back(call, seq_id, copy):
            change.state = "undone"
        else:
            self._restorer.give_up(call, change, error)

    # -- copying

    def _copy(self, call: Call, change: Change, src: int, dest: int, *, part: bool) -> None:
        """Copy the span of *change*: all that there is, unless *part*."""
        one_stream = self._fit.one_stream(call)
        if part and not one_stream:
            raise UnsupportedError(
                "a split context can copy only whole sequences: use kv_unified=True"
            )
        put = bound(self._put_copy, call, change, src, dest, part=part, one_stream=one_stream)
        attempt(change, put, bound(self._restorer.give_up, call, change))

    def _put_copy(
        self, call: Call, change: Change, src: int, dest: int, *, part: bool, one_stream: bool
    ) -> None:
        change.state = "touched"
        logits = self._handle.pointer.last_logits
        if logits is not None and logits.seq_id == dest:
            self._handle.pointer.last_logits = None
        first, last = change.spans[dest] if change.spans else (0, -1)
        if one_stream or first > last:
            calls.empty(call, dest)
            if first <= last:
                calls.share(call, src, dest, *((first, last + 1) if part else (-1, -1)))
        else:
            self._copy_between_streams(call, src, dest)
        change.state = "done"

    def _copy_between_streams(self, call: Call, src: int, dest: int) -> None:
        """Copy a whole sequence through the state functions.

        llama.cpp copies between streams only at the next decode, and a state saved before that
        holds stale data.
        """
        with calls.lent(call, src) as blob:
            calls.empty(call, dest)
            if calls.write(call, dest, blob) != len(blob):
                raise RestoreError("the copy was refused", log=call.log(), rolled_back=False)


def _remove(call: Call, change: Change, cut: tuple[int, int]) -> bool:
    """Cut the target of *change*; False where its memory cannot be cut there."""
    change.state = "touched"  # by one call: what is there is as before or as after
    return calls.remove(call, change.target or 0, *cut)
