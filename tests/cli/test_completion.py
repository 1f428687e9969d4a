"""The script of ``completion``, read by the shell that it is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llama_state._install import pip_install
from llama_state.cli.completion import SHELLS
from tests.cli.commands import Run


def completed(script: str, *words: str, folder: Path) -> set[str]:
    """What bash offers at the end of these words."""
    typed = " ".join(f"'{word}'" for word in words)
    ask = f"""
COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}
$(complete -p llama-state | sed 's/.*-F \\([^ ]*\\).*/\\1/') llama-state '{words[-1]}'
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash(run: Run, tmp_path: Path) -> None:
    """Commands, options and files."""
    status, script, err = run("completion", "bash")
    assert (status, err) == (0, "")
    (tmp_path / "chat.state").touch()
    assert completed(script, "llama-state", "ins", folder=tmp_path) == {"inspect"}
    assert "--json" in completed(script, "llama-state", "inspect", "--j", folder=tmp_path)
    assert "chat.state" in completed(script, "llama-state", "verify", "ch", folder=tmp_path)
    of_store = completed(script, "llama-state", "store", "", folder=tmp_path)
    assert {"ls", "show", "evict"} <= of_store


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell(shell: str, run: Run) -> None:
    """There is a script for each; one that is not there is refused."""
    status, script, _ = run("completion", shell)
    assert status == 0
    assert "inspect" in script
    with pytest.raises(SystemExit):
        run("completion", "sh")


def test_without_shtab(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install."""
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run("completion", "bash") == (
        2,
        "",
        f"completions need shtab: {pip_install('completion')}\n",
    )
