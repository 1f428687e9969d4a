"""Where the objects of a store lie: what every place can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from ..objects import KINDS, Name
from ..prompt import KEY_SIZE

if TYPE_CHECKING:
    from ..._io import Buffer


@dataclass(frozen=True, slots=True)
class Stored:
    """An object that is there.

    Attributes:
        name: What it is found by.
        nbytes: Bytes that it takes.
        used: When it was last used, in seconds since 1970; of a pin, when it ends. A place that
            does not know gives the time at which the object was written.
    """

    name: Name
    nbytes: int
    used: float


Writing: TypeAlias = Literal["through", "behind", "never"]
Admission: TypeAlias = Literal["always", "second"]


@runtime_checkable
class Backend(Protocol):
    """A place for objects, which all its users read, write and evict at once.

    Objects are immutable: the first one of a name stays. They are named so that what goes on from
    a prefix can be listed: see :class:`Name` and :func:`text_of`. Any method can raise OSError,
    those that read a FormatError where the place itself finds damage, and nothing else but what
    each says. All can be called from several threads at once.

    :mod:`llama_state.testing.stores` has the tests that every back end must pass.

    Attributes:
        location: What to call it, without any password.
        capacity_bytes: The most that it may take.
        readonly: Nothing is written.
        remote: Whether asking takes the time of a network, which can fail at any moment. A store
            gives such a place a deadline, leaves it alone for a while when it fails, and asks for
            what it foresees at once.
    """

    location: str
    capacity_bytes: int
    readonly: bool
    remote: bool

    def expect(self, parents: Sequence[bytes]) -> None:
        """Get ready to be asked for the children of these, and for their first bytes.

        A place that is far away can ask for all at once. What was found may be used for a second.
        """

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

        The view is valid until the end of the block. A place on this machine maps its file; one
        that is far away reads into a buffer of :data:`llama_state._io.buffers.POOL`.

        Raises:
            FileNotFoundError: It is gone.
            TruncatedError: It has not as many bytes.
        """

    def put(self, name: Name, parts: Iterable[Buffer]) -> bool:
        """Write an object; False where there is one, or where it is larger than the place.

        It is found once all of it is there. The buffers are the caller's again afterwards.
        """

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


@dataclass(frozen=True, slots=True)
class Place:
    """A place of a store, and when it is written to.

    Attributes:
        backend: The place.
        write: "through": while the caller waits. "behind": afterwards, by a thread, from a nearer
            place. "never": it is only read.
        admit: "always", or "second": what a store is asked to remember a second time.
    """

    backend: Backend
    write: Writing = "through"
    admit: Admission = "always"


def text_of(name: Name) -> str:
    """Return the name of an object as text: the keys of parent and prefix in hexadecimal digits.

    ``PARENT-KEY-POSITIONS.KIND``: what goes on from a prefix begins with its key.
    """
    return f"{name.parent.hex()}-{name.key.hex()}-{name.n_positions}.{name.kind}"


def name_of(text: str) -> Name | None:
    """Return the name that :func:`text_of` made a text of; None for any other text."""
    stem, _, kind = text.rpartition(".")
    parts = stem.split("-")
    if kind not in KINDS or len(parts) != 3 or not parts[2].isdecimal():
        return None
    try:
        parent, key = map(bytes.fromhex, parts[:2])
    except ValueError:
        return None
    if len(parent) != KEY_SIZE or len(key) != KEY_SIZE:
        return None
    name = Name(parent, key, int(parts[2]), kind)
    return name if text_of(name) == text else None  # other digits name the same
