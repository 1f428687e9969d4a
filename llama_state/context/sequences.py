"""The sequences of one context: decode into them, look at them, cut and copy them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .._io import arguments
from .._llama import calls
from .._llama.facts import Facts
from .._llama.handles import Call, Handle, LastLogits
from ..errors import CapacityError, RestoreError, StateError, UnsupportedError
from ..layout import Span, token_array
from ..layout.formats import MAX_POSITION
from . import cuts, engine
from .changes import Change, Keeper
from .fit import Fit
from .restore import Restorer


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
            decoded = Change("decode", seq_id, {seq_id: Span(start, n_past - 1)}, ids)
            with self._keeper.changing(call, decoded):
                self._handle.shared.last_logits = None
                engine.decode(call, ids, seq_id, self._facts.n_batch)
                self._handle.shared.last_logits = LastLogits(seq_id, n_past)

    def logits(self) -> memoryview[float]:
        """Return the logits of the last token decoded, or of the checkpoint that was resumed."""
        with self._handle.use() as call:
            last = self._handle.shared.last_logits
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
                cuts.check_cut(self._facts, seq_id, span, first, last)
            removed = Change("remove", seq_id, {seq_id: Span(first, last - 1)})
            with self._keeper.changing(call, removed):
                if not calls.remove(call, seq_id, *((-1, -1) if whole else (first, last))):
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
                cuts.check_cut(self._facts, src, span, *cut)
            with self._keeper.changing(
                call, Change("copy", dest, {dest: Span(first, last - 1)}, listed)
            ):
                self._copy(call, src, dest, first, last, part=bool(left_out))

    def clear(self) -> None:
        """Empty every sequence."""
        with self._handle.use() as call, self._keeper.changing(call, Change("remove", None, {})):
            self._handle.shared.last_logits = None
            calls.clear(call, data=False)

    def _copy(self, call: Call, src: int, dest: int, first: int, last: int, *, part: bool) -> None:
        """Copy ``first <= position < last``: all that there is, unless *part*.

        llama.cpp copies between streams only at the next decode, and a state saved before that
        holds stale data. So a copy between streams goes through the state functions.
        """
        one_stream = self._fit.one_stream(call)
        if part and not one_stream:
            raise UnsupportedError(
                "a split context can copy only whole sequences: use kv_unified=True"
            )
        logits = self._handle.shared.last_logits
        if logits is not None and logits.seq_id == dest:
            self._handle.shared.last_logits = None
        if one_stream or first >= last:
            self._restorer.empty(call, dest)
            if first < last:
                calls.share(call, src, dest, *((first, last) if part else (-1, -1)))
            return
        with calls.lent(call, src) as blob:
            self._restorer.empty(call, dest)
            if calls.write(call, dest, blob) != len(blob):
                self._restorer.empty(call, dest)
                raise RestoreError("the copy was refused", log=call.log(), rolled_back=False)
