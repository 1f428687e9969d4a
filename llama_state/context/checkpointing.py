"""Checkpoints of a context: taking them, and going on from them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from .._llama import calls
from .._llama.handles import Call, LastLogits
from ..checkpoint.checkpoint import Checkpoint
from ..errors import Difference, FormatError, MismatchError, MismatchWarning, StateError
from .decoding import Decoding
from .state import Restored

if TYPE_CHECKING:
    from .._io import Buffer

Check: TypeAlias = Literal["strict", "warn", "off"]
_CHECKS: Final = ("strict", "warn", "off")


class Checkpointing(Decoding):
    """The part of :class:`llama_state.Context` that is about checkpoints."""

    def checkpoint(
        self,
        seq_id: int | None = None,
        tokens: Iterable[int] = (),
        logits: bool = False,
        meta: Mapping[str, Any] | None = None,
        *,
        out: Buffer | None = None,
    ) -> Checkpoint:
        """Take the state with everything that must be known to trust it later, elsewhere.

        Args:
            seq_id: The sequence; None for the whole context.
            tokens: The tokens that it stands for, to be kept with it.
            logits: Keep the logits of the last token too, so that sampling can go on after
                :meth:`resume` without decoding again. It must have been decoded last.
            meta: Anything else to be kept with it, as a JSON object: sampler settings, a name.
            out: A writable buffer for the state, which the checkpoint refers to from then on.

        Raises:
            SequenceIdError: *seq_id* is outside ``0 .. n_seq_max - 1``.
            StateError: *logits* are not those of the end of the sequence.
            FormatError: *meta* is no JSON object, or *tokens* are no 32-bit integers.
            CapacityError: *out* is too small.
        """
        scope = None if seq_id is None else self._state.check_sequence(seq_id)
        with self._handle.use() as call:
            last = self._last_logits(call, scope) if logits else None
            row = self.logits() if last else None
            payload = self._state.snapshot(scope, out)
            recorded = self._state.recorded(scope, payload)
            known = self.fingerprint
        return Checkpoint(
            payload,
            kind="whole" if scope is None else "sequence",
            session_version=self.library.session_version,
            source=scope,
            tokens=tokens,
            logits=row,
            logits_of=last.seq_id if last else None,
            fingerprint=replace(known, context={**known.context, **recorded}),
            meta=meta,
        )

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
            The tokens of the checkpoint, and the sequences that came back.

        Raises:
            MismatchError: It belongs to another model, or to other settings: ``differences``
                says field by field which. Nothing was changed.
            ChecksumError: The file of a mapped checkpoint was written to since it was loaded.
            FormatError: *dest_seq_id* is given for a checkpoint of the whole context.
            SequenceIdError: The sequence is outside ``0 .. n_seq_max - 1``.
            StateError: As :meth:`llama_state.Context.restore` otherwise.
        """
        scope = self._destination(checkpoint, dest_seq_id)
        self._compare(checkpoint, check)
        checkpoint.check_unchanged()
        with self._handle.use():
            restored = self._put_checkpoint(scope, checkpoint)
            if checkpoint.logits is not None and checkpoint.logits_of is not None:
                seq_id = checkpoint.logits_of if scope is None else scope
                if (span := restored.sequences.get(seq_id)) is not None:
                    kept = LastLogits(seq_id, span.n_past, checkpoint.logits)
                    self._handle.shared.last_logits = kept
        return replace(restored, tokens=checkpoint.tokens)

    # -- shared by the above

    def _put_checkpoint(self, scope: int | None, checkpoint: Checkpoint) -> Restored:
        return self._state.restore(scope, checkpoint.payload, validate=True)

    def _destination(self, checkpoint: Checkpoint, dest_seq_id: int | None) -> int | None:
        if checkpoint.kind == "whole":
            if dest_seq_id is not None:
                raise FormatError(
                    "a checkpoint of the whole context: resume it without dest_seq_id"
                )
            return None
        source = checkpoint.source or 0
        return self._state.check_sequence(source if dest_seq_id is None else dest_seq_id)

    def _compare(self, checkpoint: Checkpoint, check: Check) -> None:
        """Refuse, or warn of, a checkpoint of another model or of other settings."""
        if check not in _CHECKS:
            raise ValueError(f"check must be one of {', '.join(_CHECKS)}, not {check!r}")
        saved, current = checkpoint.session_version, self.library.session_version
        if saved != current:  # llama.cpp has no way to read it
            raise MismatchError([Difference("session version", saved, current)])
        if check == "off":
            return
        error = MismatchError(checkpoint.fingerprint.differences(self.fingerprint))
        if not error.differences:
            return
        if check == "strict":
            raise error
        warnings.warn(str(error), MismatchWarning, stacklevel=3)

    def _last_logits(self, call: Call, scope: int | None) -> LastLogits:
        last = self._handle.shared.last_logits
        if last is None:
            raise StateError("no logits to keep: decode the last token before the checkpoint")
        n_past = calls.positions(call, last.seq_id).last + 1
        if scope not in (None, last.seq_id) or n_past != last.n_past:
            raise StateError(
                f"the last logits are those of position {last.n_past - 1} of sequence "
                f"{last.seq_id}: decode the last token of what is saved before the checkpoint"
            )
        return last
