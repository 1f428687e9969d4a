"""What is in a file, added bit by bit as it can be read."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.container import Part
from ..errors import FormatError, StateError, UnsupportedError
from ..layout import (
    Cells,
    Kind,
    Layout,
    SlotTokens,
    Traits,
    leading_cells,
    parse_slot_tokens,
    parse_state,
)

FileKind = Literal[
    "session file", "sequence file", "slot file", "whole blob", "sequence blob", "checkpoint"
]
"""The kinds of file that can hold a state."""


@dataclass(frozen=True, slots=True)
class Digests:
    """What vouches for the bytes of a checkpoint.

    Attributes:
        keyed: The digests are those of a key.
        compressed: Parts may be compressed.
        parts: What has a digest, in the order of the file.
        damaged: Those that are not what was written.
    """

    keyed: bool
    compressed: bool
    parts: tuple[Part, ...]
    damaged: tuple[Part, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StateFile:
    """What a file holds.

    Attributes:
        path: The file.
        nbytes: Its length.
        kind: "session file" and "sequence file" are llama.cpp's; a "slot file" is a sequence
            file with the packed prompt of llama-server; "whole blob" and "sequence blob" are
            what llama.cpp's buffer functions write, dumped to a file; "checkpoint" is that of
            :class:`llama_state.Checkpoint`.
        version: The version in the file; None for blobs, which have none.
        session_versions: Each session version as which the state reads, the likeliest first.
        tokens: The token list (int32); of a slot file, -1 where an image or a sound stands.
        slot: What the packed prompt of a slot file says, also of one that became a checkpoint.
        layout: The state; None where it could not be read: *problem* says why.
        leading_cells: Where *layout* is None, the cells at the start of the state, of each stream
            that can be read; their tensors are cut off or not to be trusted.
        state_offset: Where the state starts in the file; None where it is compressed.
        state: The bytes of the state, to which the offsets of *layout* refer. They are pages of
            the file, and nothing is read before it is looked at, unless it is compressed.
        checkpoint: The checkpoint; None for other kinds, and where it is damaged too much. Not
            to be restored where there is a *problem*.
        digests: What vouches for the bytes; None for other kinds, which have no checksums.
        problem: What is wrong with the file; None for a sound one.
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
    problem: StateError | None = None

    @property
    def has_tokens(self) -> bool:
        """True for files, which have a token list, if an empty one; blobs have none."""
        return self.version is not None


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a state."""

    version: int
    kind: Kind = "sequence"
    headed: bool = True
    partial: bool = False

    def parse(self, state: memoryview, traits: Sequence[Traits]) -> Layout:
        """Read *state* this way."""
        return parse_state(
            self.kind,
            state,
            version=self.version,
            headed=self.headed,
            traits=traits,
            partial=self.partial,
        )

    def salvage(self, state: memoryview, traits: Sequence[Traits]) -> tuple[Cells, ...]:
        """Read the cells at the start of a *state* that cannot be read this way."""
        return leading_cells(
            state, self.kind, version=self.version, headed=self.headed, traits=traits
        )


def with_packed_tokens(found: StateFile, words: array[int], *, at: int) -> StateFile:
    """Add the tokens of a list that llama-server packed and that starts at byte *at*."""
    try:
        slot = parse_slot_tokens(words)
    except FormatError as error:  # what stands in the list are no tokens, whatever else they are
        return with_problem(found, error, moved=at)
    return replace(found, slot=slot, tokens=slot.tokens)


def with_state(
    found: StateFile, readings: Sequence[Reading], traits: Sequence[Traits]
) -> StateFile:
    """Add the layout by the first of *readings* that fits, or the error of the best."""
    layouts: list[Layout] = []
    errors: list[StateError] = []
    for reading in readings:
        if reading.partial and layouts:
            break  # what reads as a full state is taken for one
        try:
            layouts.append(reading.parse(found.state, traits))
        except (FormatError, UnsupportedError) as error:
            # That no kind of memory fits follows from where the best of them failed.
            cause = error.__cause__ if isinstance(error.__cause__, FormatError) else error
            errors.append(_bare(cause))
    if not layouts:
        best = max(errors, key=_reached)
        if found.state_offset is None:
            best = FormatError(f"in the state, when uncompressed: {best}")
        found = replace(found, leading_cells=readings[0].salvage(found.state, traits))
        return with_problem(found, best, moved=found.state_offset or 0)
    versions = tuple(layout.version for layout in layouts)
    return replace(found, layout=layouts[0], session_versions=versions)


def _reached(error: StateError) -> int:
    """How far a reading came, in bytes."""
    return getattr(error, "offset", None) or 0


def raised(problem: StateError) -> StateError:
    """Return a copy of a file's problem, to be raised.

    An error that is raised refers to the frames that it passes, and those to the file: the file
    must not refer to it, or its pages are kept until the next garbage collection.
    """
    made = type(problem).__new__(type(problem))
    made.args = problem.args
    vars(made).update(vars(problem))
    return made


def with_problem(found: StateFile, error: StateError, *, moved: int = 0) -> StateFile:
    """Add *error*, the first one to be found, with its offset counted from the file's start."""
    if found.problem:
        return found
    if isinstance(error, FormatError):
        error = error.moved(moved)
    return replace(found, problem=_bare(error))


def _bare(error: StateError) -> StateError:
    """Return *error* without what led to it: it would keep frames, and they the file's pages."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
