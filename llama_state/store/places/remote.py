"""Objects on a server, whatever that is: what all engines have in common."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

from ..._io.buffers import POOL, flat
from ...errors import TruncatedError
from ..objects import PAGE, Name
from .backend import Stored
from .eviction import in_order

if TYPE_CHECKING:
    from ..._io import Buffer

# So long what was listed beforehand is taken as true. A call asks within that time.
_TRUE_SECONDS: Final = 1.0
# So many first bytes are asked for beforehand: the header of a chunk of 900 tokens.
_HEAD: Final = PAGE


@dataclass(frozen=True, slots=True)
class Advice:
    """What there is to say of a server.

    Attributes:
        level: "ok": as it should be. "warning": it works, and can be better. "error": objects
            cannot be written, or not be found.
        text: A sentence; of what is not ok also what to do.
    """

    level: Literal["ok", "warning", "error"]
    text: str


class Engine(Protocol):
    """Speaks with one kind of server. Any method can raise OSError, for whatever goes wrong.

    An error of the server or of the way to it has none of the numbers of
    :data:`~llama_state.store.lookup.DAMAGE`: those have an object removed.

    Attributes:
        location: Where the server is, without any password.
        best_bytes: Objects of about that size are read fastest.
        readonly: Nothing may be written, also not to take away what is left of an object. It is
            set by what uses the engine.
    """

    location: str
    best_bytes: int
    readonly: bool

    def listed(self, parents: Sequence[bytes]) -> list[Mapping[Name, int]]:
        """Return, for each of *parents*, the objects that go on from it, with their bytes."""

    def heads(self, names: Sequence[Name], nbytes: int) -> list[bytes | None]:
        """Return the first bytes of each object, up to *nbytes*; None where it is gone."""

    def size(self, name: Name) -> int | None:
        """Return the bytes of an object; None where it is gone."""

    def read(self, name: Name, buffer: memoryview) -> None:
        """Read all of an object, which is as long as *buffer*.

        Raises:
            FileNotFoundError: It is gone, or a part of it.
            TruncatedError: It has another length.
        """

    def write(self, name: Name, parts: Sequence[memoryview]) -> None:
        """Write an object. It can be found once all of it is there."""

    def touch(self, names: Sequence[Name], when: float) -> None:
        """Note when objects were used, in that order. What is gone is left out."""

    def delete(self, names: Sequence[Name]) -> None:
        """Remove objects, or what is left of them."""

    def entries(self) -> Iterator[Stored]:
        """Yield all objects."""

    def advise(self) -> list[Advice]:
        """Look at the server's settings, and say what of them matters to a store."""


class RemoteBackend:
    """A :class:`~.backend.Backend` on a server.

    Args:
        engine: Speaks with the server.
        capacity_bytes: The most that all objects may take, as far as this process can tell: with
            several that write at once it is more for a moment.
        readonly: Nothing is written, not even when an object was used.
    """

    remote = True

    def __init__(self, engine: Engine, capacity_bytes: int, *, readonly: bool = False) -> None:
        self.engine = engine
        self.location: str = engine.location
        self.capacity_bytes = capacity_bytes
        self.readonly = engine.readonly = readonly
        self._listed: dict[bytes, tuple[float, Mapping[Name, int]]] = {}
        self._heads: dict[Name, tuple[float, bytes]] = {}

    # -- reading

    def expect(self, parents: Sequence[bytes]) -> None:
        """See :class:`Backend`: two requests for all of them."""
        self._listed.clear()
        self._heads.clear()
        found = self.engine.listed(parents)
        now = time.monotonic()
        self._listed.update((p, (now, each)) for p, each in zip(parents, found, strict=True))
        names = [name for each in found for name in each if name.kind != "P"]
        heads = self.engine.heads(names, _HEAD) if names else []
        self._heads.update((n, (now, h)) for n, h in zip(names, heads, strict=True) if h)

    def children(self, parent: bytes) -> Sequence[Name]:
        """See :class:`Backend`."""
        return list(self._children(parent))

    def has(self, name: Name) -> bool:
        """See :class:`Backend`."""
        known = self._known(name.parent)
        return name in known if known is not None else self.engine.size(name) is not None

    def head(self, name: Name, nbytes: int) -> bytes:
        """See :class:`Backend`."""
        at, data = self._heads.get(name, (0.0, b""))
        if len(data) >= nbytes and time.monotonic() < at + _TRUE_SECONDS:
            return data[:nbytes]
        found = self.engine.heads([name], nbytes)[0]
        if found is None:
            self._forget(name)
            raise gone(name)
        return found

    @contextmanager
    def open(self, name: Name, nbytes: int) -> Iterator[memoryview]:
        """See :class:`Backend`."""
        with POOL.lend(nbytes) as buffer:
            try:
                self.engine.read(name, buffer)
            except FileNotFoundError:
                self._forget(name)
                raise
            yield buffer

    def entries(self) -> Iterator[Stored]:
        """See :class:`Backend`."""
        return self.engine.entries()

    def used_bytes(self) -> int:
        """See :class:`Backend`."""
        return sum(stored.nbytes for stored in self.entries())

    # -- writing

    def put(self, name: Name, parts: Iterable[Buffer]) -> bool:
        """See :class:`Backend`."""
        views = [flat(part) for part in parts]
        nbytes = sum(map(len, views))
        if self.readonly or nbytes > self.capacity_bytes or self.has(name):
            return False
        self._listed.pop(name.parent, None)
        self.engine.write(name, views)
        return True

    def touch(self, names: Iterable[Name], when: float | None = None) -> None:
        """See :class:`Backend`: from the leaf to the root.

        So whatever lets go of what was used least recently takes the end of a chain first.
        """
        if not self.readonly:
            self.engine.touch([*names][::-1], time.time() if when is None else when)

    def remove(self, name: Name) -> int:
        """See :class:`Backend`."""
        if self.readonly:
            return 0
        self._forget(name)
        nbytes = self.engine.size(name) or 0
        self.engine.delete([name])
        return nbytes

    def set_aside(self, name: Name) -> None:
        """See :class:`Backend`: a server has no place for what is damaged."""
        self.remove(name)

    def evict(self, to_bytes: int) -> int:
        """See :class:`Backend`."""
        if self.readonly:
            return 0
        entries = list(self.entries())
        used, freed = sum(stored.nbytes for stored in entries), 0
        for stored in in_order(entries):
            if used - freed <= to_bytes:
                break
            freed += self.remove(stored.name)
        return freed

    # -- what was listed beforehand

    def _children(self, parent: bytes) -> Mapping[Name, int]:
        known = self._known(parent)
        return self.engine.listed([parent])[0] if known is None else known

    def _forget(self, name: Name) -> None:
        """Ask again for what was listed, or it could not be written anew for a while."""
        self._listed.pop(name.parent, None)
        self._heads.pop(name, None)

    def _known(self, parent: bytes) -> Mapping[Name, int] | None:
        at, found = self._listed.get(parent, (0.0, None))
        return found if time.monotonic() < at + _TRUE_SECONDS else None


def gone(name: Name) -> FileNotFoundError:
    """Return the error for an object that is not there."""
    return FileNotFoundError(errno.ENOENT, "no such object", name.key.hex())


def check_size(buffer: memoryview, nbytes: int) -> None:
    """Raise TruncatedError where an object has not as many bytes as *buffer*."""
    if nbytes != len(buffer):
        raise TruncatedError("an object", need=len(buffer), have=nbytes)
