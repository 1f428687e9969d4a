"""A context: decode into it, save it, bring it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, overload

from .._io import Progress, StrPath
from .checkpointing import Checkpointing
from .device import DeviceSnapshot
from .state import Restored

if TYPE_CHECKING:
    from .._io import Buffer


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
            OSError: The file cannot be read.
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
            partial: Only what cannot be cut back: the window of sliding-window layers and
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
