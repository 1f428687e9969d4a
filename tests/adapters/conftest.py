"""Models for the tests inside llama-cpp-python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def make(model_folder: Path) -> Iterator[Callable[..., Any]]:
    """Makes a ``Llama`` of a kind; closed after the test."""
    from .llamas import models

    with models(model_folder) as made:
        yield made
