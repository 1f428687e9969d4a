"""A context: decode into it, save it, bring it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, overload

from . import _identity, _memory, engine
from ._facts import Asked, context_facts
from ._handles import Call, Handle, LastLogits
from ._library import Library
from ._llama_cffi import ffi
from ._types import Progress, StrPath
from .checkpointing import Checkpointing
from .device import DeviceSnapshot
from .errors import StateError, UnsupportedError
from .fingerprint import Fingerprint
from .state import ContextState, Restored

if TYPE_CHECKING:
    from ._types import Buffer


NOTHING_ASKED = Asked()


class Context(Checkpointing):
    """The memory of one or more sequences in llama.cpp.

    Made by :meth:`llama_state.Model.context`, or by :func:`llama_state.attach` around a context
    that another binding made. A context manager. Safe to use from several threads: calls on one
    context wait for each other, calls on different contexts run side by side.

    Attributes:
        library: The library that holds it.
        n_ctx: Cells, over all sequences.
        n_batch: Tokens that one C call decodes.
        n_seq_max: Sequence ids run from 0 to this minus 1.
        n_vocab: Tokens in the model's vocabulary.
        arch: The model's ``general.architecture``.
    """

    def __init__(
        self,
        handle: Handle,
        asked: Asked = NOTHING_ASKED,
        origin: _identity.Origin = _identity.UNKNOWN,
    ) -> None:
        self._handle = handle
        self._identity = _identity.Identity(origin)
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

        Samples of the model's file are read the first time. What can not be learned is in its
        ``unknown``, with the reason, and is no error here.
        """
        with self._handle.use() as call:
            return self._identity.fingerprint(call, self.library, self._facts, self._state.known)

    def declare(
        self,
        *,
        adapters: Sequence[tuple[StrPath, float]] | None = None,
        rope: _identity.Rope | None = None,
    ) -> None:
        """Say what llama.cpp does not tell of a context, for its :attr:`fingerprint`.

        Args:
            adapters: (GGUF file, scale) of every LoRA adapter and control vector in use; none
                at all is ``[]``.
            rope: The rope and YaRN settings that the context was made with, by their names in
                ``llama_context_params``, such as ``{"rope_freq_base": 1e6}``; those left out
                are the model's own.

        Raises:
            OSError: An adapter's file can not be read.
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
            n_past = _memory.positions(call, seq_id).last + 1
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
            return _memory.positions(call, seq_id).last + 1

    def seq_rm(self, seq_id: int, start: int = 0, end: int | None = None) -> None:
        """Remove the positions ``start <= position < end`` of a sequence.

        Args:
            seq_id: The sequence.
            start: First position to go.
            end: Position after the last one to go; None for the end of the sequence.

        Raises:
            SequenceIdError: *seq_id* is outside ``0 .. n_seq_max - 1``.
            UnsupportedError: The memory can not be cut there: recurrent and hybrid memory can
                only be emptied, a sliding window can not be cut back to where its cells are
                gone. The sequence is untouched.
        """
        with self._sequence(seq_id) as call:
            span = _memory.positions(call, seq_id)
            first, last = _clip(span, start, end)
            if first >= last:
                return
            whole = first <= self._begin(span) and last > span.last
            if not whole:
                self._check_cut(seq_id, span, first, last)
            if not _memory.remove(call, seq_id, *((-1, -1) if whole else (first, last))):
                raise self._can_not_cut(seq_id, first, last)

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
            span = _memory.positions(call, src)
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
            _memory.clear(call, data=False)

    # -- the whole context

    def state_size(self) -> int:
        """Bytes that :meth:`snapshot` would give now."""
        return self._state.size(None)

    @overload
    def snapshot(self) -> bytes: ...
    @overload
    def snapshot(self, out: Buffer) -> memoryview: ...
    def snapshot(self, out: Buffer | None = None) -> bytes | memoryview:
        """The state of all sequences, as llama.cpp's own bytes.

        Args:
            out: A writable buffer to fill instead of making new bytes.

        Returns:
            The state, or a view of the part of *out* that was written.

        Raises:
            CapacityError: *out* is too small.
        """
        return self._state.snapshot(None, out)

    def restore(self, blob: Buffer, *, validate: bool = True) -> Restored:
        """Replace all sequences by those of a :meth:`snapshot`.

        Args:
            blob: Any contiguous buffer of bytes.
            validate: Parse the blob and compare it with this context first. Without that,
                formats of llama.cpp versions that this library does not know can be restored,
                at the price of a copy of what is in the context now.

        Returns:
            The sequences that came back, with their positions.

        Raises:
            FormatError: Not a whole-context state, or damaged.
            MismatchError: A state of another model or of other context parameters.
            CapacityError: It needs more cells or sequences than this context has.
            UnsupportedError: A format that is not known; see *validate*.
            RestoreError: llama.cpp refused all the same; ``rolled_back`` says what is left.
        """
        return self._state.restore(None, blob, validate=validate)

    def save_state(
        self,
        path: StrPath,
        tokens: Iterable[int] = (),
        *,
        durable: bool = True,
        progress: Progress | None = None,
        memory_limit: int | None = None,
    ) -> int:
        """Write all sequences to a session file, as ``llama_state_save_file`` would.

        Args:
            path: The file; an existing one is replaced only by a complete new one.
            tokens: A token list to store along, usually the prompt.
            durable: Wait until the file is on the disk.
            progress: Called with the bytes that are done and those there will be, first with
                none, then after each 16 MiB. What it raises stops the save and is passed on;
                what was at *path* is still there.
            memory_limit: Bytes of memory that copies of a state may take meanwhile. Where that,
                or what there is, does not do, the pages of files serve instead, more slowly.

        Returns:
            Bytes written.

        Raises:
            SaveError: It could not be written; what was at *path* is still there.
        """
        return self._state.save(
            None, path, tokens, durable=durable, progress=progress, memory_limit=memory_limit
        )

    def load_state(
        self,
        path: StrPath,
        *,
        validate: bool = True,
        progress: Progress | None = None,
        memory_limit: int | None = None,
    ) -> Restored:
        """Replace all sequences by those of a session file.

        Args:
            path: The file.
            validate: See :meth:`restore`; the version of the file must be known all the same.
            progress: As in :meth:`save_state`, while the file is read: this context is touched
                after the last call. What it raises stops the load.
            memory_limit: See :meth:`save_state`.

        Returns:
            The token list of the file and the sequences that came back.

        Raises:
            OSError: The file can not be read.
            VersionError: It was written by another version of llama.cpp.
            StateError: As :meth:`restore` otherwise.
        """
        return self._state.load(
            None, path, validate=validate, progress=progress, memory_limit=memory_limit
        )

    # -- one sequence

    def seq_state_size(self, seq_id: int = 0, *, partial: bool = False) -> int:
        """Bytes that :meth:`seq_snapshot` would give now."""
        return self._state.size(self._state.check_sequence(seq_id), partial=partial)

    @overload
    def seq_snapshot(self, seq_id: int = 0, *, partial: bool = False) -> bytes: ...
    @overload
    def seq_snapshot(
        self, seq_id: int = 0, *, out: Buffer, partial: bool = False
    ) -> memoryview: ...
    def seq_snapshot(
        self, seq_id: int = 0, out: Buffer | None = None, *, partial: bool = False
    ) -> bytes | memoryview:
        """The state of one sequence, as llama.cpp's own bytes.

        Args:
            seq_id: The sequence.
            out: A writable buffer to fill instead of making new bytes.
            partial: Only what can not be cut back: the window of sliding-window layers and
                recurrent states. A cheap checkpoint to rewind *this* sequence to later; the
                full state where the memory has neither or nothing else.

        Returns:
            The state, or a view of the part of *out* that was written.

        Raises:
            SequenceIdError: *seq_id* is outside ``0 .. n_seq_max - 1``.
            CapacityError: *out* is too small.
            UnsupportedError: *partial* with a libllama that has no flags.
        """
        return self._state.snapshot(self._state.check_sequence(seq_id), out, partial=partial)

    def seq_restore(
        self,
        blob: Buffer,
        dest_seq_id: int = 0,
        *,
        validate: bool = True,
        partial: bool = False,
    ) -> Restored:
        """Replace one sequence by that of a :meth:`seq_snapshot`; the others stay.

        The blob of an empty sequence empties the destination.

        Args:
            blob: Any contiguous buffer of bytes.
            dest_seq_id: The sequence to replace; it need not be the one that was saved.
            validate: See :meth:`restore`.
            partial: *blob* was taken with ``partial=True``: rewind the sequence to it. The
                sequence must be the one that it was taken from, gone on since; what came
                after is cut off.

        Raises:
            SequenceIdError: *dest_seq_id* is outside ``0 .. n_seq_max - 1``.
            MismatchError: With *partial*, the sequence ends before the checkpoint.
            StateError: As :meth:`restore` otherwise.
        """
        seq_id = self._state.check_sequence(dest_seq_id)
        return self._state.restore(seq_id, blob, validate=validate or partial, partial=partial)

    def seq_device_snapshot(self, seq_id: int = 0) -> DeviceSnapshot:
        """Keep the state of one sequence on the device where the cache is.

        llama.cpp keeps one for each sequence: a later one makes the earlier one stale.

        Raises:
            SequenceIdError: *seq_id* is outside ``0 .. n_seq_max - 1``.
            UnsupportedError: This libllama, or this kind of memory, has no such snapshots.
        """
        return DeviceSnapshot(self._state, self._state.check_sequence(seq_id))

    def seq_save_state(
        self,
        path: StrPath,
        seq_id: int = 0,
        tokens: Iterable[int] = (),
        *,
        durable: bool = True,
        progress: Progress | None = None,
        memory_limit: int | None = None,
    ) -> int:
        """Write one sequence to a sequence file, as ``llama_state_seq_save_file`` would.

        Arguments, result and errors as :meth:`save_state`; SequenceIdError as
        :meth:`seq_snapshot`.
        """
        return self._state.save(
            self._state.check_sequence(seq_id),
            path,
            tokens,
            durable=durable,
            progress=progress,
            memory_limit=memory_limit,
        )

    def seq_load_state(
        self,
        path: StrPath,
        dest_seq_id: int = 0,
        *,
        validate: bool = True,
        progress: Progress | None = None,
        memory_limit: int | None = None,
    ) -> Restored:
        """Replace one sequence by that of a sequence file; the others stay.

        Arguments, result and errors as :meth:`load_state`; SequenceIdError as :meth:`seq_restore`.
        """
        self._state.check_sequence(dest_seq_id)
        return self._state.load(
            dest_seq_id, path, validate=validate, progress=progress, memory_limit=memory_limit
        )

    # -- undoing

    @contextmanager
    def savepoint(self, *seq_ids: int) -> Iterator[None]:
        """Put sequences back as they were when the block raises.

        Costs one snapshot of each. What the block did to other sequences stays. Named sequences
        of a sliding-window model come back with the cells that a sequence state holds.

        Args:
            seq_ids: The sequences; none named: all of them, as one whole state.

        Raises:
            SequenceIdError: An id is outside ``0 .. n_seq_max - 1``.
            CapacityError: The block filled the cells that putting back needs.
        """
        scopes: list[int | None] = [self._state.check_sequence(i) for i in seq_ids] or [None]
        with self._handle.use():
            undo = self._undoing(scopes)
        try:
            yield
        except BaseException:
            # A context that the block has closed has nothing to be put back into.
            if not self._handle.closed:
                with self._handle.use():
                    undo()
            raise

    # -- shared by the above

    def _undoing(self, scopes: Sequence[int | None]) -> Callable[[], None]:
        """What puts the sequences back as they are now; both under the context's lock."""
        kept = [(scope, self._state.snapshot(scope)) for scope in scopes]

        def undo() -> None:
            for scope, blob in kept:
                self._state.undo(scope, blob)

        return undo

    @contextmanager
    def _sequence(self, seq_id: int) -> Iterator[Call]:
        self._state.check_sequence(seq_id)
        with self._handle.use() as call:
            yield call

    def _begin(self, span: _memory.Positions) -> int:
        """The position at which a sequence begins, as far as llama.cpp tells."""
        # Of recurrent memory it names the last one, of a window the first that is still there.
        return 0 if self._facts.recurrent or self._facts.n_swa else max(span.first, 0)

    def _check_cut(self, seq_id: int, span: _memory.Positions, first: int, last: int) -> None:
        tail = last > span.last
        if self._facts.recurrent or (tail and first < self._state.rewind_min(span)):
            raise self._can_not_cut(seq_id, first, last)

    def _can_not_cut(self, seq_id: int, first: int, last: int) -> UnsupportedError:
        return UnsupportedError(
            f"the memory of a {self.arch} model can not lose positions {first} to {last - 1} of "
            f"sequence {seq_id} and go on: restore a snapshot of before, or empty the sequence "
            "and decode its beginning again"
        )


def _clip(span: _memory.Positions, start: int, end: int | None) -> tuple[int, int]:
    """The range that the caller means, without what no position reaches."""
    n_past = span.last + 1
    return max(start, 0), n_past if end is None else min(end, n_past)
