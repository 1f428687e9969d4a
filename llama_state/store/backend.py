"""Where the objects of a store lie: what every place can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .objects import Name

if TYPE_CHECKING:
    from .._io import Buffer


@dataclass(frozen=True, slots=True)
class Stored:
    """An object that is there.

    Attributes:
        name: What it is found by.
        nbytes: Bytes that it takes.
        used: When it was last used, in seconds since 1970; of a pin, when it ends.
    """

    name: Name
    nbytes: int
    used: float


class Backend(Protocol):
    """A place for objects, which all its users read, write and evict at once.

    Objects are immutable: the first one of a name stays. Any method can raise OSError.
    """

    location: str
    capacity_bytes: int
    readonly: bool

    def children(self, parent: bytes) -> Sequence[Name]:
        """Return the names of all objects that go on from *parent*."""

    def has(self, name: Name) -> bool:
        """Return whether an object is there."""

    def head(self, name: Name, nbytes: int) -> bytes:
        """Return the first bytes of an object: *nbytes*, or all that there are.

        Raises:
            FileNotFoundError: It is gone.
        """

    def open(self, name: Name, nbytes: int) -> AbstractContextManager[memoryview]:
        """Yield the *nbytes* bytes of an object, all of them in memory.

        Raises:
            FileNotFoundError: It is gone.
            TruncatedError: It has not as many bytes.
        """

    def put(self, name: Name, parts: Iterable[Buffer]) -> bool:
        """Write an object; False where there is one, or where it is larger than the place."""

    def touch(self, names: Iterable[Name], when: float | None = None) -> None:
        """Note that objects were used: now, or *when*. What is gone is left out."""

    def remove(self, name: Name) -> int:
        """Remove an object, and return the bytes that this frees; 0 where it is gone."""

    def set_aside(self, name: Name) -> None:
        """Take a damaged object out of the way, so that a sound one can take its place."""

    def entries(self) -> Iterator[Stored]:
        """Yield all objects."""

    def evict(self, to_bytes: int) -> int:
        """Let go of what was used least recently until *to_bytes* are left; return the bytes."""

    def used_bytes(self) -> int:
        """Return the bytes that everything takes."""
