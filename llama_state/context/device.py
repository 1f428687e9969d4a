"""Snapshots whose tensors stay on the device where the cache is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial as bound
from typing import Any

from .._io.arguments import checked
from .._llama import calls
from .._llama.facts import Facts
from .._llama.handles import Call, Handle
from ..errors import RestoreError, StaleError, UnsupportedError
from ..layout import Span
from .changes import Change, Keeper, attempt
from .fit import Fit
from .form import LOSES_STREAMS
from .restore import Restorer
from .state import Restored, restored_spans


@dataclass(frozen=True, slots=True, eq=False)
class OnDevice:
    """A sequence whose tensors llama.cpp keeps on the device.

    Attributes:
        seq_id: The sequence that was saved: llama.cpp keeps the last one of each.
        head: The state without its tensors, as llama.cpp wants it back.
        span: The sequence's positions.
        tokens: The tokens at these positions, where they are listed.
    """

    seq_id: int
    head: bytes
    span: Span
    tokens: Sequence[int] | None


class DeviceMemory:
    """What llama.cpp keeps on the device for one context: a snapshot of each sequence."""

    def __init__(
        self, handle: Handle, facts: Facts, fit: Fit, restorer: Restorer, keeper: Keeper
    ) -> None:
        self._handle = handle
        self._facts = facts
        self._fit = fit
        self._restorer = restorer
        self._keeper = keeper

    def keep(self, seq_id: int) -> DeviceSnapshot:
        """Let llama.cpp keep the tensors of a sequence; it forgets those of the one before.

        Raises:
            SequenceIdError: The sequence is not one of the context.
            UnsupportedError: This libllama, or this kind of memory, has no such snapshots.
        """
        self._facts.check_sequence(seq_id)
        library = self._handle.library
        library.require("state-flags")
        if library.session_version <= LOSES_STREAMS:
            raise UnsupportedError(
                "before session version 10 llama.cpp aborts when a snapshot cannot be restored "
                "from the device: take seq_snapshot()"
            )
        self._fit.countable()
        with self._handle.use() as call:
            tokens = self._keeper.known_tokens(call, seq_id)
            head = calls.read(call, seq_id, calls.ON_DEVICE)
            kept = OnDevice(seq_id, head, calls.positions(call, seq_id), tokens)
            self._handle.pointer.on_device[seq_id] = kept
        return DeviceSnapshot(self, kept)

    def has(self, kept: OnDevice) -> bool:
        """Tell whether llama.cpp still has the tensors of *kept*."""
        return not self._handle.closed and self._handle.pointer.on_device.get(kept.seq_id) is kept

    def restore(self, dest: int, kept: OnDevice) -> Restored:
        """Replace *dest* by *kept*; errors as :meth:`DeviceSnapshot.restore`."""
        self._facts.check_sequence(dest)
        spans = {dest: kept.span} if kept.span.last >= 0 else {}
        with self._handle.use() as call:
            if not self.has(kept):
                raise StaleError(f"a later snapshot of sequence {kept.seq_id} replaced this one")
            change = Change("replace", dest, spans, kept.tokens)
            put = bound(self._put, call, change, dest, kept)
            held = self._keeper.count(call, change, put)
        return Restored(len(kept.head), (), restored_spans(self._fit, held))

    def _put(self, call: Call, change: Change, dest: int, kept: OnDevice) -> dict[int, Span]:
        # llama.cpp aborts when it finds no room, so it is asked only where there is some.
        before = calls.occupied(call, self._facts.n_seq_max)
        self._fit.check_room(call, dest, kept.span.last + 1, before)
        write = bound(self._write, call, change, dest, kept)
        return attempt(change, write, bound(self._restorer.give_up, call, change))

    def _write(self, call: Call, change: Change, dest: int, kept: OnDevice) -> dict[int, Span]:
        change.state = "touched"
        self._handle.pointer.last_logits = None
        calls.empty(call, dest)
        held = {}
        if kept.span.last >= 0:
            consumed = calls.write(call, dest, kept.head, calls.ON_DEVICE)
            held[dest] = calls.positions(call, dest)
            if consumed != len(kept.head) or held[dest].last != kept.span.last:
                raise RestoreError("the snapshot on the device was refused", log=call.log())
        change.state = "done"
        return held


@checked
class DeviceSnapshot:
    """The state of one sequence, kept by llama.cpp on the device.

    Made by :meth:`llama_state.Context.seq_device_snapshot`. It belongs to its context, cannot
    be pickled or moved, and llama.cpp keeps only the last one of a sequence: an earlier one is
    stale, and using it is an error (in llama.cpp itself it restores wrong data or aborts).

    Attributes:
        seq_id: The sequence that was saved.
        n_past: The position at which decoding goes on after a restore.
        nbytes: Bytes kept in main memory: everything but the tensors.
    """

    def __init__(self, memory: DeviceMemory, kept: OnDevice) -> None:
        self._memory = memory
        self._kept = kept
        self.seq_id: int = kept.seq_id
        self.n_past: int = kept.span.last + 1
        self.nbytes: int = len(kept.head)

    def __repr__(self) -> str:
        stale = ", stale" if self.stale else ""
        return f"<DeviceSnapshot of sequence {self.seq_id}, {self.n_past} positions{stale}>"

    def __reduce__(self) -> Any:
        raise TypeError("a DeviceSnapshot lives on its device and cannot be pickled")

    @property
    def stale(self) -> bool:
        """Whether a later snapshot has replaced the data, or the context was closed."""
        return not self._memory.has(self._kept)

    def restore(self, dest_seq_id: int | None = None) -> Restored:
        """Replace a sequence of the same context by this one.

        Args:
            dest_seq_id: The sequence to replace; None for the one that was saved.

        Raises:
            StaleError: A later snapshot of the sequence has replaced the data.
            CapacityError: The cells are not sure to be free; nothing has changed.
            SequenceIdError: *dest_seq_id* is outside ``0 .. n_seq_max - 1``.
            MismatchError: Another sequence's snapshot into the one that a ``Llama`` uses: its
                tokens are not known.
            ClosedError: The context was closed.
        """
        dest = self.seq_id if dest_seq_id is None else dest_seq_id
        return self._memory.restore(dest, self._kept)
