"""Describe a file that may hold a state: find out its kind, then read it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from .._io import Progress, StrPath
from .._io.arguments import checked
from .._io.reading import map_file, read_file
from ..checkpoint.container import is_container
from ..checkpoint.fingerprint import model_fields
from ..errors import FormatError, UnsupportedError
from ..layout import (
    SEQUENCE_VERSION,
    FileHeader,
    Kind,
    Traits,
    listed_tokens,
    model_traits,
    parse_file_header,
)
from ..layout.appended import parse_before_points, points_behind
from ..layout.recognition import naming, recognize
from .checkpoints import open_checkpoint
from .statefile import FileKind, Reading, StateFile, with_problem, with_state

_NEWEST_FIRST = tuple(sorted(SEQUENCE_VERSION, reverse=True))
_HEADLESS_VERSION = 9
_FILES: dict[str, FileKind] = {
    "session file": "session file",
    "sequence file": "sequence file",
    "slot file": "slot file",
}


@checked
def inspect_file(
    path: StrPath,
    *,
    model: StrPath | None = None,
    key: bytes | None = None,
    max_size: int | None = None,
    progress: Progress | None = None,
) -> StateFile:
    """Describe the state in a file, without any libllama.

    A damaged file is described as far as it can be read. Of native files only the cells and the
    heads of the tensors are read. Of checkpoints everything is, since the digests are compared.

    Args:
        path: A checkpoint, a session file, a sequence file, a slot file of llama-server, or a
            blob that was dumped to a file. It must not be truncated while the result is in use.
        model: The GGUF file of the model. Sequence states name no architecture: without *model*,
            every known kind of memory is tried.
        key: The key that a checkpoint must be authenticated with. With it, the file is read into
            memory: a page of a mapped file could change after it was verified.
        max_size: The most bytes that the state of a checkpoint may have when it is decompressed.
            None: 1024 times the size of the file.
        progress: For a checkpoint: called with the bytes verified and the bytes in total.

    Raises:
        OSError: A file cannot be read.
        FormatError: The file holds no state, or *model* is not a GGUF file.
        UnsupportedError: It is a compressed checkpoint, and zstandard is not installed.
    """
    traits = () if model is None else traits_of_model(model)
    with naming(path):
        return _describe(os.fspath(path), traits, key, max_size, progress)


def _describe(
    name: str,
    traits: tuple[Traits, ...],
    key: bytes | None,
    max_size: int | None,
    progress: Progress | None,
) -> StateFile:
    data = map_file(name) if key is None else read_file(name)
    if not data:
        raise FormatError("the file is empty")
    kind: FileKind = "checkpoint" if is_container(data[:8]) else "sequence blob"
    file = StateFile(name, len(data), kind, state=data)
    if kind == "checkpoint":
        file = open_checkpoint(file, traits, key, max_size, progress)
    else:
        file = _open_native(file, traits)
    arch = file.layout.arch if file.layout else None
    if traits and arch and traits[0].arch != arch:
        raise FormatError(f"it belongs to a {arch} model, the one given is {traits[0].arch}")
    return file


def traits_of_model(path: StrPath) -> tuple[Traits, ...]:
    """Return the layouts that the states of the model in a GGUF file can have.

    Raises:
        OSError: It cannot be read.
        FormatError: Not a GGUF file, or damaged.
    """
    try:
        fields = model_fields(path)
    except FormatError as error:
        raise FormatError(f"the model {error.path or path}: {error.reason}") from None
    return model_traits(fields["architecture"], fields.get)


def _open_native(file: StateFile, traits: Sequence[Traits]) -> StateFile:
    """Describe a file that is not a checkpoint; *state* of *file* is the whole file."""
    found = recognize(file.state)
    if found.kind in _FILES:
        return _open_file(replace(file, kind=_FILES[found.kind]), traits)
    if found.kind == "sequence blob":
        return _open_blob(file, traits)
    if found.kind == "whole blob":
        return _open_blob(replace(file, kind="whole blob"), traits)
    if found.kind in ("model", "packed"):
        raise FormatError(f"not a state but {found.what}: {found.use}")
    return _open_headless(file, traits)


def _open_file(file: StateFile, traits: Sequence[Traits]) -> StateFile:
    """Describe a session file, a sequence file or a slot file."""
    data = file.state
    file = replace(file, state=data[:0])
    try:
        header = parse_file_header(data, any_version=True)
    except FormatError as error:
        return with_problem(file, error)
    offset = header.payload_offset
    file = replace(file, version=header.version, state_offset=offset, state=data[offset:])
    try:
        prompt = listed_tokens(data, header)
    except FormatError as error:  # the words of the list are not tokens: do not show them
        file = with_problem(file, error)
    else:
        file = replace(file, slot=prompt.slot, tokens=prompt.listed)
    try:
        parse_file_header(data)  # Now check the version: the tokens do not depend on it.
    except FormatError as error:
        return with_problem(file, error)
    file = _split(file, data, header, traits)
    return with_state(file, [Reading(header.session_version, header.kind, headed=False)], traits)


def _split(
    file: StateFile, data: memoryview, header: FileHeader, traits: Sequence[Traits]
) -> StateFile:
    """Cut the restore points off the state of a file, and add them."""
    version, offset, end = header.session_version, header.payload_offset, None
    for others in (False, True):
        try:
            layout, end = parse_before_points(
                data, header, version=version, traits=traits, others=others
            )
            break
        except (FormatError, UnsupportedError):
            continue  # what is wrong with the state is found after this
    if end is None:
        return file
    file = replace(file, state=data[offset:end])
    try:
        return replace(file, restore_points=points_behind(data, end, layout))
    except (FormatError, UnsupportedError) as error:
        return with_problem(file, error)


def _open_blob(file: StateFile, traits: Sequence[Traits]) -> StateFile:
    """Describe a blob. It records no version: all are tried."""
    kind: Kind = "whole" if file.kind == "whole blob" else "sequence"
    readings = [Reading(version, kind) for version in _NEWEST_FIRST]
    if file.kind == "sequence blob":
        readings += [Reading(version, partial=True) for version in _NEWEST_FIRST]
    return with_state(file, readings, traits)


def _open_headless(file: StateFile, traits: Sequence[Traits]) -> StateFile:
    """Describe a sequence blob of an early build of version 9, or raise FormatError."""
    start = bytes(file.state[:8])
    file = with_state(file, [Reading(_HEADLESS_VERSION, headed=False)], traits)
    if file.problem:
        raise FormatError(f"not a state (it begins with the bytes {start.hex(' ')})")
    return file
