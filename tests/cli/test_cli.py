"""The command line as a newcomer meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_state import cli
from llama_state._llama.library import CAPABILITIES
from tests.cli.commands import Run, llama_state
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama


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
    """Which library, its versions, its capabilities, and the other places."""
    done = llama_state("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(LIBRARY.path) in done.stdout
    assert f"version {LIBRARY.session_version}" in done.stdout
    assert "state-flags" in done.stdout
    everything = llama_state("doctor", LLAMA_STATE_LIBRARY="")
    if everything.returncode == 0:
        for place in ("LLAMA_STATE_LIBRARY", "xllamacpp", "llama_cpp", "system library"):
            assert place in everything.stdout


def test_doctor_as_json() -> None:
    """The same facts under the keys that docs/guide.md lists."""
    done = llama_state("doctor", "--json")
    facts = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(facts) == {"llama_state", "library", "places"}
    library = facts["library"]
    assert library["path"] == str(LIBRARY.path)
    assert library["source"] == "environment"
    assert library["session_version"] == LIBRARY.session_version
    assert library["sequence_version"] == LIBRARY.sequence_version
    assert library["sequence_head"] is LIBRARY.sequence_head
    assert library["capabilities"] == {name: name in LIBRARY.capabilities for name in CAPABILITIES}
    assert [set(place) for place in facts["places"]] == [{"place", "path", "status", "reason"}]
    assert facts["places"][0]["status"] == "used"
    statuses = [
        place["status"]
        for place in json.loads(llama_state("doctor", "--json", LLAMA_STATE_LIBRARY="").stdout)[
            "places"
        ]
    ]
    assert statuses[0] == "absent"
    assert statuses.count("used") <= 1


def test_doctor_of_one_library(run: Run, tmp_path: Path) -> None:
    """One that is no library: why, as text and as JSON, and exit status 1."""
    text = tmp_path / "libllama.so"
    text.write_text("just text")
    for path, status, reason in (
        (text, "not usable", "cannot be opened"),
        (tmp_path / "none", "absent", "no such file"),
    ):
        found, out, err = run("doctor", "--library", path)
        assert (found, "none that can be used" in out) == (1, True)
        assert reason in out
        assert "cannot be used; give the file of a shared library" in err
        facts = json.loads(run("doctor", "--library", path, "--json")[1])
        assert facts["library"] is None
        (place,) = facts["places"]
        assert place["status"] == status
        assert reason in place["reason"]
    assert run("doctor", "--library", LIBRARY.path)[0] == 0


@pytest.mark.parametrize("command", ["demo", "check", "doctor"])
def test_no_library(command: str, tmp_path: Path) -> None:
    """Each says what was looked for and what to do; none shows a traceback."""
    path = tmp_path / "libllama.so"
    done = llama_state(command, LLAMA_STATE_LIBRARY=str(path))
    assert done.returncode == (1 if command == "doctor" else 2)
    assert f"LLAMA_STATE_LIBRARY={path}" in done.stdout + done.stderr
    assert "no such file" in done.stdout + done.stderr
    assert "unset it to use one that is installed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [b"not a model", b"GGUF, but not a model"])
def test_a_model_that_is_none(content: bytes, tmp_path: Path) -> None:
    """A file that is not a model is said not to be one."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    done = llama_state("demo", "--model", str(path))
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr
