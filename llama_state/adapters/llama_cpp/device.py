"""A snapshot on the device that brings the bookkeeping of a ``Llama`` back too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...context.device import DeviceSnapshot
from ...context.state import Admit, Restored

if TYPE_CHECKING:
    from .context import LlamaContext


class LlamaDeviceSnapshot(DeviceSnapshot):
    """A device snapshot that knows the tokens of its sequence."""

    def __init__(self, ctx: LlamaContext, seq_id: int) -> None:
        with ctx._handle.use():
            super().__init__(ctx._state, seq_id)
            self._tokens = ctx.tokens if seq_id == 0 else None
        self._ctx = ctx

    def restore(self, dest_seq_id: int | None = None) -> Restored:
        """As :meth:`DeviceSnapshot.restore`; the ``Llama`` is put back too.

        Raises:
            MismatchError: Another sequence's snapshot into sequence 0: its tokens are not known.
        """
        dest = self.seq_id if dest_seq_id is None else dest_seq_id

        def run(admit: Admit) -> Restored:
            admit(None, self._tokens or ())
            return super(LlamaDeviceSnapshot, self).restore(dest)

        with self._ctx._handle.use():
            if dest == 0 and not self.stale:
                self._ctx._known(self.n_past, self._tokens)
            return self._ctx._replace(dest, run, self._tokens, validate=True)
