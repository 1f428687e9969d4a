"""The scripts of examples/ on the prefix store run, each in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_state.testing import write_model
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama

EXAMPLES = Path(__file__).parents[2] / "examples"
HYBRID = "jamba-dense" if "jamba-dense" in MODELS else "mamba2-dense"
EVALUATED = re.compile(r"evaluated (\d+) (?:tokens )?of (\d+)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model that has a tokenizer, and one whose memory cannot be cut."""
    for name, kind in (("plain", "llama-dense"), ("hybrid", HYBRID)):
        write_model(tmp_path / f"{name}.gguf", kind, text=True)
    return tmp_path


def run(name: str, *arguments: object) -> list[str]:
    """The lines that an example prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "LLAMA_STATE_LIBRARY": str(LIBRARY.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def evaluated(lines: list[str]) -> list[tuple[int, int]]:
    """How many tokens of how many were evaluated, for each line that says so."""
    return [(int(m[1]), int(m[2])) for m in map(EVALUATED.match, lines) if m]


def test_all_of_them_are_tested() -> None:
    """Those without llama-cpp-python here, the others in ``adapters``."""
    names = {
        path.stem for path in EXAMPLES.glob("*.py") if "import llama_cpp" not in path.read_text()
    }
    assert names == {
        "branch_an_agent",
        "chat_after_a_restart",
        "keep_a_hybrid_model",
        "share_a_folder",
        "share_a_system_prompt",
    }


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_chat_after_a_restart(folder: Path, kind: str) -> None:
    """A process that starts again evaluates the new message; without the store, all of it."""
    path = folder / f"{kind}.gguf"
    texts = ("Hello", "And then?")
    first, second = (run("chat_after_a_restart", path, folder, text) for text in texts)
    (done, whole), (new, longer) = evaluated([first[0], second[0]])
    assert done == whole
    assert new == longer - whole - 16  # what was asked and answered is there
    shutil.rmtree(folder / "kv")
    ((n_evaluated, n_tokens),) = evaluated(run("chat_after_a_restart", path, folder, "Hello"))
    assert n_evaluated == n_tokens > longer


def test_share_a_system_prompt(folder: Path) -> None:
    """The system prompt is evaluated once, and kept once."""
    lines = run("share_a_system_prompt", folder / "plain.gguf")
    chats = evaluated(lines[1:])
    assert len(chats) == 4
    assert all(new < 30 < whole for new, whole in chats)
    kept, alone = map(int, re.findall(r"\d+", lines[-1]))
    assert kept < alone / 3


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_branch_an_agent(folder: Path, kind: str) -> None:
    """Each step that is tried costs its own tokens."""
    steps = evaluated(run("branch_an_agent", folder / f"{kind}.gguf"))
    assert len(steps) == 9
    assert all(new < 20 < whole for new, whole in steps)


def test_keep_a_hybrid_model(folder: Path) -> None:
    """Where a restore point is, a question costs its own tokens, and a repeated one nothing."""
    lines = run("keep_a_hybrid_model", folder / "hybrid.gguf")
    (all_of_it, whole), (new, _), (again, _) = evaluated(lines)
    assert all_of_it == whole
    assert 0 < new < 20
    assert again == 0
    assert lines[3].startswith("no restore point after token")


def test_share_a_folder(folder: Path) -> None:
    """What the first process has evaluated the others do not; without the key nothing is found."""
    lines = run("share_a_folder", folder / "plain.gguf", folder / "shared")
    first, *others = evaluated(lines)
    assert first[0] == first[1]
    assert len(others) == 3
    assert all(new < 20 < whole for new, whole in others)
    assert lines[-1] == "without the key: nothing is stored"
