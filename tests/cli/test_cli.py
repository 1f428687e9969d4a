"""The command line as a newcomer meets it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import llama_state as ls
from llama_state import cli
from llama_state._llama.library import CAPABILITIES
from tests.cli.commands import Run, llama_state
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama


def test_demo() -> None:
    """A story that ends well, within 80 columns, and nothing on stderr."""
    done = llama_state("demo")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 80
    assert re.fullmatch(r"A tiny model was made, .*: llama, [\d.]+ MiB\.", lines[0])
    assert re.fullmatch(r"It decoded 300 tokens in [\d.]+ ms\.", lines[1])
    assert re.fullmatch(r"Its state was saved to a file: [\d.]+ KiB in [\d.]+ ms\.", lines[2])
    assert re.search(r"was given that state: [\d.]+ ms\.$", lines[3])
    assert lines[4].endswith("The 260 logits of the next are equal, bit for bit.")
    assert re.search(r"in \d+ ways and 3 kinds of context, \d\d round trips:", lines[5])
    assert lines[6].endswith("equal in all of them.")


def test_demo_of_all() -> None:
    """Every way there is, and a verdict at the end."""
    done = llama_state("demo", "--all")
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


@pytest.mark.parametrize("arguments", [(), ("--keep", "a folder")])
def test_what_a_demo_says_to_type_next(
    arguments: tuple[str, ...],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each command runs as printed, and each file that it names is there."""
    monkeypatch.setenv("LLAMA_STATE_LIBRARY", str(LIBRARY.path))
    monkeypatch.chdir(tmp_path)
    told = run("demo", *arguments)[1].partition("Next:\n")[2].splitlines()
    assert len(told) == 3
    for line in told:
        program, *rest = shlex.split(line, comments=True)
        assert program == "llama-state"
        status, out, err = run(*rest)
        assert (status, err) == (0, ""), line
        assert out or "--html" in rest


def test_demo_keeps_what_it_made(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and a state that belong together; again in the same place, and not among others."""
    monkeypatch.setenv("LLAMA_STATE_LIBRARY", str(LIBRARY.path))
    for _ in range(2):
        assert run("demo", "--keep", tmp_path / "new")[0] == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["demo.gguf", "demo.state"]
    with ls.Model(tmp_path / "new" / "demo.gguf", LIBRARY) as model:
        restored = model.context(n_ctx=512).load_state(tmp_path / "new" / "demo.state")
        assert len(restored.tokens) == restored.sequences[0].n_past == 300
    status, out, err = run("demo", "--keep", tmp_path)
    assert (status, out) == (2, "")
    assert f"{tmp_path}: there are other files in it" in err
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_demo_as_json_on_a_given_model() -> None:
    """The rows as data, and what the story tells."""
    done = llama_state("demo", "--json", "--model", MODELS["deepseek2-moe"].path)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["ok"] is True
    assert {row["outcome"] for row in report["rows"]} == {"same"}
    assert report["story"]["error"] == 0
    assert report["story"]["n_tokens"] == 300


@pytest.mark.parametrize(
    ("arguments", "verdict"), [((), "NOT EQUAL in"), (("--all",), "NOT EQUAL")]
)
def test_demo_tells_a_difference(
    arguments: tuple[str, ...],
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit status 1 and a plain verdict when something does not come back equal."""
    from llama_state.testing import conformance

    monkeypatch.setattr(conformance, "nmse", lambda *_: 0.5)
    monkeypatch.setenv("LLAMA_STATE_LIBRARY", str(LIBRARY.path))
    assert cli.main(["demo", *arguments]) == 1
    assert verdict in capsys.readouterr().out


def test_demo_tells_that_the_next_logits_differ(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that was not loaded is seen in the logits, whatever the other round trips say."""
    monkeypatch.setenv("LLAMA_STATE_LIBRARY", str(LIBRARY.path))
    monkeypatch.setattr("llama_state.cli.demo.CONFIGURATIONS", {"one sequence": {}})
    monkeypatch.setattr(ls.Context, "load_state", lambda *_: None)
    monkeypatch.setattr("llama_state.testing.conformance.functions_of", lambda _: ["savepoint"])
    status, out, _ = run("demo")
    assert status == 1
    assert "logits of the next are NOT EQUAL: their error is" in out
    assert "equal in all of them" in out


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
