"""Convert native files to checkpoints, and back."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Literal

from .._io import Progress, StrPath
from .._io.arguments import checked
from ..checkpoint.checkpoint import NOTHING_KNOWN, Checkpoint
from ..checkpoint.conversion import changed, converted
from ..checkpoint.fingerprint import PLAIN, Fingerprint, model_fields, state_fields
from ..errors import FormatError, UnsupportedError
from ..layout import Layout
from .source import inspect_file
from .statefile import StateFile, sound_layout

OutputKind = Literal["checkpoint", "native"]

_NOT_RECORDED = "the file that it was converted from does not record it"


@dataclass(frozen=True, slots=True)
class Converted:
    """The file that :func:`convert_file` wrote.

    Attributes:
        path: Its path.
        kind: "checkpoint", "session file", "sequence file" or "slot file".
        nbytes: Its length.
    """

    path: str
    kind: str
    nbytes: int


@checked
def convert_file(
    source: StrPath,
    target: StrPath,
    *,
    to: OutputKind | None = None,
    model: StrPath | None = None,
    key: bytes | None = None,
    compress: bool = False,
    session_version: int | None = None,
    blob_version: int | None = None,
    plain: bool = False,
    force: bool = False,
    max_size: int | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Convert a native file to a checkpoint, a checkpoint to a native file, or to another version.

    A native file that is converted to a checkpoint and back is the same, byte for byte.

    Args:
        source: The file to read. A blob that was dumped to a file counts as native.
        target: The file to write: completely, or not at all.
        to: What to write; default: the kind that *source* is not, or with *session_version* the
            kind that it is.
        model: The GGUF file of the model that the state belongs to, for its fingerprint.
        key: The key of the checkpoint that is read or written.
        compress: Compress the checkpoint that is written.
        session_version: The session version that *target* is to have; default: that of *source*.
        blob_version: The session version of a blob. Needed if the blob, which records none, can be
            read as one of several.
        plain: With *model*: record that no adapters and only the model's own rope settings were in
            use. Otherwise they are unknown, and a strict resume raises MismatchError.
        force: Replace an existing *target*. Otherwise it is never replaced, even if it comes to be
            meanwhile.
        max_size: See :func:`inspect_file`.
        progress: Called with the bytes written and the bytes in total.

    Raises:
        OSError: *source* cannot be read; FileExistsError: *target* exists.
        SaveError: *target* cannot be written.
        FormatError: *source* is not a sound state.
        UnsupportedError: *source* is already what *to* says, or cannot have *session_version*, or
            a package is missing.
    """
    name = str(os.fspath(target))
    if not force and os.path.lexists(name):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
    file = inspect_file(source, model=model, key=key, max_size=max_size)
    layout = sound_layout(file)
    is_checkpoint = file.kind == "checkpoint"
    fingerprint = NOTHING_KNOWN if model is None else _fingerprint_of(layout, model, plain)
    checkpoint = _checkpoint_of(file, layout, fingerprint, blob_version)
    version = checkpoint.session_version if session_version is None else session_version
    changes = version != checkpoint.session_version
    if changes:
        checkpoint = converted(checkpoint, version)
    if to == "native" or (to is None and is_checkpoint != changes):
        if not is_checkpoint and file.has_tokens and not changes:
            raise UnsupportedError(f"it is already a native file: a {file.kind}")
        nbytes = checkpoint.to_native(name, replace=force, progress=progress)
        return Converted(name, _native_kind(checkpoint), nbytes)
    nbytes = checkpoint.save(name, key=key, compress=compress, replace=force, progress=progress)
    return Converted(name, "checkpoint", nbytes)


def _fingerprint_of(layout: Layout, model: StrPath, plain: bool) -> Fingerprint:
    recorded = state_fields(layout)
    if plain:
        return Fingerprint(model_fields(model), {**recorded, **PLAIN})
    return Fingerprint(model_fields(model), recorded, dict.fromkeys(PLAIN, _NOT_RECORDED))


def _checkpoint_of(
    file: StateFile, layout: Layout, fingerprint: Fingerprint, blob_version: int | None
) -> Checkpoint:
    """Return the state in a sound file as a checkpoint."""
    if layout.partial:
        raise UnsupportedError("a partial state cannot become a checkpoint")
    if file.checkpoint and fingerprint == NOTHING_KNOWN:
        return file.checkpoint
    if file.checkpoint:
        return _with_fingerprint(file.checkpoint, fingerprint)
    if file.has_tokens:
        return Checkpoint.from_native(file.path, fingerprint=fingerprint)
    return Checkpoint(
        file.state,
        kind=layout.kind,
        session_version=_choose_version(file, blob_version),
        source=None if layout.kind == "whole" else layout.source or 0,
        fingerprint=fingerprint,
    )


def _with_fingerprint(checkpoint: Checkpoint, fingerprint: Fingerprint) -> Checkpoint:
    """Return a checkpoint, which must have no fingerprint yet, with one."""
    if checkpoint.fingerprint != NOTHING_KNOWN:
        raise UnsupportedError("it already has a fingerprint: convert it without a model")
    return changed(checkpoint, fingerprint=fingerprint)


def _choose_version(file: StateFile, given: int | None) -> int:
    """Return the session version of a blob: the given one, if the blob can be read as such."""
    versions = file.session_versions
    if given is None and len(versions) > 1:
        names = ", ".join(map(str, versions))
        raise UnsupportedError(f"it can be of session version {names}: give blob_version")
    if given is not None and given not in versions:
        raise FormatError(f"it cannot be read as one of session version {given}")
    return versions[0] if given is None else given


def _native_kind(checkpoint: Checkpoint) -> str:
    if checkpoint.kind == "whole":
        return "session file"
    return "slot file" if checkpoint.packed_tokens else "sequence file"
