"""A few damaged states on every build; thousands with ``python -m tests.fuzz``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.libllama import LIBRARY

pytestmark = pytest.mark.libllama


def test_damaged_states() -> None:
    """Each is refused with nothing changed, or is what llama.cpp then holds; none kills."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--cases", "400"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "LLAMA_STATE_LIBRARY": str(LIBRARY.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused" in done.stdout
