"""Verify a state file: the digests of a checkpoint, the structure of any state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, Literal, TypeAlias

from .._io import Progress, StrPath
from .._io.arguments import checked
from ..errors import StateError, VersionError
from .checkpoints import KEY_NEEDED
from .source import inspect_file
from .statefile import StateFile
from .words import count, paragraph, problem_text, size

Outcome: TypeAlias = Literal[
    "sound", "unsure", "damaged", "unknown version", "locked", "unreadable"
]
"""What a file was found to be, in a word.

"unsure": it reads to its end, but not as expected of its model: it is of a llama.cpp that has
another kind of memory for it, or it is cut off.

"unknown version": llama_state does not know the version of a format that the file names, so that
it cannot tell whether the file is sound. "locked": it cannot be checked without its key.
"unreadable": it is not a state file, or cannot be read.
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of :func:`verify_file`.

    Attributes:
        path: The file.
        kind: Its kind; None if it is not a state file, or cannot be read.
        outcome: What was found, in a word.
        checked: What was verified.
        problems: A text for each problem.
        sound: Whether there are no problems.
    """

    path: str
    kind: str | None
    outcome: Outcome
    checked: str
    problems: tuple[str, ...]
    sound: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sound", self.outcome == "sound")


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
        UnsupportedError: It is a compressed checkpoint, and zstandard is not installed.
    """
    name = str(os.fspath(path))
    try:
        file = inspect_file(path, key=key, max_size=max_size, progress=progress)
    except OSError as error:
        return Verdict(name, None, "unreadable", "nothing", (error.strerror or str(error),))
    except StateError as error:
        if isinstance(error, NotImplementedError):
            raise
        return Verdict(name, None, "unreadable", "nothing", (problem_text(error),))
    problems = list(_problems(file))
    if key is not None and file.kind != "checkpoint":
        problems.append(f"it is not authenticated: a {file.kind} cannot be")
    return Verdict(name, file.kind, _outcome(file, problems), _checked(file), tuple(problems))


def _outcome(file: StateFile, problems: list[str]) -> Outcome:
    if not problems:
        return "sound"
    if problems == [KEY_NEEDED]:
        return "locked"
    if problems == [file.doubt]:
        return "unsure"
    return "unknown version" if _is_of_unknown_version(file) else "damaged"


def _is_of_unknown_version(file: StateFile) -> bool:
    damaged = file.digests is not None and file.digests.damaged
    return isinstance(file.problem, VersionError) and not damaged


def _problems(file: StateFile) -> list[str]:
    if file.digests is None or not file.digests.damaged:
        if file.doubt and file.digests is None:
            return [file.doubt]
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


_WORDS: Mapping[Outcome, str] = {
    "damaged": "DAMAGED {}: ",
    "locked": "LOCKED {}: ",
    "unsure": "UNSURE {}: ",
    "unknown version": "UNKNOWN VERSION, which a newer llama_state may know: ",
    "unreadable": "",
}


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain data."""
    return asdict(verdict)


def text(verdict: Verdict) -> str:
    """Return a verdict as text for a terminal of 80 columns."""
    if verdict.sound:
        return "\n".join(paragraph(f"{verdict.path}: sound {verdict.kind}; {verdict.checked}"))
    what = _WORDS[verdict.outcome].format(verdict.kind)
    paragraphs = (paragraph(f"{verdict.path}: {what}{problem}") for problem in verdict.problems)
    return "\n".join(chain.from_iterable(paragraphs))
