"""A few damaged states and objects on every build; thousands with ``python -m tests.fuzz``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.libllama import LIBRARY

pytestmark = pytest.mark.libllama


@pytest.mark.parametrize(
    ("what", "cases", "expected"), [("states", 400, "refused"), ("objects", 40, "shorter")]
)
def test_damage(what: str, cases: int, expected: str) -> None:
    """Each is refused with nothing changed, or is what llama.cpp then holds; none kills."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--of", what, "--cases", str(cases)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "LLAMA_STATE_LIBRARY": str(LIBRARY.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout
