"""The real models, which ``nox -s real`` puts into a folder and names in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_state as ls

VARIABLE = "LLAMA_STATE_REAL_MODELS"
# A plain cache; a sliding window of 512 in most layers.
NAMES = ("smollm2-135m", "gemma3-270m")
TEXT = Path(__file__).with_name("text.md")  # a beginning of the guide that stays as it is


@pytest.fixture(scope="session", params=NAMES)
def real_path(request: pytest.FixtureRequest) -> Path:
    """The file of a real model."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} names no folder with {request.param}.gguf; nox -s real does")
    return Path(folder, f"{request.param}.gguf")


@pytest.fixture(scope="session")
def real(real_path: Path) -> Iterator[ls.Model]:
    """The same, loaded."""
    with ls.Model(real_path) as model:
        yield model


@pytest.fixture(scope="session")
def prose(real: ls.Model) -> list[int]:
    """Tokens of an English text, more than the window of any of the models."""
    return real.tokenize(TEXT.read_text(encoding="utf-8"))[:640]
