"""A real libllama and the eight tiny models.

The library is the one that ``load_library()`` finds, so ``LLAMA_STATE_LIBRARY`` runs the same
tests on another build. A kind of model that an old build can not load is left out there, and
said so in the header; the default engine must load all eight (``test_kinds.py``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.testing.models import KINDS, write_model

LIBRARY = ls.load_library()
_FOLDER = tempfile.TemporaryDirectory(prefix="llama_state-models-")


def _load(kind: str) -> ls.Model | None:
    try:
        return ls.Model(write_model(Path(_FOLDER.name) / f"{kind}.gguf", kind), LIBRARY)
    except ls.ModelLoadError:
        return None


MODELS = {kind: model for kind in KINDS if (model := _load(kind)) is not None}


def pytest_report_header() -> list[str]:
    missing = ", ".join(sorted(set(KINDS) - set(MODELS))) or "none"
    return [
        f"libllama: {LIBRARY.path}",
        f"session version {LIBRARY.session_version}, sequence version {LIBRARY.sequence_version}; "
        f"kinds that it can not load: {missing}",
    ]


def pytest_unconfigure() -> None:
    for model in MODELS.values():
        model.close()
    _FOLDER.cleanup()


@pytest.fixture(scope="session")
def library() -> ls.Library:
    return LIBRARY


@pytest.fixture(scope="session", params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> ls.Model:
    """Each kind of tiny model that the library can load."""
    return MODELS[request.param]


@pytest.fixture(scope="session")
def llama() -> ls.Model:
    """The plain one, for what does not depend on the kind of memory."""
    return MODELS["llama-dense"]


@pytest.fixture
def make(llama: ls.Model) -> Iterator[Callable[..., ls.Context]]:
    """Makes contexts of the plain model and closes them after the test."""
    made: list[ls.Context] = []

    def context(**options: object) -> ls.Context:
        made.append(llama.context(**{"n_ctx": 256, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield context
    for ctx in made:
        ctx.close()
