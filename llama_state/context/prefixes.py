"""Pieces out of the sequences of one context, and into them.

In a context of one stream a piece goes through a spare sequence: a range of cells is shared with
it, and read or written there, so that it costs what the piece has. In others, and where llama.cpp
would abort, the whole state of the sequence is cut, or put together; see ``docs/architecture.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial as bound
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .. import layout
from .._io.buffers import POOL, write_parts
from .._llama import calls
from .._llama.facts import Facts
from .._llama.handles import Call, Handle, LastLogits
from ..checkpoint.fingerprint import Fingerprint
from ..errors import MismatchError, RestoreError, UnsupportedError
from ..layout.formats import MAX_SEQUENCES
from ..layout.pieces import Part, compose
from ..store.pieces import Given, Taken
from . import engine
from .changes import Change, Keeper, attempt
from .fit import Fit
from .form import StateForm
from .identity import Identity
from .restore import Restorer
from .sequences import Sequences

if TYPE_CHECKING:
    from .._io import Buffer

T = TypeVar("T")

# Kinds of memory of which llama.cpp copies ranges of cells within a stream. It aborts on others.
_RANGES: Final = frozenset({"kv", "dsa", "msa", "iswa", "dsa-iswa", "hybrid-iswa", "hybrid"})
# A read of a spare sequence also brings the recurrent state, which is that of the end: once.
_IN_ONE_RANGE: Final = frozenset({"hybrid"})
# Their states go in piece by piece, each through a spare sequence.
_BY_SPARE: Final = _RANGES | {"hybrid-idx", "recurrent"}
_PARTIAL_STATE: Final = frozenset({"hybrid", "hybrid-iswa"})
# A sequence of no context, which llama.cpp can use all the same where nothing is recurrent.
_BEYOND: Final = MAX_SEQUENCES - 1


class Prefixes:
    """Pieces out of, and into, the sequences of one context: a ``SequenceMemory``."""

    def __init__(
        self,
        handle: Handle,
        facts: Facts,
        form: StateForm,
        fit: Fit,
        restorer: Restorer,
        keeper: Keeper,
        sequences: Sequences,
        identity: Identity,
    ) -> None:
        self._handle = handle
        self._facts = facts
        self._form = form
        self._fit = fit
        self._restorer = restorer
        self._keeper = keeper
        self._sequences = sequences
        self._identity = identity
        self.session_version: int = handle.library.session_version

    # -- what is known

    def use(self) -> AbstractContextManager[Call]:
        """Keep other threads out of the context for the length of a block."""
        return self._handle.use()

    def check_sequence(self, seq_id: int) -> int:
        """Return *seq_id*; raise SequenceIdError if it is none of the context."""
        return self._facts.check_sequence(seq_id)

    def fingerprint(self) -> Fingerprint:
        """Return what the context computes with."""
        with self._handle.use() as call:
            library, known = self._handle.library, self._fit.known
            return self._identity.fingerprint(call, library, self._facts, known)

    def geometry(self, seq_id: int) -> layout.Geometry:
        """Return how the caches are laid out; where nothing tells, a token is decoded once."""
        with self._handle.use() as call:
            if (known := self._fit.known) is None or not _is_complete(known):
                self._fit.learn(self._read_any(call, seq_id))
                known = self._fit.known
        if known is None or not _is_complete(known):
            raise UnsupportedError("the caches of this context cannot be read")
        return known

    def traits(self) -> layout.Traits:
        """Return how the states of the context lie."""
        return self._form.traits[0]

    def keeps_window(self) -> bool:
        """Return whether rows outside of a window stay, or there is no window."""
        return not self._facts.n_swa or bool(self._facts.options.swa_full)

    def n_past(self, seq_id: int) -> int:
        """Return the position at which a sequence goes on."""
        return self._sequences.n_past(seq_id)

    def tokens(self, seq_id: int) -> tuple[int, ...] | None:
        """Return the tokens that a sequence holds; None where they are not known."""
        return self._keeper.held(seq_id)

    def appends(self, seq_id: int) -> bool:
        """Return whether pieces go in one by one; where not, all are needed at once."""
        with self._handle.use() as call:
            return self._way_in(call, seq_id) is not None

    def _way_in(self, call: Call, seq_id: int) -> int | None:
        """Return the spare sequence through which pieces go in; None where they cannot."""
        if self.traits().module not in _BY_SPARE or not self._fit.one_stream(call):
            return None
        return self._spare(call, seq_id)

    def can_cut(self, seq_id: int, position: int) -> bool:
        """Return whether a sequence can truthfully be cut back, and appended to there."""
        with self._handle.use() as call:
            span = calls.positions(call, seq_id)
        return self._fit.rewind_min(span) <= position <= span.last + 1

    def shared(self) -> None:
        """Note that other code can change the context from now on."""
        self._keeper.shared()

    def cut(self, seq_id: int, position: int) -> None:
        """Remove all from *position* on; 0 empties the sequence."""
        self._sequences.remove(seq_id, position, None)

    def decode(self, seq_id: int, tokens: Sequence[int]) -> None:
        """Append tokens to a sequence."""
        self._sequences.decode(seq_id, engine.checked_tokens(tokens, self._facts.n_vocab))

    def logits(self, seq_id: int) -> memoryview[float] | None:
        """Return the logits of the last token of a sequence; None where they are not there."""
        if not self._handle.pointer.owned or self._keeper.held(seq_id) is None:
            return None  # other code may have decoded since, as many tokens
        with self._handle.use() as call:
            last = self._handle.pointer.last_logits
            end = calls.positions(call, seq_id).last + 1
            if last is None or (last.seq_id, last.n_past) != (seq_id, end):
                return None
            return self._sequences.logits()

    def _read_any(self, call: Call, seq_id: int) -> layout.Layout:
        held = calls.occupied(call, self._facts.n_seq_max)
        if held:
            return self._form.read(call, min(held, key=lambda each: held[each].last))
        return self._borrowed(call, seq_id, bound(self._read_probe, call, seq_id))

    def _read_probe(self, call: Call, seq_id: int) -> layout.Layout:
        self._handle.pointer.last_logits = None
        engine.decode(call, [0], seq_id, 0, self._facts.n_batch)
        return self._form.read(call, seq_id)

    def _borrowed(self, call: Call, spare: int, act: Callable[[], T]) -> T:
        """Act with an empty sequence, which is empty again however that ends."""
        change = Change("copy", spare, None, state="touched")

        def act_and_empty() -> T:
            result = act()
            calls.empty(call, spare)
            change.state = "done"
            return result

        def empty(error: BaseException) -> None:
            calls.empty(call, spare)
            change.state = "undone"

        return attempt(change, act_and_empty, empty)

    # -- out of a sequence

    def take(
        self,
        seq_id: int,
        ranges: Sequence[tuple[int, int]],
        write: Callable[[Taken], None],
        *,
        state: bool,
        dense: bool,
    ) -> None:
        """Hand pieces of a sequence to *write*, which can use them until it returns.

        Args:
            seq_id: The sequence.
            ranges: Ranges of positions, which do not overlap, by increasing positions. One of
                which rows are missing ends it all.
            write: Called for each piece.
            state: Whether the state at the end is taken too.
            dense: Whether every position has a cell, as that of a token has.
        """
        with self._handle.use() as call:
            whole = self._take_rows(call, seq_id, ranges, write, dense=dense)
            if whole and state and "S" in layout.groups_of(self.traits().module):
                self._take_state(call, seq_id, write)

    def _take_rows(
        self,
        call: Call,
        seq_id: int,
        ranges: Sequence[tuple[int, int]],
        write: Callable[[Taken], None],
        *,
        dense: bool,
    ) -> bool:
        """Hand over rows; False where some are missing."""
        if not ranges:
            return True
        module = self.traits().module
        spare = self._spare(call, seq_id) if module in _RANGES else None
        hand_over = bound(self._hand_over, call, write=write, dense=dense)
        if spare is None or not self._fit.one_stream(call):
            return hand_over(seq_id, ranges)
        spans = [(ranges[0][0], ranges[-1][1])] if module in _IN_ONE_RANGE else ranges
        for first, last in spans:
            inside = [each for each in ranges if first <= each[0] and each[1] <= last]

            def share(first: int = first, last: int = last, inside: Any = inside) -> bool:
                calls.share(call, seq_id, spare, first, last)
                return hand_over(spare, inside)

            if not self._borrowed(call, spare, share):
                return False
        return True

    def _hand_over(
        self,
        call: Call,
        seq_id: int,
        ranges: Sequence[tuple[int, int]],
        *,
        write: Callable[[Taken], None],
        dense: bool,
    ) -> bool:
        """Hand over the rows of a sequence; False where some are missing."""
        windowed = "W" in layout.groups_of(self.traits().module)
        with calls.lent(call, seq_id) as blob:
            parsed = self._parse(seq_id, blob)
            for start, end in ranges:
                if dense and not _has_all_rows(parsed, start, end):
                    return False
                write(Taken("R", start, start, end, layout.take(blob, parsed, "R", start, end)))
                if windowed and (first := _first_of_window(parsed, start, end)) is not None:
                    window = layout.take(blob, parsed, "W", first, end)
                    write(Taken("W", first, start, end, window))
        return True

    def _take_state(self, call: Call, seq_id: int, write: Callable[[Taken], None]) -> None:
        last = calls.positions(call, seq_id).last + 1
        partial = self.traits().module in _PARTIAL_STATE and self._has_flags
        with calls.lent(call, seq_id, calls.PARTIAL_ONLY if partial else 0) as blob:
            parsed = self._parse(seq_id, blob, partial=partial)
            write(Taken("S", last, last, last, layout.take(blob, parsed, "S")))

    @property
    def _has_flags(self) -> bool:
        return "state-flags" in self._handle.library.capabilities

    def _parse(self, seq_id: int, blob: Buffer, *, partial: bool = False) -> layout.Layout:
        library = self._handle.library
        return layout.parse_sequence(
            blob,
            version=library.session_version,
            headed=library.sequence_head,
            traits=self._form.traits,
            partial=partial,
            piece=True,
        )

    def _spare(self, call: Call, seq_id: int) -> int | None:
        """Return a sequence that is free; None where there is none."""
        for each in range(self._facts.n_seq_max):
            if each != seq_id and calls.positions(call, each).last < 0:
                return each
        usable = not self._facts.recurrent and self._facts.n_seq_max <= _BEYOND
        return _BEYOND if usable else None

    # -- into a sequence

    def put(
        self,
        seq_id: int,
        pieces: Iterable[Given],
        *,
        end: int,
        keep: int,
        tokens: Sequence[int] | None,
        logits: memoryview[float] | None,
    ) -> None:
        """Put pieces into a sequence, in place of what it holds from position *keep* on.

        Args:
            pieces: Rows, then those of the window, then the state at the end. They are taken one
                by one, and whatever taking one raises leaves the sequence empty.
            end: The position behind the last one.
            keep: Positions that stay.
            tokens: Those that the sequence holds then; None where there are media.
            logits: Those of the last token; None where they were not kept.

        Raises:
            RestoreError: llama.cpp refused a piece; the sequence is empty.
        """
        change = Change("replace", seq_id, {seq_id: layout.Span(0, end - 1)}, tokens)
        with self._handle.use() as call:
            put = bound(self._put, call, change, seq_id, pieces, end, keep)
            give_up = bound(self._restorer.give_up, call, change)
            self._keeper.count(call, change, bound(attempt, change, put, give_up))
            if logits is not None:
                self._handle.pointer.last_logits = LastLogits(seq_id, end, logits)

    def _put(
        self,
        call: Call,
        change: Change,
        seq_id: int,
        pieces: Iterable[Given],
        end: int,
        keep: int,
    ) -> None:
        known = self.geometry(seq_id)
        spare = self._way_in(call, seq_id)
        change.state = "touched"
        self._handle.pointer.last_logits = None
        calls.remove(call, seq_id, keep) if keep else calls.empty(call, seq_id)
        if spare is None:
            if keep:
                raise UnsupportedError("nothing can be appended to a sequence of this context")
            self._assemble(call, seq_id, pieces, known)
        else:
            for piece in pieces:
                self._borrowed(call, spare, bound(self._append, call, seq_id, spare, piece, known))
                del piece  # its memory goes before the next one is asked for
        if calls.positions(call, seq_id).last != end - 1:
            raise RestoreError(
                "the positions are not those of the pieces", log=call.log(), rolled_back=False
            )
        change.state = "done"

    def _append(
        self, call: Call, seq_id: int, spare: int, piece: Given, known: layout.Geometry
    ) -> None:
        blob = self._native(piece, known)
        if calls.write(call, spare, blob) != len(blob):
            raise RestoreError(
                "llama.cpp refused a piece of the state", log=call.log(), rolled_back=False
            )
        calls.share(call, spare, seq_id)

    def _assemble(
        self, call: Call, seq_id: int, pieces: Iterable[Given], known: layout.Geometry
    ) -> None:
        n_stream = next((cache.n_stream or 1 for cache in known.caches), 1)
        parts = [self._part(piece, known) for piece in pieces]
        found = list(compose(parts, seq_id=seq_id, n_stream=n_stream))
        if self._handle.library.sequence_head:
            found.insert(0, layout.sequence_head(seq_id))
        with POOL.lend(sum(map(len, found)), spill=True) as blob:
            write_parts(blob, found)
            if calls.write(call, seq_id, blob) != len(blob):
                raise RestoreError(
                    "llama.cpp refused the pieces", log=call.log(), rolled_back=False
                )

    def _native(self, piece: Given, known: layout.Geometry) -> memoryview:
        """Return a piece as the blob that this library wants, of what is wanted of it."""
        part = self._part(piece, known)
        data = part.data
        if not piece.whole:
            taken = layout.take(data, part.layout, piece.group, piece.start, piece.end)
            data = memoryview(b"".join([layout.sequence_head(0), *taken]))
        return data if self._handle.library.sequence_head else data[layout.SEQUENCE_HEAD.size :]

    def _part(self, piece: Given, known: layout.Geometry) -> Part:
        """Describe a piece, in the form of this context."""
        data = piece.data
        parsed = self._parse_given(piece, data, piece.session_version)
        form = self._form_of(known)
        if not _is_in(parsed, form):
            data = memoryview(layout.convert(data, parsed, form))
            parsed = self._parse_given(piece, data, form.version)
        if found := [d for d in layout.differences(parsed.geometry, known) if _matters(d.name)]:
            raise MismatchError(found)
        return Part(data, parsed, frozenset([piece.group]), piece.start, piece.end)

    def _parse_given(self, piece: Given, data: memoryview, version: int) -> layout.Layout:
        return layout.parse_sequence(
            data, version=version, headed=True, traits=self.traits(), piece=True
        )

    def _form_of(self, known: layout.Geometry) -> layout.Form:
        return layout.Form(
            self._handle.library.session_version,
            None,
            next((cache.v_trans for cache in known.caches if cache.v_trans is not None), None),
            {
                cache.name: (cache.n_rot_k, cache.n_rot_v)
                for cache in known.caches
                if cache.n_rot_k is not None and cache.n_rot_v is not None
            },
        )


def _matters(name: str) -> bool:
    """Tell whether a difference is more than one of form."""
    return not name.startswith(("n_stream", "flash attention"))


def _is_in(parsed: layout.Layout, form: layout.Form) -> bool:
    v_trans = layout.form_of(parsed).v_trans
    turned = v_trans is not None and form.v_trans not in (None, v_trans)
    return parsed.version == form.version and not turned


def _is_complete(known: layout.Geometry) -> bool:
    """Tell whether the rows of all caches are known."""
    return all(any(rows is not None for rows in (cache.k, cache.r)) for cache in known.caches)


def _has_all_rows(parsed: layout.Layout, start: int, end: int) -> bool:
    first = parsed.caches[0]
    if not isinstance(first, layout.KVCache):
        return True
    positions = {p for cells in first.cells for p in cells.positions if start <= p < end}
    return len(positions) == end - start


def _first_of_window(parsed: layout.Layout, start: int, end: int) -> int | None:
    """Return the first position from which all window rows up to *end* are there."""
    window = next((cache for cache in parsed.caches if cache.name == "swa"), None)
    if not isinstance(window, layout.KVCache):
        return None
    held = {
        position
        for cells in window.cells
        for position in cells.positions
        if start <= position < end
    }
    first = end
    while first - 1 in held:
        first -= 1
    return first if first < end else None
