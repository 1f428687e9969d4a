"""Memory and folders pass the tests that every back end must pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_state.store.places.backend import Backend
from llama_state.store.places.folder import FolderBackend
from llama_state.store.places.memory import MemoryBackend
from llama_state.testing.stores import BackendTests


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
