"""A real libllama and the tiny models: importing this module loads both.

The library is the one that ``load_library()`` finds, so ``LLAMA_STATE_LIBRARY`` runs the same
tests on another build. A kind of model that an old build cannot load is left out there, and
said so in the header; the default engine must load all of them (``llama/test_library.py``).

With ``-m 'not libllama'`` nothing is loaded and none needs to be there: the modules of tests that
import this one, which are all marked so, are skipped as a whole.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

import llama_state as ls
import tests
from llama_state.testing.models import KINDS, write_model

if not tests.LIBLLAMA_WANTED:
    pytest.skip(tests.NOT_WANTED, allow_module_level=True)

LIBRARY = ls.load_library()
_FOLDER = tempfile.TemporaryDirectory(prefix="llama_state-models-")


def _load(kind: str) -> ls.Model | None:
    try:
        return ls.Model(write_model(Path(_FOLDER.name) / f"{kind}.gguf", kind), LIBRARY)
    except ls.ModelLoadError:
        return None


MODELS = {kind: model for kind in KINDS if (model := _load(kind)) is not None}


def summary() -> list[str]:
    """Lines about the library and what it cannot load."""
    missing = ", ".join(sorted(set(KINDS) - set(MODELS))) or "none"
    return [
        f"libllama: {LIBRARY.path}",
        f"session version {LIBRARY.session_version}, sequence version {LIBRARY.sequence_version}; "
        f"kinds that it cannot load: {missing}",
    ]


def close() -> None:
    """Free the models and remove their files."""
    for model in MODELS.values():
        model.close()
    _FOLDER.cleanup()
