"""Verify a state file: the digests of a checkpoint, the structure of any state."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from .._io import Progress, StrPath
from .._io.arguments import checked
from ..errors import StateError
from .checkpoints import KEY_NEEDED
from .source import inspect_file
from .statefile import StateFile
from .words import count, paragraph, problem_text, size


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of :func:`verify_file`.

    Attributes:
        path: The file.
        kind: Its kind; None if it is not a state file, or cannot be read.
        sound: Whether there are no problems.
        checked: What was verified.
        problems: A text for each problem.
        word: "sound", "damaged", "locked" (its key is needed) or "unsure".
    """

    path: str
    kind: str | None
    sound: bool
    checked: str
    problems: tuple[str, ...]
    word: str


@checked
def verify_file(
    path: StrPath,
    *,
    key: bytes | None = None,
    max_size: int | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Verify a state file: all digests of a checkpoint, the structure of any state.

    Args:
        path: The file.
        key: The key that it must be authenticated with. Only checkpoints can be.
        max_size: See :func:`inspect_file`.
        progress: See :func:`inspect_file`.

    Raises:
        UnsupportedError: It is a checkpoint, and xxhash or zstandard is not installed.
    """
    name = str(os.fspath(path))
    try:
        file = inspect_file(path, key=key, max_size=max_size, progress=progress)
    except OSError as error:
        return _verdict(name, None, "nothing", [error.strerror or str(error)])
    except StateError as error:
        if isinstance(error, NotImplementedError):
            raise
        return _verdict(name, None, "nothing", [problem_text(error)])
    problems = list(_problems(file))
    if key is not None and file.kind != "checkpoint":
        problems.append(f"it is not authenticated: a {file.kind} cannot be")
    if not problems and file.doubt and file.digests is None:
        return Verdict(name, file.kind, False, _checked(file), (file.doubt,), "unsure")
    return _verdict(name, file.kind, _checked(file), problems)


def _verdict(name: str, kind: str | None, checked: str, problems: Sequence[str]) -> Verdict:
    word = "sound"
    if problems:
        word = "locked" if problems == [KEY_NEEDED] else "damaged"
    return Verdict(name, kind, not problems, checked, tuple(problems), word)


def _problems(file: StateFile) -> list[str]:
    if file.digests is None or not file.digests.damaged:
        return [] if file.problem is None else [problem_text(file.problem)]
    return [
        f"{part.name} is not what was written, {size(part.stored)} at byte {part.offset:,}"
        for part in file.digests.damaged
    ]


def _checked(file: StateFile) -> str:
    if file.digests is None:
        return "the structure explains every byte; native states have no checksums"
    keyed = "digests of the key" if file.digests.keyed else "digests"
    return (
        f"{count(len(file.digests.parts), keyed, keyed)} agree, the structure explains every byte"
    )


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain data."""
    return asdict(verdict)


def text(verdict: Verdict) -> str:
    """Return a verdict as text for a terminal of 80 columns."""
    if verdict.sound:
        return "\n".join(paragraph(f"{verdict.path}: sound {verdict.kind}; {verdict.checked}"))
    what = f"{verdict.word.upper()} {verdict.kind}: " if verdict.kind else ""
    paragraphs = (paragraph(f"{verdict.path}: {what}{problem}") for problem in verdict.problems)
    return "\n".join(chain.from_iterable(paragraphs))
