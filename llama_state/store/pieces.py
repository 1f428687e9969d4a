"""What passes between a store and a context: pieces of sequence states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .. import layout
from ..checkpoint.fingerprint import Fingerprint

if TYPE_CHECKING:
    from .._io import Buffer


@dataclass(frozen=True, slots=True)
class Taken:
    """A piece that was taken out of a sequence.

    Attributes:
        group: "R", "W" or "S".
        first: First position that it has rows of; *end* for what has none.
        start: The position of its first token.
        end: The position behind its last one.
        parts: The payload, as buffers that are valid only as long as they are handed over.
    """

    group: layout.Group
    first: int
    start: int
    end: int
    parts: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Given:
    """A piece that is to be put into a sequence.

    Attributes:
        group: "R", "W" or "S".
        data: The payload, with the head of a blob before it.
        session_version: Of the llama.cpp that wrote it.
        start: First position that is wanted of it.
        end: The position behind the last one.
        whole: Whether that is all that it has.
    """

    group: layout.Group
    data: memoryview
    session_version: int
    start: int
    end: int
    whole: bool


class SequenceMemory(Protocol):
    """The sequences of one context, as a store reads and fills them."""

    session_version: int

    def use(self) -> AbstractContextManager[object]:
        """Keep other threads out of the context for the length of a block."""

    def check_sequence(self, seq_id: int) -> int:
        """Return *seq_id*; raise SequenceIdError if it is none of the context."""

    def fingerprint(self) -> Fingerprint:
        """Return what the context computes with."""

    def geometry(self, seq_id: int) -> layout.Geometry:
        """Return how the caches are laid out; *seq_id* can be used where nothing tells."""

    def traits(self) -> layout.Traits:
        """Return how the states of the context lie; :meth:`geometry` was called before."""

    def keeps_window(self) -> bool:
        """Return whether rows outside of a window stay, or there is no window."""

    def n_past(self, seq_id: int) -> int:
        """Return the position at which a sequence goes on."""

    def tokens(self, seq_id: int) -> tuple[int, ...] | None:
        """Return the tokens that a sequence holds; None where they are not known."""

    def appends(self, seq_id: int) -> bool:
        """Return whether pieces go in one by one; where not, all are needed at once."""

    def can_cut(self, seq_id: int, position: int) -> bool:
        """Return whether a sequence can truthfully be cut back, and gone on from there."""

    def cut(self, seq_id: int, position: int) -> None:
        """Remove all from *position* on; 0 empties the sequence."""

    def take(
        self,
        seq_id: int,
        ranges: Sequence[tuple[int, int]],
        write: Callable[[Taken], None],
        *,
        state: bool,
        dense: bool,
    ) -> None:
        """Hand pieces of a sequence to *write*."""

    def put(
        self,
        seq_id: int,
        pieces: Iterable[Given],
        *,
        end: int,
        keep: int,
        tokens: Sequence[int] | None,
        logits: memoryview[float] | None,
    ) -> None:
        """Put pieces into a sequence."""

    def decode(self, seq_id: int, tokens: Sequence[int]) -> None:
        """Append tokens to a sequence."""

    def logits(self, seq_id: int) -> memoryview[float] | None:
        """Return the logits of the last token of a sequence; None where they are not there."""


@runtime_checkable
class Context(Protocol):
    """A :class:`llama_state.Context`, which is in a room behind this one."""

    @property
    def _prefixes(self) -> SequenceMemory: ...
