"""Checkpoints that are made of others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import layout
from ..layout.restore_points import convert_point
from .checkpoint import Checkpoint


def changed(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """Return a checkpoint made as *checkpoint* was, but for some of the arguments."""
    packed = checkpoint.packed_tokens
    arguments = {
        "payload": checkpoint.payload,
        "kind": checkpoint.kind,
        "session_version": checkpoint.session_version,
        "source": checkpoint.source,
        "tokens": () if packed else checkpoint.tokens,
        "logits": checkpoint.logits,
        "logits_of": checkpoint.logits_of,
        "fingerprint": checkpoint.fingerprint,
        "meta": checkpoint.meta,
        "packed_tokens": packed,
        "restore_points": checkpoint.restore_points,
    }
    return Checkpoint(**{**arguments, **changes})


def converted(checkpoint: Checkpoint, session_version: int) -> Checkpoint:
    """Return a checkpoint as a llama.cpp of another session version would have made it.

    Raises:
        UnsupportedError: That version is not known, or more than the form would be another; see
            :func:`llama_state.layout.convert`.
        FormatError: The payload is damaged.
    """
    form = layout.Form(session_version)
    payload = layout.convert(checkpoint.payload, checkpoint.layout, form)
    points = [convert_point(one, checkpoint.layout, form) for one in checkpoint.restore_points]
    fingerprint = checkpoint.fingerprint
    if fingerprint.context:
        context = {**fingerprint.context, "session version": str(session_version)}
        fingerprint = replace(fingerprint, context=context)
    return changed(
        checkpoint,
        payload=payload,
        session_version=session_version,
        fingerprint=fingerprint,
        restore_points=points,
    )
