"""Checkpoints of one context: taken, and resumed where they belong."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from .. import layout
from .._llama import calls
from .._llama.calls import Target
from .._llama.facts import Facts
from .._llama.handles import Call, Handle, LastLogits
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.fingerprint import ALL_WEIGHTS, Fingerprint
from ..errors import (
    Difference,
    FormatError,
    IdentityWarning,
    MismatchError,
    MismatchWarning,
    StateError,
)
from ..layout import RestorePoint
from . import engine
from .changes import Keeper
from .identity import Identity
from .state import ContextState, Restored

if TYPE_CHECKING:
    from .._io import Buffer

# Fields of a fingerprint that say in which form a state was written: a restore rewrites that.
_FORM: Final = frozenset({"session version", "streams", "flash attention"})

Check: TypeAlias = Literal["strict", "warn", "off"]


class Checkpoints:
    """Takes checkpoints of one context, and restores those that belong to it."""

    def __init__(
        self,
        handle: Handle,
        facts: Facts,
        state: ContextState,
        identity: Identity,
        keeper: Keeper,
    ) -> None:
        self._handle = handle
        self._facts = facts
        self._state = state
        self._identity = identity
        self._keeper = keeper

    @property
    def fingerprint(self) -> Fingerprint:
        """The model and the settings that states of this context belong to, as far as known."""
        return self._fingerprint(full=False)

    def _fingerprint(self, *, full: bool) -> Fingerprint:
        with self._handle.use() as call:
            library, known = self._handle.library, self._state.known
            return self._identity.fingerprint(call, library, self._facts, known, full=full)

    def take(
        self,
        target: Target,
        tokens: Iterable[int] | None,
        meta: Mapping[str, Any] | None,
        out: Buffer | None,
        points: Sequence[RestorePoint],
        *,
        logits: bool,
    ) -> Checkpoint:
        """Return a checkpoint; see :meth:`llama_state.Context.checkpoint`."""
        self._handle.library.require_known_version()
        with self._handle.use() as call:
            listed: Sequence[int]
            n_past = None
            if tokens is None:
                listed = self._keeper.known_tokens(call, target) or ()
            else:
                listed, n_past = list(tokens), self._n_past(call, target)
            last, row = None, None
            if logits:
                last = _logits_to_keep(call, target, self._handle.pointer.last_logits)
                row = last.row or engine.last_logits(call, self._facts.n_vocab)
            payload = self._state.snapshot(target, out)
            if target is not None:
                points = self._state.own_points(target, points, payload)
            recorded = self._state.recorded(target, payload)
            known = self.fingerprint
        _warn_of_unknown(known.unknown)
        checkpoint = Checkpoint(
            payload,
            kind="whole" if target is None else "sequence",
            session_version=self._handle.library.session_version,
            source=target,
            tokens=listed,
            logits=row,
            logits_of=last.seq_id if last else None,
            fingerprint=replace(known, context={**known.context, **recorded}),
            meta=meta,
            restore_points=points,
        )
        if listed and n_past is not None:
            _warn_of_tokens(len(listed), n_past)
        return checkpoint

    def _n_past(self, call: Call, target: Target) -> set[int]:
        """Return where decoding of a sequence goes on, or of each one that is not empty."""
        if target is not None:
            return {calls.positions(call, target).last + 1}
        spans = calls.occupied(call, self._facts.n_seq_max).values()
        return {span.last + 1 for span in spans}

    def resume(self, checkpoint: Checkpoint, dest_seq_id: int | None, check: Check) -> Restored:
        """Restore a checkpoint; see :meth:`llama_state.Context.resume`."""
        target = self._destination(checkpoint, dest_seq_id)
        self._compare(checkpoint, check)
        checkpoint.check_unchanged()
        payload, tokens = checkpoint.payload, checkpoint.tokens
        version = checkpoint.session_version
        with self._handle.use():
            restored = self._state.restore(target, payload, tokens, validate=True, version=version)
            if checkpoint.logits is not None and checkpoint.logits_of is not None:
                seq_id = checkpoint.logits_of if target is None else target
                if (span := restored.sequences.get(seq_id)) is not None:
                    kept = LastLogits(seq_id, span.n_past, checkpoint.logits)
                    self._handle.pointer.last_logits = kept
        return replace(
            restored,
            tokens=tokens,
            media=checkpoint.media,
            restore_points=checkpoint.restore_points,
        )

    def _destination(self, checkpoint: Checkpoint, dest_seq_id: int | None) -> Target:
        if checkpoint.kind == "whole":
            if dest_seq_id is not None:
                raise FormatError(
                    "a checkpoint of the whole context: resume it without dest_seq_id"
                )
            return None
        source = checkpoint.source or 0
        return self._facts.check_sequence(source if dest_seq_id is None else dest_seq_id)

    def _compare(self, checkpoint: Checkpoint, check: Check) -> None:
        """Refuse, or warn of, a checkpoint of another model or of other settings."""
        saved, current = checkpoint.session_version, self._handle.library.session_version
        if saved != current and not {saved, current} <= layout.SEQUENCE_VERSION.keys():
            raise MismatchError([Difference("session version", saved, current)])
        logits, n_vocab = checkpoint.logits, self._facts.n_vocab
        if logits is not None and len(logits) != n_vocab:  # nothing could sample from them
            raise MismatchError([Difference("logits", len(logits), n_vocab)])
        if check == "off":
            return
        # Whoever took it with all bytes of the weights wants them compared.
        wanted = checkpoint.fingerprint
        now = self._fingerprint(full=ALL_WEIGHTS in wanted.model)
        differences = [one for one in wanted.differences(now) if one.name not in _FORM]
        if not differences:
            return
        error = MismatchError(differences)
        if check == "strict":
            raise error
        warnings.warn(str(error), MismatchWarning, stacklevel=5)


def _warn_of_unknown(unknown: Mapping[str, str]) -> None:
    """Warn now, while the caller can still say it, of what a strict resume will miss."""
    if unknown:
        missing = "; ".join(f"{name} ({why})" for name, why in sorted(unknown.items()))
        text = f"not known of this context, so that a strict resume refuses it: {missing}"
        warnings.warn(text, IdentityWarning, stacklevel=5)


def _warn_of_tokens(given: int, n_past: set[int]) -> None:
    """Warn of tokens that are not those of a sequence: of them a resume gives back as many.

    An image or a sound can have more positions than tokens, or fewer. So it is no error.
    """
    if given in n_past:
        return
    there = " or ".join(map(str, sorted(n_past))) or "no"
    text = (
        f"tokens= has {given} token{'' if given == 1 else 's'}, and what is saved has {there} "
        "positions: give all tokens that were decoded, or none"
    )
    warnings.warn(text, IdentityWarning, stacklevel=5)


def _logits_to_keep(call: Call, target: Target, last: LastLogits | None) -> LastLogits:
    """Return *last*, if they are those of the end of what is saved.

    Raises:
        StateError: They are not.
    """
    if last is None:
        raise StateError("no logits to keep: decode the last token before the checkpoint")
    n_past = calls.positions(call, last.seq_id).last + 1
    if target not in (None, last.seq_id) or n_past != last.n_past:
        raise StateError(
            f"the last logits are those of position {last.n_past - 1} of sequence "
            f"{last.seq_id}: decode the last token of what is saved before the checkpoint"
        )
    return last
