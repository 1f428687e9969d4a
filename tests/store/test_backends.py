"""Memory and folders pass the tests that every back end must pass."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llama_state.store.objects import Name
from llama_state.store.places.backend import Backend
from llama_state.store.places.folder import FolderBackend
from llama_state.store.places.memory import MemoryBackend
from llama_state.testing.stores import BackendTests
from tests.many_threads import together


class TestMemory(BackendTests):
    """In the memory of this process."""

    @pytest.fixture
    def backend(self) -> Backend:
        return MemoryBackend(1 << 26)


class TestFolder(BackendTests):
    """In a folder."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return FolderBackend(tmp_path / "store", 1 << 26)


SIZE = 1 << 12
NAMES = [Name(bytes([n % 2]) * 32, bytes([n]) * 32, 1, "R") for n in range(24)]


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_many_threads(kind: str, tmp_path: Path) -> None:
    """They write, remove and evict the same objects: what is listed is there, and no more."""
    capacity = SIZE * len(NAMES) // 2
    backend = (
        MemoryBackend(capacity) if kind == "memory" else FolderBackend(tmp_path / "a", capacity)
    )

    def work(n: int) -> None:
        chosen = random.Random(n)
        for _ in range(300):
            name = chosen.choice(NAMES)
            backend.put(name, [bytes(SIZE)])
            backend.children(name.parent)
            backend.touch([name])
            backend.remove(chosen.choice(NAMES))
        backend.evict(capacity)

    together(6, work)
    listed = {stored.name for stored in backend.entries()}
    assert listed == {name for name in NAMES if backend.has(name)}
    assert listed == {
        name for parent in (bytes(32), b"\1" * 32) for name in backend.children(parent)
    }
    assert backend.used_bytes() <= capacity
