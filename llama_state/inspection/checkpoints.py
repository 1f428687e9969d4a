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
from ..layout.restore_points import check_point
from .statefile import Digests, Reading, StateFile, with_problem, with_state
from .words import count

KEY_NEEDED = "it can be read only with its key"


def open_checkpoint(
    file: StateFile,
    traits: Sequence[Traits],
    key: bytes | None,
    max_size: int | None,
    progress: Progress | None,
) -> StateFile:
    """Describe a checkpoint: verify all parts, then read those that are intact.

    Args:
        file: What is known of the file; its *state* is the whole file.
        traits: What is known of the model; not used if the checkpoint has a fingerprint.
        key: The key that it must be authenticated with.
        max_size: The most bytes that its state may have when it is decompressed.
        progress: Called with the bytes verified and the bytes in total.

    Raises:
        UnsupportedError: It is compressed, and zstandard is not installed.
    """
    data, file = file.state, replace(file, state=file.state[:0])
    if key is None and is_keyed(data):
        return with_problem(file, ChecksumError(KEY_NEEDED))
    try:
        opened = open_container(data, key=key, max_size=max_size)
    except FormatError as error:
        return with_problem(file, error)
    damaged = tuple(opened.damaged(progress))
    digests = Digests(opened.keyed, opened.compressed, opened.parts, damaged)
    file = replace(file, version=VERSION, digests=digests)
    if damaged:
        file = with_problem(file, _damage(damaged, opened.parts))
    if any(part.name in HEAD_PARTS for part in damaged):
        return file
    if opened.compressed:
        file = replace(file, state_offset=None)
        if damaged:
            return _with_checkpoint(file, opened, memoryview(b""), damaged=True)
    try:
        state = opened.payload()
    except FormatError as error:
        return with_problem(file, error)
    if not opened.compressed:
        file = replace(file, state_offset=opened.parts[len(HEAD_PARTS) - 1].end)
    file = _with_checkpoint(replace(file, state=state), opened, state, damaged=bool(damaged))
    return file if file.checkpoint is None else _with_layout(file, file.checkpoint, traits)


def _damage(damaged: Sequence[Part], parts: Sequence[Part]) -> ChecksumError:
    first, *others = damaged
    text = f"{first.name} is not what was written"
    if others:
        text += f", nor {count(len(others), 'other part')} of {len(parts)}"
    return ChecksumError(text, offset=first.offset)


def _with_checkpoint(
    file: StateFile, opened: Container, payload: memoryview, *, damaged: bool
) -> StateFile:
    """Add the checkpoint, of which all but the payload is known to be intact."""
    heads = bytes(opened.metadata), opened.tokens, opened.logits
    try:
        checkpoint = from_parts(payload, *heads, damaged=damaged)
    except FormatError as error:
        return with_problem(file, error)
    slot = checkpoint.slot
    tokens = slot.tokens if slot else array("i", checkpoint.tokens)
    file = replace(file, checkpoint=checkpoint, slot=slot, tokens=tokens)
    return replace(file, state=checkpoint.payload, restore_points=checkpoint.restore_points)


def _with_layout(file: StateFile, checkpoint: Checkpoint, traits: Sequence[Traits]) -> StateFile:
    model = checkpoint.fingerprint.model
    if model:
        traits = model_traits(model.get("architecture", ""), model.get)
    headed = checkpoint.kind == "whole" or has_sequence_head(file.state)
    reading = Reading(checkpoint.session_version, checkpoint.kind, headed)
    file = with_state(file, [reading], traits)
    if file.layout is None:
        return file
    try:
        for point in file.restore_points:
            check_point(point, file.layout)
    except FormatError as error:
        return with_problem(file, error)
    return file
