"""The description of a state file, and the functions that add to it what can be read."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Literal

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.container import Part
from ..errors import FormatError, StateError, UnsupportedError
from ..layout import (
    Cells,
    Kind,
    Layout,
    MediaChunk,
    RestorePoint,
    SlotTokens,
    Traits,
    leading_cells,
    parse_state,
)

FileKind = Literal[
    "session file", "sequence file", "slot file", "whole blob", "sequence blob", "checkpoint"
]
"""The kinds of file that can hold a state."""


@dataclass(frozen=True, slots=True)
class Digests:
    """The digests of a checkpoint, and what they show.

    Attributes:
        keyed: Whether the digests are keyed.
        compressed: Whether parts can be compressed.
        parts: The parts that have a digest, in the order of the file.
        damaged: Those that are not what was written.
    """

    keyed: bool
    compressed: bool
    parts: tuple[Part, ...]
    damaged: tuple[Part, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StateFile:
    """The description of a state file.

    Attributes:
        path: The file.
        nbytes: Its length.
        kind: "session file" and "sequence file" are llama.cpp's. A "slot file" is a sequence file
            with a prompt packed by llama-server. "whole blob" and "sequence blob" are the output
            of llama.cpp's buffer functions, dumped to a file. "checkpoint" is a saved
            :class:`llama_state.Checkpoint`.
        version: The version in the file; None for blobs, which have none.
        session_versions: Each session version as which the state can be read, the likeliest first.
        tokens: The token list (int32); in a slot file, -1 for each token of an image or a sound.
        slot: The packed prompt of a slot file, or of a checkpoint that was made from one.
        layout: The layout of the state; None if it could not be read, see *problem*.
        leading_cells: If *layout* is None: the cells at the start of the state, for each stream
            that can be read. Their tensors are cut off or damaged.
        state_offset: Where the state starts in the file; None if it is compressed.
        state: The bytes of the state, to which the offsets of *layout* refer. Unless it is
            compressed, they are pages of the file, read when they are first used.
        checkpoint: The checkpoint; None for other kinds, and if it is too damaged. Do not restore
            it if there is a *problem*.
        digests: The digests of a checkpoint; None for other kinds, which have none.
        restore_points: The partial states of earlier moments in a slot file or a checkpoint, the
            earliest first.
        problem: What is wrong with the file; None if it is sound.
    """

    path: str
    nbytes: int
    kind: FileKind
    version: int | None = None
    session_versions: tuple[int, ...] = ()
    tokens: array[int] = field(default_factory=lambda: array("i"), repr=False)
    slot: SlotTokens | None = field(default=None, repr=False)
    layout: Layout | None = field(default=None, repr=False)
    leading_cells: tuple[Cells, ...] = field(default=(), repr=False)
    state_offset: int | None = 0
    state: memoryview = field(default_factory=lambda: memoryview(b""), repr=False)
    checkpoint: Checkpoint | None = None
    digests: Digests | None = field(default=None, repr=False)
    restore_points: tuple[RestorePoint, ...] = field(default=(), repr=False)
    problem: StateError | None = None

    @property
    def media(self) -> tuple[MediaChunk, ...]:
        """The images and sounds in the packed prompt, in order."""
        return self.slot.media if self.slot else ()

    @property
    def doubt(self) -> str | None:
        """Why its layout may be wrong; None where nothing speaks against it."""
        if self.layout is None or not self.layout.unexpected:
            return None
        return (
            "it does not read as llama_state expects of this model, but as a state of another kind "
            "of memory: it is of a llama.cpp where that is so, or it is cut off"
        )

    @property
    def has_tokens(self) -> bool:
        """Whether it has a token list, which can be empty: blobs have none."""
        return self.version is not None

    def _repr_html_(self) -> str:
        """Return what ``inspect`` says as a table, for notebooks."""
        from .web import fact_table  # which shows what is described here

        return fact_table(self)


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read a state."""

    version: int
    kind: Kind = "sequence"
    headed: bool = True
    partial: bool = False

    def parse(self, state: memoryview, traits: Sequence[Traits]) -> Layout:
        """Parse *state*."""
        return parse_state(
            self.kind,
            state,
            version=self.version,
            headed=self.headed,
            traits=traits,
            partial=self.partial,
            others=True,
        )

    def salvage(self, state: memoryview, traits: Sequence[Traits]) -> tuple[Cells, ...]:
        """Read the cells at the start of a *state* that cannot be parsed."""
        return leading_cells(
            state, self.kind, version=self.version, headed=self.headed, traits=traits
        )


def with_state(file: StateFile, readings: Sequence[Reading], traits: Sequence[Traits]) -> StateFile:
    """Add the layout by the first of *readings* that fits, or the error of the furthest one."""
    layouts: list[Layout] = []
    errors: list[StateError] = []
    for reading in readings:
        if reading.partial and layouts:
            break  # what can be read as a full state is not taken for a partial one
        try:
            layouts.append(reading.parse(file.state, traits))
        except (FormatError, UnsupportedError) as error:
            # The cause says where the best of several kinds of memory failed.
            cause = error.__cause__ if isinstance(error.__cause__, FormatError) else error
            errors.append(_bare(cause))
    if not layouts:
        furthest = max(errors, key=lambda error: getattr(error, "offset", None) or 0)
        if file.state_offset is None:
            furthest = FormatError(f"in the uncompressed state: {furthest}")
        file = replace(file, leading_cells=readings[0].salvage(file.state, traits))
        return with_problem(file, furthest, moved=file.state_offset or 0)
    versions = tuple(layout.version for layout in layouts)
    return replace(file, layout=layouts[0], session_versions=versions)


def sound_layout(file: StateFile) -> Layout:
    """Return the layout of the state in a file.

    Raises:
        StateError: There is a problem with the file.
        FormatError: It holds no state.
    """
    if file.problem is not None:
        raise raised(file.problem)
    if file.layout is None:
        raise FormatError("no state")
    return file.layout


def raised(problem: StateError) -> StateError:
    """Return a copy of a file's problem, to be raised.

    A raised error refers to the frames that it passes, and they to the file. If the file referred
    to the error, its pages would be kept until the next garbage collection.
    """
    return copy(problem)


def with_problem(file: StateFile, error: StateError, *, moved: int = 0) -> StateFile:
    """Add *error*, unless there is a problem already; *moved* is added to its offset."""
    if file.problem:
        return file
    if isinstance(error, FormatError):
        error = error.moved(moved)
    return replace(file, problem=_bare(error))


def _bare(error: StateError) -> StateError:
    """Return *error* without cause and traceback: frames would keep the file's pages alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
