"""Describe a checkpoint: only what its digests show to be intact is read."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

from .._io import Progress
from ..checkpoint.checkpoint import Checkpoint, from_parts
from ..checkpoint.container import HEAD_PARTS, VERSION, Container, Part, is_keyed, open_container
from ..errors import ChecksumError, FormatError
from ..layout import Traits, has_sequence_head, model_traits
from .statefile import Digests, Reading, StateFile, with_packed_tokens, with_problem, with_state
from .words import count

KEY_NEEDED = "it can be read only with its key"


def open_checkpoint(
    found: StateFile, traits: Sequence[Traits], key: bytes | None, progress: Progress | None
) -> StateFile:
    """Describe a checkpoint: verify all parts, then read those that are intact.

    Args:
        found: What is known of the file; its *state* is the whole file.
        traits: What is known of the model; not used if the checkpoint has a fingerprint.
        key: The key that it must be authenticated with.
        progress: Called with the bytes verified and the bytes in total.

    Raises:
        UnsupportedError: xxhash, or zstandard, is not installed.
    """
    data, found = found.state, replace(found, state=found.state[:0])
    if key is None and is_keyed(data):
        return with_problem(found, ChecksumError(KEY_NEEDED))
    try:
        opened = open_container(data, key=key)
    except FormatError as error:
        return with_problem(found, error)
    damaged = tuple(opened.damaged(progress))
    digests = Digests(opened.keyed, opened.compressed, opened.parts, damaged)
    found = replace(found, version=VERSION, digests=digests)
    if damaged:
        found = with_problem(found, _damage(damaged, opened.parts))
    if any(part.name in HEAD_PARTS for part in damaged):
        return found
    if opened.compressed:
        found = replace(found, state_offset=None)
        if damaged:
            return _with_checkpoint(found, opened, memoryview(b""))
    try:
        state = opened.payload()
    except FormatError as error:
        return with_problem(found, error)
    if not opened.compressed:
        found = replace(found, state_offset=opened.parts[len(HEAD_PARTS) - 1].end)
    found = _with_checkpoint(replace(found, state=state), opened, state)
    return found if found.checkpoint is None else _with_layout(found, found.checkpoint, traits)


def _damage(damaged: Sequence[Part], parts: Sequence[Part]) -> ChecksumError:
    first, *others = damaged
    text = f"{first.name} is not what was written"
    if others:
        text += f", nor {count(len(others), 'other part')} of {len(parts)}"
    return ChecksumError(text, offset=first.offset)


def _with_checkpoint(found: StateFile, opened: Container, state: memoryview) -> StateFile:
    """Add the checkpoint, of which all but the payload is known to be intact."""
    try:
        checkpoint = from_parts(state, bytes(opened.metadata), opened.tokens, opened.logits)
    except FormatError as error:
        return with_problem(found, error)
    found = replace(found, checkpoint=checkpoint)
    if checkpoint.packed_tokens:
        tokens_at = opened.parts[HEAD_PARTS.index("tokens")].offset
        return with_packed_tokens(found, array("i", checkpoint.packed_tokens), at=tokens_at)
    return replace(found, tokens=array("i", checkpoint.tokens))


def _with_layout(found: StateFile, checkpoint: Checkpoint, traits: Sequence[Traits]) -> StateFile:
    model = checkpoint.fingerprint.model
    if model:
        traits = model_traits(model.get("architecture", ""), model.get)
    headed = checkpoint.kind == "whole" or has_sequence_head(found.state)
    reading = Reading(checkpoint.session_version, checkpoint.kind, headed)
    return with_state(found, [reading], traits)
