"""The scripts of examples/ for llama-cpp-python run, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.llama_cpp

EXAMPLES = Path(__file__).parents[2] / "examples"
Make = Callable[..., Any]


def run(name: str, *arguments: object) -> list[str]:
    """The lines that an example prints."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_all_of_them_are_tested() -> None:
    """Those with llama-cpp-python here, the others in ``context``."""
    names = {path.stem for path in EXAMPLES.glob("*.py") if "import llama_cpp" in path.read_text()}
    assert names == {"park_and_resume", "branch_a_prompt", "survive_a_restart", "keep_prompts"}


def test_park_and_resume(make: Make) -> None:
    lines = run("park_and_resume", make.path("llama-dense"))
    assert len(lines) == 4
    assert lines[1].startswith("parked")


def test_branch_a_prompt(make: Make) -> None:
    """On a hybrid model, where a Llama alone would evaluate the prompt for each question."""
    lines = run("branch_a_prompt", make.path("jamba-dense"))
    assert lines[0].startswith("evaluated")
    assert len(lines) == 4


def test_survive_a_restart(make: Make, tmp_path: Path) -> None:
    """The second process loads what the first has saved, and answers the same."""
    arguments = ("survive_a_restart", make.path("llama-dense"), tmp_path / "prompt.state")
    first, second = run(*arguments), run(*arguments)
    assert first[0].startswith("saved")
    assert second[0].startswith("loaded")
    assert first[1] == second[1]


def test_keep_prompts(make: Make, tmp_path: Path) -> None:
    """The second process finds the chat of the first, and goes on with it."""
    arguments = ("keep_prompts", make.path("gemma3-dense"), tmp_path)
    first, second = run(*arguments), run(*arguments)
    assert first[0] == "0 tokens were there"
    assert int(second[0].split()[0]) > 30
    assert first[1:] == second[1:]
