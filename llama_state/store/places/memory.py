"""Objects in the memory of this process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..._io.buffers import flat
from ..._io.locks import Lock
from ...errors import TruncatedError
from ..objects import Name
from .backend import Stored
from .eviction import in_order

if TYPE_CHECKING:
    from ..._io import Buffer


class MemoryBackend:
    """Objects in a dictionary, with a capacity. Several stores of a process can share one."""

    readonly = False
    remote = False

    def __init__(self, capacity_bytes: int, location: str = "memory:") -> None:
        self.capacity_bytes = capacity_bytes
        self.location = location
        self._objects: dict[Name, bytes] = {}
        self._used: dict[Name, float] = {}
        self._children: dict[bytes, dict[Name, None]] = {}
        self._lock = Lock()

    def expect(self, parents: Sequence[bytes]) -> None:
        """See :class:`Backend`: it is near."""

    def children(self, parent: bytes) -> Sequence[Name]:
        """See :class:`Backend`."""
        with self._lock:
            return list(self._children.get(parent, ()))

    def has(self, name: Name) -> bool:
        """See :class:`Backend`."""
        return name in self._objects

    def head(self, name: Name, nbytes: int) -> bytes:
        """See :class:`Backend`."""
        return self._get(name)[:nbytes]

    @contextmanager
    def open(self, name: Name, nbytes: int) -> Iterator[memoryview]:
        """See :class:`Backend`."""
        data = self._get(name)
        if len(data) != nbytes:
            raise TruncatedError("an object", need=nbytes, have=len(data))
        yield memoryview(data)

    def put(self, name: Name, parts: Iterable[Buffer]) -> bool:
        """See :class:`Backend`."""
        data = b"".join(map(flat, parts))
        with self._lock:
            if name in self._objects or len(data) > self.capacity_bytes:
                return False
            if self.used_bytes() + len(data) > self.capacity_bytes:
                self._evict(self.capacity_bytes - len(data), name)
            if self.used_bytes() + len(data) > self.capacity_bytes:
                return False  # the rest is pinned
            self._children.setdefault(name.parent, {})[name] = None
            self._used[name] = time.time()
            self._objects[name] = data  # last: until now it is one that is gone
        return True

    def touch(self, names: Iterable[Name], when: float | None = None) -> None:
        """See :class:`Backend`."""
        now = time.time() if when is None else when
        with self._lock:
            self._used.update(dict.fromkeys(self._objects.keys() & names, now))

    def remove(self, name: Name) -> int:
        """See :class:`Backend`."""
        with self._lock:
            data = self._objects.pop(name, None)
            if data is None:
                return 0
            self._used.pop(name, None)
            siblings = self._children.get(name.parent, {})
            siblings.pop(name, None)
            if not siblings:
                self._children.pop(name.parent, None)
            return len(data)

    def set_aside(self, name: Name) -> None:
        """See :class:`Backend`: memory has no place for what is damaged."""
        self.remove(name)

    def entries(self) -> Iterator[Stored]:
        """See :class:`Backend`."""
        with self._lock:
            found = [
                Stored(name, len(data), self._used[name]) for name, data in self._objects.items()
            ]
        yield from found

    def evict(self, to_bytes: int) -> int:
        """See :class:`Backend`."""
        with self._lock:
            return self._evict(to_bytes)

    def used_bytes(self) -> int:
        """See :class:`Backend`."""
        return sum(map(len, list(self._objects.values())))

    def _evict(self, to_bytes: int, needed: Name | None = None) -> int:
        freed, used = 0, self.used_bytes()
        for stored in in_order(self.entries(), needed=needed):
            if used - freed <= to_bytes:
                break
            freed += self.remove(stored.name)
        return freed

    def _get(self, name: Name) -> bytes:
        try:
            return self._objects[name]
        except KeyError:
            raise FileNotFoundError(f"no object {name.key.hex()}") from None
