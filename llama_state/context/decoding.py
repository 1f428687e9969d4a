"""What a context holds: decode into it, look at it, cut it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from .._io import StrPath
from .._llama import calls
from .._llama._llama_cffi import ffi
from .._llama.facts import Asked, context_facts
from .._llama.handles import Call, Handle, LastLogits, Owner
from .._llama.library import Library
from ..checkpoint.fingerprint import Fingerprint
from ..errors import StateError, UnsupportedError
from . import engine, identity
from .state import ContextState

NOTHING_ASKED = Asked()


class Decoding(Owner):
    """The part of :class:`llama_state.Context` that is about what it holds now."""

    def __init__(
        self,
        handle: Handle,
        asked: Asked = NOTHING_ASKED,
        origin: identity.Origin = identity.UNKNOWN,
    ) -> None:
        self._handle = handle
        self._identity = identity.Identity(origin)
        with handle.use() as call:
            self._facts = context_facts(call, asked)
        self._state = ContextState(handle, self._facts)
        self.library: Library = handle.library
        self.arch = self._facts.arch
        self.n_vocab = self._facts.n_vocab
        self.n_ctx = self._facts.n_ctx
        self.n_batch = self._facts.n_batch
        self.n_seq_max = self._facts.n_seq_max

    def __repr__(self) -> str:
        closed = ", closed" if self._handle.closed else ""
        return f"<Context of {self.arch}, {self.n_ctx} cells, {self.n_seq_max} sequences{closed}>"

    @property
    def pointer(self) -> int:
        """The address of the ``llama_context``.

        Raises:
            ClosedError: The context was closed.
        """
        return int(ffi.cast("uintptr_t", self._handle.resource.ptr))

    # -- what its states belong to

    @property
    def fingerprint(self) -> Fingerprint:
        """The model and the settings that this context's states belong to, as far as known.

        Samples of the model's file are read the first time. What cannot be learned is in its
        ``unknown``, with the reason, and is no error here.
        """
        with self._handle.use() as call:
            return self._identity.fingerprint(call, self.library, self._facts, self._state.known)

    def declare(
        self,
        *,
        adapters: Sequence[tuple[StrPath, float]] | None = None,
        rope: identity.Rope | None = None,
    ) -> None:
        """Say what llama.cpp does not tell of a context, for its :attr:`fingerprint`.

        Args:
            adapters: (GGUF file, scale) of every LoRA adapter and control vector in use; none
                at all is ``[]``.
            rope: The rope and YaRN settings that the context was made with, by their names in
                ``llama_context_params``, such as ``{"rope_freq_base": 1e6}``; those left out
                are the model's own.

        Raises:
            OSError: An adapter's file cannot be read.
            FormatError: It is no GGUF file, or damaged.
            UnsupportedError: There is no such rope setting.
        """
        with self._handle.use():
            self._identity.declare(adapters, rope)

    # -- decoding and positions

    def decode(self, tokens: Iterable[int], seq_id: int = 0) -> None:
        """Append *tokens* to a sequence, at position ``n_past(seq_id)``.

        Runs longer than ``n_batch`` are decoded in pieces. :meth:`logits` then gives those of
        the last token.

        After an error the sequence is what it was; only recurrent and hybrid memory, which can
        not be cut, keeps the pieces of ``n_batch`` tokens that were decoded before.

        Args:
            tokens: Token ids; none at all changes nothing.
            seq_id: The sequence.

        Raises:
            SequenceIdError: *seq_id* is outside ``0 .. n_seq_max - 1``.
            CapacityError: The cache is full.
            DecodeError: A token outside the vocabulary, or llama.cpp refused.
            UnsupportedError: The model has an encoder, which this small engine does not run.
        """
        ids = engine.checked_tokens(tokens, self.n_vocab)
        self._state.check_sequence(seq_id)
        if self._facts.encoder:
            raise UnsupportedError(
                f"{self.arch} models encode first: decode with the binding that does, attach() its "
                "context, and encode again after a restore"
            )
        if not ids:
            return
        with self._handle.use() as call:
            self._handle.shared.last_logits = None
            engine.decode(call, ids, seq_id, self.n_batch)
            n_past = calls.positions(call, seq_id).last + 1
            self._handle.shared.last_logits = LastLogits(seq_id, n_past)

    def logits(self) -> memoryview[float]:
        """The logits of the last token decoded: ``n_vocab`` float32, a copy.

        After :meth:`resume`, those of the checkpoint, if it has some.

        Raises:
            StateError: Nothing was decoded since the context was made, restored or cleared: no
                logits are in a state.
        """
        with self._handle.use() as call:
            last = self._handle.shared.last_logits
            if last is not None and last.row is not None:
                return memoryview(bytes(last.row)).cast("f")
            row = engine.last_logits(call, self.n_vocab) if last else None
        if row is None:
            raise StateError("no logits: decode a token first (a state does not contain logits)")
        return row

    def n_past(self, seq_id: int = 0) -> int:
        """The position at which decoding of a sequence goes on; 0 for an empty one.

        Raises:
            SequenceIdError: *seq_id* is outside ``0 .. n_seq_max - 1``.
        """
        with self._sequence(seq_id) as call:
            return calls.positions(call, seq_id).last + 1

    def seq_rm(self, seq_id: int, start: int = 0, end: int | None = None) -> None:
        """Remove the positions ``start <= position < end`` of a sequence.

        Args:
            seq_id: The sequence.
            start: First position to go.
            end: Position after the last one to go; None for the end of the sequence.

        Raises:
            SequenceIdError: *seq_id* is outside ``0 .. n_seq_max - 1``.
            UnsupportedError: The memory cannot be cut there: recurrent and hybrid memory can
                only be emptied, a sliding window cannot be cut back to where its cells are
                gone. The sequence is untouched.
        """
        with self._sequence(seq_id) as call:
            span = calls.positions(call, seq_id)
            first, last = _clip(span, start, end)
            if first >= last:
                return
            whole = first <= self._begin(span) and last > span.last
            if not whole:
                self._check_cut(seq_id, span, first, last)
            if not calls.remove(call, seq_id, *((-1, -1) if whole else (first, last))):
                raise self._cannot_cut(seq_id, first, last)

    def seq_cp(self, src: int, dest: int, start: int = 0, end: int | None = None) -> None:
        """Make sequence *dest* a copy of the positions ``start <= position < end`` of *src*.

        What *dest* held before is gone. In a unified context the copy shares its cells with the
        source and costs nothing; in a split one the cells are copied at once, not at the next
        decode as llama.cpp does it.

        Raises:
            SequenceIdError: An id is outside ``0 .. n_seq_max - 1``.
            UnsupportedError: Part of a sequence of recurrent or hybrid memory, part of one in a
                split context, or one that ends where a sliding window has lost cells. Both
                sequences are untouched.
        """
        self._state.check_sequence(dest)
        with self._sequence(src) as call:
            if src == dest:
                return
            span = calls.positions(call, src)
            first, last = _clip(span, start, end)
            begin = self._begin(span)
            cuts = [cut for cut in ((begin, first), (last, span.last + 1)) if cut[0] < cut[1]]
            if last <= max(first, begin):
                cuts, last = [], first  # nothing is there to copy
            for cut in cuts:
                self._check_cut(src, span, *cut)
            self._state.copy(call, src, dest, first, last, part=bool(cuts))

    def clear(self) -> None:
        """Empty every sequence."""
        with self._handle.use() as call:
            self._handle.shared.last_logits = None
            calls.clear(call, data=False)

    # -- shared by the above

    @contextmanager
    def _sequence(self, seq_id: int) -> Iterator[Call]:
        self._state.check_sequence(seq_id)
        with self._handle.use() as call:
            yield call

    def _begin(self, span: calls.Positions) -> int:
        """The position at which a sequence begins, as far as llama.cpp tells."""
        # Of recurrent memory it names the last one, of a window the first that is still there.
        return 0 if self._facts.recurrent or self._facts.n_swa else max(span.first, 0)

    def _check_cut(self, seq_id: int, span: calls.Positions, first: int, last: int) -> None:
        tail = last > span.last
        if self._facts.recurrent or (tail and first < self._state.rewind_min(span)):
            raise self._cannot_cut(seq_id, first, last)

    def _cannot_cut(self, seq_id: int, first: int, last: int) -> UnsupportedError:
        return UnsupportedError(
            f"the memory of a {self.arch} model cannot lose positions {first} to {last - 1} of "
            f"sequence {seq_id} and go on: restore a snapshot of before, or empty the sequence "
            "and decode its beginning again"
        )


def _clip(span: calls.Positions, start: int, end: int | None) -> tuple[int, int]:
    """The range that the caller means, without what no position reaches."""
    n_past = span.last + 1
    return max(start, 0), n_past if end is None else min(end, n_past)
