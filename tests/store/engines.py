"""A server in this process, which can be slow, hang or fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from llama_state.store.objects import Name
from llama_state.store.places.backend import Stored
from llama_state.store.places.remote import Advice, check_size, gone


class LocalEngine:
    """An engine whose objects are in a dictionary.

    Attributes:
        latency: Seconds that each request takes.
        bytes_per_second: How fast objects come.
        error: Raised by each request, if it is set.
        hangs: Requests wait until this is cleared.
        n_requests: How many there were.
    """

    best_bytes = 1 << 20
    readonly = False

    def __init__(self, location: str = "local:") -> None:
        self.location = location
        self.objects: dict[Name, bytes] = {}
        self.used: dict[Name, float] = {}
        self.latency = 0.0
        self.bytes_per_second = float("inf")
        self.error: OSError | None = None
        self.n_requests = 0
        self._goes_on = threading.Event()
        self._goes_on.set()

    def hang(self) -> None:
        """Answer nothing from now on."""
        self._goes_on.clear()

    def go_on(self) -> None:
        """Answer what waits, too."""
        self._goes_on.set()

    def _request(self, nbytes: int = 0) -> None:
        self.n_requests += 1
        time.sleep(self.latency + nbytes / self.bytes_per_second)
        self._goes_on.wait()
        if self.error is not None:
            raise self.error

    def listed(self, parents: Sequence[bytes]) -> list[Mapping[Name, int]]:
        """See Engine."""
        self._request()
        objects = dict(self.objects)
        return [{n: len(d) for n, d in objects.items() if n.parent == p} for p in parents]

    def heads(self, names: Sequence[Name], nbytes: int) -> list[bytes | None]:
        """See Engine."""
        self._request()
        found = [self.objects.get(name) for name in names]
        return [None if data is None else data[:nbytes] for data in found]

    def size(self, name: Name) -> int | None:
        """See Engine."""
        self._request()
        data = self.objects.get(name)
        return None if data is None else len(data)

    def read(self, name: Name, buffer: memoryview) -> None:
        """See Engine."""
        self._request(len(buffer))
        data = self.objects.get(name)
        if data is None:
            raise gone(name)
        check_size(buffer, len(data))
        buffer[:] = data

    def write(self, name: Name, parts: Sequence[memoryview]) -> None:
        """See Engine."""
        self._request(sum(map(len, parts)))
        self.used[name] = time.time()
        self.objects.setdefault(name, b"".join(parts))

    def touch(self, names: Sequence[Name], when: float) -> None:
        """See Engine."""
        self._request()
        self.used.update((name, when) for name in names if name in self.objects)

    def delete(self, names: Sequence[Name]) -> None:
        """See Engine."""
        self._request()
        for name in names:
            self.objects.pop(name, None)

    def entries(self) -> Iterator[Stored]:
        """See Engine."""
        self._request()
        for name, data in list(self.objects.items()):
            yield Stored(name, len(data), self.used[name])

    def advise(self) -> list[Advice]:
        """See Engine."""
        return [Advice("ok", "it is in this process")]
