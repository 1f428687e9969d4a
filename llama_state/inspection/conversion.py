"""Between native files and checkpoints."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Literal

from .._io import Progress, StrPath
from ..checkpoint.checkpoint import NOTHING_KNOWN, Checkpoint
from ..checkpoint.fingerprint import PLAIN, Fingerprint, model_fields, state_fields
from ..errors import FormatError, UnsupportedError
from .source import inspect_file
from .statefile import StateFile, raised

OutputKind = Literal["checkpoint", "native"]

_NOT_SAID = "the file that it was converted from does not say"


@dataclass(frozen=True, slots=True)
class Converted:
    """What :func:`convert_file` wrote.

    Attributes:
        path: The new file.
        kind: "checkpoint", "session file", "sequence file" or "slot file".
        nbytes: Its length.
    """

    path: str
    kind: str
    nbytes: int


def convert_file(
    source: StrPath,
    target: StrPath,
    *,
    to: OutputKind | None = None,
    model: StrPath | None = None,
    key: bytes | None = None,
    compress: bool = False,
    session_version: int | None = None,
    plain: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a native file as a checkpoint, or a checkpoint as the native file.

    A native file that became a checkpoint and is converted back has the bytes that it had.

    Args:
        source: The file to read; blobs that were dumped to a file are native too.
        target: The file to write: all of it, or nothing.
        to: What to write; not given: the other kind than *source*.
        model: The GGUF file of the model that the state belongs to, for its fingerprint.
        key: Authenticates the checkpoint that is read, or written.
        compress: Compress the checkpoint that is written.
        session_version: Of a blob that reads as one of several: blobs carry no version.
        plain: With *model*: no adapter and no rope setting but the model's own was in use. What
            is not said is not known, and a strict resume refuses what is not known.
        force: Replace what is at *target*.
        progress: Called with the bytes that are written, and with all.

    Raises:
        OSError: *source* cannot be read; FileExistsError: *target* is there.
        SaveError: *target* cannot be written.
        FormatError: *source* is no sound state.
        UnsupportedError: It is of the kind that is asked for already, or a package is missing.
    """
    name = str(os.fspath(target))
    if not force and os.path.lexists(name):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
    found = inspect_file(source, model=model, key=key)
    if found.problem:
        raise raised(found.problem)
    is_checkpoint = found.kind == "checkpoint"
    fingerprint = NOTHING_KNOWN if model is None else _fingerprint_of(found, model, plain)
    made = _checkpoint_of(found, fingerprint, session_version)
    if to == "native" or (to is None and is_checkpoint):
        if not is_checkpoint and found.has_tokens:
            raise UnsupportedError(f"it is a native file already: a {found.kind}")
        nbytes = made.to_native(name, progress=progress)
        return Converted(name, _native_kind(made), nbytes)
    nbytes = made.save(name, key=key, compress=compress, progress=progress)
    return Converted(name, "checkpoint", nbytes)


def _fingerprint_of(found: StateFile, model: StrPath, plain: bool) -> Fingerprint:
    recorded = state_fields(found.layout) if found.layout else {}
    if plain:
        return Fingerprint(model_fields(model), {**recorded, **PLAIN})
    return Fingerprint(model_fields(model), recorded, dict.fromkeys(PLAIN, _NOT_SAID))


def _checkpoint_of(
    found: StateFile, fingerprint: Fingerprint, session_version: int | None
) -> Checkpoint:
    """Return a sound file as a checkpoint, with a fingerprint where it has none."""
    if found.layout is None:
        raise FormatError("no state")
    if found.layout.partial:
        raise UnsupportedError("it is a partial state, of which there are no checkpoints")
    if found.checkpoint:
        known = fingerprint != NOTHING_KNOWN
        return _renamed(found.checkpoint, fingerprint) if known else found.checkpoint
    if found.has_tokens:
        return Checkpoint.from_native(found.path, fingerprint=fingerprint)
    return Checkpoint(
        found.state,
        kind=found.layout.kind,
        session_version=_choose_version(found, session_version),
        source=None if found.layout.kind == "whole" else found.layout.source or 0,
        fingerprint=fingerprint,
    )


def _renamed(made: Checkpoint, fingerprint: Fingerprint) -> Checkpoint:
    """Return a checkpoint with another fingerprint, if it had none."""
    if made.fingerprint != NOTHING_KNOWN:
        raise UnsupportedError("it says already which model it belongs to")
    return Checkpoint(
        made.payload,
        kind=made.kind,
        session_version=made.session_version,
        source=made.source,
        tokens=made.tokens,
        logits=made.logits,
        logits_of=made.logits_of,
        fingerprint=fingerprint,
        meta=made.meta,
        packed_tokens=made.packed_tokens,
    )


def _choose_version(found: StateFile, given: int | None) -> int:
    """Return the session version of a blob."""
    versions = found.session_versions
    if given is None and len(versions) > 1:
        names = ", ".join(map(str, versions))
        raise UnsupportedError(f"it reads as one of session version {names}: say which it is")
    if given is not None and given not in versions:
        raise FormatError(f"it does not read as one of session version {given}")
    return versions[0] if given is None else given


def _native_kind(made: Checkpoint) -> str:
    if made.kind == "whole":
        return "session file"
    return "slot file" if made.packed_tokens else "sequence file"
