"""Ways to run the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]


def llama_state(
    *arguments: str, module: str = "llama_state", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command on the library of the tests, in a process of its own."""
    from tests.libllama import LIBRARY

    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-m", module, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "LLAMA_STATE_LIBRARY": str(LIBRARY.path), **environment},
        timeout=120,
        check=False,
    )
