"""Snapshots whose tensors stay on the device where the cache is."""

from __future__ import annotations

from typing import Any

from .state import ContextState, Restored


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

    def __init__(self, state: ContextState, seq_id: int) -> None:
        self._state = state
        self._kept = state.keep_on_device(seq_id)
        self.seq_id = seq_id
        self.n_past = self._kept.positions.last + 1
        self.nbytes = len(self._kept.head)

    def __repr__(self) -> str:
        stale = ", stale" if self.stale else ""
        return f"<DeviceSnapshot of sequence {self.seq_id}, {self.n_past} positions{stale}>"

    def __reduce__(self) -> Any:
        raise TypeError("a DeviceSnapshot lives on its device and cannot be pickled")

    @property
    def stale(self) -> bool:
        """Whether a later snapshot has replaced the data, or the context was closed."""
        return not self._state.is_on_device(self._kept)

    def restore(self, dest_seq_id: int | None = None) -> Restored:
        """Replace a sequence of the same context by this one.

        Args:
            dest_seq_id: The sequence to replace; None for the one that was saved.

        Raises:
            StaleError: A later snapshot of the sequence has replaced the data.
            CapacityError: The cells are not sure to be free; nothing has changed.
            SequenceIdError: *dest_seq_id* is outside ``0 .. n_seq_max - 1``.
            ClosedError: The context was closed.
        """
        dest = self._state.check_sequence(self.seq_id if dest_seq_id is None else dest_seq_id)
        return self._state.restore_from_device(dest, self._kept)
