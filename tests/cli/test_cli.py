"""The command line as a newcomer meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_state import cli
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama


def llama_state(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "llama_state", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "LLAMA_STATE_LIBRARY": str(LIBRARY.path), **environment},
        timeout=120,
        check=False,
    )


def test_demo() -> None:
    """Every way there is, a verdict at the end, nothing on stderr."""
    done = llama_state("demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rstrip().endswith("every round trip is equal")
    for function in (
        "snapshot/restore",
        "load_state",
        "seq_restore",
        "seq_load_state",
        "savepoint",
    ):
        assert function in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_demo_as_json_on_a_given_model() -> None:
    """The rows as data."""
    done = llama_state("demo", "--json", "--model", MODELS["deepseek2-moe"].path)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["ok"] is True
    assert {row["outcome"] for row in report["rows"]} == {"same"}


def test_demo_tells_a_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1 and a plain verdict when something does not come back equal."""
    from llama_state.testing import conformance

    monkeypatch.setattr(conformance, "nmse", lambda *_: 0.5)
    monkeypatch.setenv("LLAMA_STATE_LIBRARY", str(LIBRARY.path))
    assert cli.main(["demo"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


def test_doctor() -> None:
    """Which library, its versions, its capabilities, and the other candidates."""
    done = llama_state("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(LIBRARY.path) in done.stdout
    assert f"version {LIBRARY.session_version}" in done.stdout
    assert "state-flags" in done.stdout
    everything = llama_state("doctor", LLAMA_STATE_LIBRARY="")
    if everything.returncode == 0:
        for place in ("LLAMA_STATE_LIBRARY", "xllamacpp", "llama_cpp", "system library"):
            assert place in everything.stdout


@pytest.mark.parametrize("command", ["demo", "doctor"])
def test_no_library(command: str, tmp_path: Path) -> None:
    """Both commands say what was looked for; neither shows a traceback."""
    done = llama_state(command, LLAMA_STATE_LIBRARY=str(tmp_path / "libllama.so"))
    assert done.returncode == 1
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_none(tmp_path: Path) -> None:
    """A file that is no model is said to be none."""
    path = tmp_path / "model.gguf"
    path.write_text("not a model")
    done = llama_state("demo", "--model", str(path))
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr
