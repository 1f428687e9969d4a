"""A context: decode into it, save it, bring it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, overload

from .._io import Progress, StrPath
from .._io.arguments import checked
from .._llama._llama_cffi import ffi
from .._llama.calls import Target
from .._llama.facts import CreationOptions, context_facts
from .._llama.handles import Handle
from .._llama.library import Library
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.fingerprint import Fingerprint
from ..layout import RestorePoint
from . import engine, identity
from .changes import HeldTokens, Keeper
from .device import DeviceMemory, DeviceSnapshot
from .fit import Fit
from .form import StateForm
from .prefixes import Prefixes
from .restore import Restorer
from .resumption import Check, Checkpoints
from .sequence_files import SequenceFiles
from .sequences import Sequences
from .state import ContextState, Restored

if TYPE_CHECKING:
    from .._io import Buffer

NO_OPTIONS = CreationOptions()


@checked
class Context(SequenceFiles):
    """The memory of one or more sequences in llama.cpp.

    Made by :meth:`llama_state.Model.context`, or by :func:`llama_state.attach` around a context
    that another binding made. A context manager. Safe to use from several threads: calls on one
    context wait for each other, calls on different contexts run side by side.

    A sequence id outside ``0 .. n_seq_max - 1`` is a SequenceIdError everywhere, and every call
    after :meth:`close` a ClosedError.

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
        handle: Handle | None = None,
        options: CreationOptions = NO_OPTIONS,
        origin: identity.Origin = identity.UNKNOWN,
        keeper: Keeper | None = None,
    ) -> None:
        if handle is None:
            raise TypeError("make a context with Model.context(), or with attach()")
        with handle.use() as call:
            facts = context_facts(call, options)
        keeper = keeper or (HeldTokens() if handle.pointer.owned else Keeper())
        form = StateForm(handle.library, facts)
        fit = Fit(facts, form)
        restorer = Restorer(handle, facts, form, fit)
        self._handle = handle
        self._facts = facts
        self._identity = identity.Identity(origin)
        self._state = ContextState(handle, facts, form, fit, restorer, keeper)
        self._sequences = Sequences(handle, facts, fit, restorer, keeper)
        self._checkpoints = Checkpoints(handle, facts, self._state, self._identity, keeper)
        self._device = DeviceMemory(handle, facts, fit, restorer, keeper)
        self._prefixes = Prefixes(
            handle, facts, form, fit, restorer, keeper, self._sequences, self._identity
        )
        self.library: Library = handle.library
        self.arch: str = facts.arch
        self.n_vocab: int = facts.n_vocab
        self.n_ctx: int = facts.n_ctx
        self.n_batch: int = facts.n_batch
        self.n_seq_max: int = facts.n_seq_max

    def __repr__(self) -> str:
        closed = ", closed" if self._handle.closed else ""
        return f"<Context of {self.arch}, {self.n_ctx} cells, {self.n_seq_max} sequences{closed}>"

    @property
    def pointer(self) -> int:
        """The address of the ``llama_context``."""
        self._prefixes.shared()
        return int(ffi.cast("uintptr_t", self._handle.address))

    # -- what its states belong to

    @property
    def fingerprint(self) -> Fingerprint:
        """The model and the settings that this context's states belong to, as far as known.

        Samples of the model's file are read first. What is not known is in its ``unknown``.
        """
        return self._checkpoints.fingerprint

    def declare(
        self,
        *,
        adapters: Sequence[tuple[StrPath, float]] | None = None,
        rope: identity.Rope | None = None,
        full: bool = False,
    ) -> None:
        """Declare what llama.cpp does not say of a context, for its :attr:`fingerprint`.

        Args:
            adapters: (GGUF file, scale) of every LoRA adapter and control vector in use; none
                at all is ``[]``.
            rope: The rope and YaRN settings that the context was made with, by their names in
                ``llama_context_params``, as in ``{"rope_freq_base": 1e6}``; others are the model's.
            full: Compare all bytes of the weights from now on: the whole file is read.

        Raises:
            OSError: An adapter's file cannot be read.
            FormatError: It is no GGUF file, or damaged.
            UnsupportedError: There is no such rope setting.
        """
        with self._handle.use():
            self._identity.declare(adapters, rope, full=full)

    # -- decoding and positions

    def decode(self, tokens: Iterable[int], seq_id: int = 0) -> None:
        """Append *tokens* to a sequence, at position ``n_past(seq_id)``.

        Runs longer than ``n_batch`` are decoded in pieces. :meth:`logits` then gives those of
        the last token. After an error, or an interruption such as Ctrl-C, the sequence is what
        it was. (Of memory that cannot be cut a copy is kept while several pieces are decoded.)

        Args:
            tokens: Token ids; none at all changes nothing.
            seq_id: The sequence.

        Raises:
            CapacityError: The cache is full.
            DecodeError: A token outside the vocabulary, or llama.cpp refused.
            UnsupportedError: The model has an encoder, which this small engine does not run.
        """
        self._sequences.decode(seq_id, engine.checked_tokens(tokens, self.n_vocab))

    def logits(self) -> memoryview[float]:
        """Return the logits of the last token decoded: ``n_vocab`` float32, a copy.

        After :meth:`resume`, those of the checkpoint, if it has some.

        Raises:
            StateError: Nothing was decoded since the context was made, restored or cleared: no
                logits are in a state.
        """
        return self._sequences.logits()

    def n_past(self, seq_id: int = 0) -> int:
        """Return the position at which decoding of a sequence goes on; 0 for an empty one."""
        return self._sequences.n_past(seq_id)

    def seq_rm(self, seq_id: int, start: int = 0, end: int | None = None) -> None:
        """Remove the positions ``start <= position < end`` of a sequence.

        Args:
            seq_id: The sequence.
            start: First position to go.
            end: Position after the last one to go; None for the end of the sequence (-1 in C).

        Raises:
            ValueError: A negative position, or *start* behind *end*.
            UnsupportedError: The memory cannot be cut there: recurrent and hybrid memory can
                only be emptied, a sliding window cannot be cut back to where its cells are
                gone. The sequence is untouched.
        """
        self._sequences.remove(seq_id, start, end)

    def seq_cp(
        self,
        src: int,
        dest: int,
        start: int = 0,
        end: int | None = None,
        *,
        tokens: Iterable[int] | None = None,
    ) -> None:
        """Make sequence *dest* a copy of the positions ``start <= position < end`` of *src*.

        What *dest* held before is gone. In a unified context the copy shares its cells with the
        source and costs nothing; in a split one the cells are copied at once, not at the next
        decode as llama.cpp does it.

        Args:
            src: The sequence to copy.
            dest: The sequence to replace.
            start: First position to copy.
            end: Position after the last one; None for the end of the sequence.
            tokens: The tokens that are copied, for a context that lists those of *dest*.

        Raises:
            UnsupportedError: Part of a sequence of recurrent or hybrid memory, part of one in a
                split context, or one that ends where a sliding window has lost cells. Both
                sequences are untouched.
        """
        self._sequences.copy(src, dest, start, end, tokens)

    def clear(self) -> None:
        """Empty every sequence."""
        self._sequences.clear()

    # -- the whole context

    def state_size(self) -> int:
        """Return the bytes that :meth:`snapshot` would give now."""
        return self._state.size(None)

    @overload
    def snapshot(self) -> bytes: ...
    @overload
    def snapshot(self, out: Buffer) -> memoryview: ...
    def snapshot(self, out: Buffer | None = None) -> bytes | memoryview:
        """Return the state of all sequences, as llama.cpp's own bytes.

        Args:
            out: A writable buffer to fill instead of making new bytes.

        Returns:
            The state, or a view of the part of *out* that was written.

        Raises:
            CapacityError: *out* is too small.
        """
        return self._state.snapshot(None, out)

    def restore(
        self, blob: Buffer, *, validate: bool = True, tokens: Iterable[int] | None = None
    ) -> Restored:
        """Replace all sequences by those of a :meth:`snapshot`.

        Args:
            blob: Any contiguous buffer of bytes.
            validate: Parse the blob and compare it with this context first. Without that,
                formats of llama.cpp versions that this library does not know can be restored,
                at the price of a copy of what is in the context now.
            tokens: The tokens of its sequence 0, for a context that lists them: that of a
                ``Llama``. Others do not need them.

        Returns:
            The sequences that came back, with their positions.

        Raises:
            FormatError: Not a whole-context state, or damaged.
            MismatchError: A state of another model or of other context parameters.
            CapacityError: It needs more cells or sequences than this context has.
            UnsupportedError: A format that is not known; see *validate*.
            RestoreError: llama.cpp refused all the same; ``rolled_back`` says what is left.
        """
        return self._state.restore(None, blob, tokens, validate=validate)

    def save_state(
        self,
        path: StrPath,
        tokens: Iterable[int] | None = None,
        *,
        durable: bool = True,
        progress: Progress | None = None,
        memory_limit: int | None = None,
    ) -> int:
        """Write all sequences to a session file, as ``llama_state_save_file`` would.

        Args:
            path: The file; an existing one is replaced only by a complete new one.
            tokens: A token list to store along, usually the prompt. Not given: that of a
                context that lists its tokens, else none.
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
        tokens: Iterable[int] | None = None,
    ) -> Restored:
        """Replace all sequences by those of a session file.

        Args:
            path: The file.
            validate: See :meth:`restore`; the version of the file must be known all the same.
            progress: As in :meth:`save_state`, while the file is read: this context is touched
                after the last call. What it raises stops the load.
            memory_limit: See :meth:`save_state`.
            tokens: See :meth:`restore`; for a file that does not list them.

        Returns:
            The token list of the file and the sequences that came back.

        Raises:
            OSError: The file cannot be read.
            VersionError: It was written by another version of llama.cpp.
            StateError: As :meth:`restore` otherwise.
        """
        return self._state.load(
            None, path, tokens, validate=validate, progress=progress, memory_limit=memory_limit
        )

    # -- one sequence

    def seq_state_size(self, seq_id: int = 0, *, partial: bool = False) -> int:
        """Return the bytes that :meth:`seq_snapshot` would give now."""
        return self._state.size(self._facts.check_sequence(seq_id), partial=partial)

    @overload
    def seq_snapshot(self, seq_id: int = 0, *, partial: bool = False) -> bytes: ...
    @overload
    def seq_snapshot(
        self, seq_id: int = 0, *, out: Buffer, partial: bool = False
    ) -> memoryview: ...
    def seq_snapshot(
        self, seq_id: int = 0, out: Buffer | None = None, *, partial: bool = False
    ) -> bytes | memoryview:
        """Return the state of one sequence, as llama.cpp's own bytes.

        Args:
            seq_id: The sequence.
            out: A writable buffer to fill instead of making new bytes.
            partial: Only what cannot be cut back: the window of sliding-window layers and
                recurrent states. A cheap checkpoint to rewind *this* sequence to later; the
                full state where the memory has neither or nothing else.

        Returns:
            The state, or a view of the part of *out* that was written.

        Raises:
            CapacityError: *out* is too small.
            UnsupportedError: *partial* with a libllama that has no flags.
        """
        return self._state.snapshot(self._facts.check_sequence(seq_id), out, partial=partial)

    def seq_restore(
        self,
        blob: Buffer,
        dest_seq_id: int = 0,
        *,
        validate: bool = True,
        partial: bool = False,
        tokens: Iterable[int] | None = None,
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
            tokens: See :meth:`restore`: the tokens of the sequence. Not needed with *partial*.

        Raises:
            MismatchError: With *partial*, the sequence ends before the checkpoint.
            StateError: As :meth:`restore` otherwise.
        """
        target = self._facts.check_sequence(dest_seq_id)
        return self._state.restore(target, blob, tokens, validate=validate, partial=partial)

    def seq_device_snapshot(self, seq_id: int = 0) -> DeviceSnapshot:
        """Keep the state of one sequence on the device where the cache is.

        llama.cpp keeps one for each sequence: a later one makes the earlier one stale.

        Raises:
            UnsupportedError: This libllama, or this kind of memory, has no such snapshots.
        """
        return self._device.keep(seq_id)

    # -- checkpoints

    def checkpoint(
        self,
        seq_id: int | None = None,
        *,
        tokens: Iterable[int] | None = None,
        logits: bool = False,
        meta: Mapping[str, Any] | None = None,
        out: Buffer | None = None,
        restore_points: Sequence[RestorePoint] = (),
    ) -> Checkpoint:
        """Take the state with everything that must be known to trust it later, elsewhere.

        An ``IdentityWarning`` says what of that is not known, and what to do about it.

        Args:
            seq_id: The sequence; None for the whole context.
            tokens: Those that it stands for, kept with it. Not given: as in :meth:`save_state`.
            logits: Keep those of the last token, which must have been decoded last, to sample.
            meta: Anything else to be kept with it, as a JSON object: sampler settings, a name.
            out: A writable buffer for the state, which the checkpoint refers to from then on.
            restore_points: Partial snapshots of earlier moments of the sequence, kept with it.

        Raises:
            StateError: *logits* are not those of the end of the sequence.
            FormatError: *meta* is no JSON object, or *tokens* are no 32-bit integers, or a
                restore point is no partial state of this sequence.
            CapacityError: *out* is too small.
        """
        target = None if seq_id is None else self._facts.check_sequence(seq_id)
        return self._checkpoints.take(target, tokens, meta, out, restore_points, logits=logits)

    def resume(
        self, checkpoint: Checkpoint, dest_seq_id: int | None = None, *, check: Check = "strict"
    ) -> Restored:
        """Restore a checkpoint, if it belongs here.

        Args:
            checkpoint: That of a context, or of a sequence.
            dest_seq_id: The sequence to replace by that of a sequence; None for the one that it
                was taken from.
            check: What to do where model or settings are not known to be the same: "strict"
                refuses, "warn" warns and goes on, "off" goes on. That the state is sound and fits
                into this context is checked always.

        Returns:
            The tokens and restore points of the checkpoint, and the sequences that came back.

        Raises:
            MismatchError: It belongs to another model, or to other settings: ``differences``
                says field by field which. Nothing was changed.
            ChecksumError: The file of a mapped checkpoint was written to since it was loaded.
            FormatError: *dest_seq_id* is given for a checkpoint of the whole context.
            StateError: As :meth:`restore` otherwise.
        """
        return self._checkpoints.resume(checkpoint, dest_seq_id, check)

    # -- undoing

    def savepoint(self, *seq_ids: int) -> AbstractContextManager[None]:
        """Put sequences back as they were when the block raises.

        Costs one snapshot of each. What the block did to other sequences stays. Named sequences
        of a sliding-window model come back with the cells that a sequence state holds.

        Args:
            seq_ids: The sequences; none named: all of them, as one whole state.

        What the block raised goes on. Where a sequence could not be put back, say since the
        block filled its cells, a note of that exception says so.
        """
        targets: list[Target] = [self._facts.check_sequence(i) for i in seq_ids] or [None]
        return self._state.savepoint(targets)
