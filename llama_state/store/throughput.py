"""How fast a place is: by size of object, with objects of its own that are removed again."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from .._io import Progress
from ..errors import StateError
from .objects import Name
from .places.backend import Backend
from .prompt import KEY_SIZE

SIZES: Final = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
_ASKED: Final = 50


@dataclass(frozen=True, slots=True)
class Throughput:
    """How fast objects of one size are written and read, one after the other.

    Attributes:
        nbytes: Bytes of an object.
        n_objects: How many there were.
        written: Bytes a second.
        read: Bytes a second.
    """

    nbytes: int
    n_objects: int
    written: float
    read: float


@dataclass(frozen=True, slots=True)
class Measured:
    """How fast a place is.

    Attributes:
        location: The place.
        latency: Seconds that it takes to say whether an object is there; median of 50.
        sizes: Each size of object.
    """

    location: str
    latency: float
    sizes: tuple[Throughput, ...]


def measure(
    backend: Backend, total: int, progress: Progress, sizes: Sequence[int] = SIZES
) -> Measured:
    """Write, read and remove objects of random bytes.

    Args:
        backend: The place.
        total: Bytes of each size.
        progress: Called with the bytes that were written and read, and all of them.
        sizes: Bytes of an object.

    Raises:
        OSError: The place cannot be written or read.
        StateError: It does not take the objects, or gives back others.
    """
    parent = os.urandom(KEY_SIZE)
    names: list[Name] = []
    found: list[Throughput] = []
    waited = [_seconds(lambda: backend.has(_name(parent))) for _ in range(_ASKED)]
    all_bytes = 2 * sum(max(total // size, 1) * size for size in sizes)
    try:
        for size in sizes:
            mine = [_name(parent) for _ in range(max(total // size, 1))]
            names += mine
            data = os.urandom(size)
            done = sum(2 * each.n_objects * each.nbytes for each in found)
            put = _seconds(lambda m=mine, d=data: _write(backend, m, d))  # type: ignore[misc]
            progress(done + len(mine) * size, all_bytes)
            got = _seconds(lambda m=mine, d=data: _read(backend, m, d))  # type: ignore[misc]
            progress(done + 2 * len(mine) * size, all_bytes)
            nbytes = len(mine) * size
            found.append(Throughput(size, len(mine), nbytes / put, nbytes / got))
    finally:
        for name in names:
            with suppress(OSError):
                backend.remove(name)
    return Measured(backend.location, statistics.median(waited), tuple(found))


def _name(parent: bytes) -> Name:
    return Name(parent, os.urandom(KEY_SIZE), 1, "R")


def _write(backend: Backend, names: Sequence[Name], data: bytes) -> None:
    for name in names:
        if not backend.put(name, [data]):
            raise StateError(f"{backend.location} does not take an object of {len(data)} bytes")


def _read(backend: Backend, names: Sequence[Name], data: bytes) -> None:
    for name in names:
        with backend.open(name, len(data)) as view:
            if bytes(view) != data:  # a file is only mapped until it is looked at
                raise StateError(f"{backend.location} gave back other bytes than were written")


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return max(time.perf_counter() - began, 1e-9)
