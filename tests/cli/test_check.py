"""``llama-state check``: its output, its files, its errors."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from llama_state.testing import conformance
from tests.cli.commands import Run, llama_state
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama

GOLDEN = Path(__file__).parents[1] / "golden"
ONE = {"1 sequence": {}}
NONE = {"quantized": {"flash_attn": False, "type_v": "q8_0"}}


@pytest.fixture(autouse=True)
def same_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_STATE_LIBRARY", str(LIBRARY.path))


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, dict[str, object]]], None]:
    """Let the command check fewer configurations."""
    check_model = conformance.check_model

    def choose(configurations: dict[str, dict[str, object]]) -> None:
        chosen = functools.partial(check_model, configurations=configurations)
        monkeypatch.setattr(conformance, "check_model", chosen)

    choose(ONE)
    return choose


@pytest.mark.usefixtures("configure")
def test_reports(run: Run, tmp_path: Path) -> None:
    """A table for each model, the same facts as JSON, and a test case for each row."""
    first, second = MODELS["llama-dense"].path, MODELS["mamba2-dense"].path
    xml = tmp_path / "report.xml"
    status, out, err = run("check", first, second, "--junit", xml)
    assert (status, err) == (0, "")
    assert [line for line in out.splitlines() if line in (first, second)] == [first, second]
    status, out, err = run("check", first, second, "--json", "--library", LIBRARY.path)
    reports = json.loads(out)["reports"]
    assert (status, err, json.loads(out)["ok"]) == (0, "", True)
    assert [(one["model"], one["ok"], one["problem"]) for one in reports] == [
        (first, True, None),
        (second, True, None),
    ]
    root = ElementTree.parse(xml).getroot()  # noqa: S314 - our own file
    assert root.tag == "testsuites"
    assert [suite.get("name") for suite in root] == [first, second]
    for suite, report in zip(root, reports, strict=True):
        cases = suite.findall("testcase")
        assert [case.get("name") for case in cases] == [row["function"] for row in report["rows"]]
        assert suite.get("tests") == str(len(cases))
        assert not any(len(case) for case in cases)
        names = {(case.get("classname"), case.get("name")) for case in cases}
        assert len(names) == len(cases)


def test_differences(
    configure: Callable[..., None],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Status 1; each row that differs is a failure whose text says how."""
    monkeypatch.setattr(conformance, "nmse", lambda *_: 0.5)
    xml = tmp_path / "report.xml"
    model = MODELS["llama-dense"].path
    assert run("check", model, "--junit", xml)[0] == 1
    suite = ElementTree.parse(xml).getroot()[0]  # noqa: S314
    failures = suite.findall("testcase/failure")
    assert suite.get("failures") == str(len(failures)) == suite.get("tests")
    assert "logits: error 5.0e-01" in (failures[0].get("message") or "")
    assert "1 sequence: snapshot/restore" in (failures[0].text or "")
    configure(NONE)
    status, out, err = run("check", model, "--junit", xml)
    assert (status, out.splitlines()[-1]) == (2, "1 not available")
    assert err == "nothing was checked: no context could be made\n"
    assert ElementTree.parse(xml).getroot()[0].get("skipped") == "1"  # noqa: S314


@pytest.mark.usefixtures("configure")
def test_tiny_models(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a model, each kind of memory, one line each; a table where something is wrong."""
    from llama_state.testing import models

    monkeypatch.setattr(models, "KINDS", ("llama-dense", "mamba2-dense"))
    status, out, err = run("check")
    assert (status, err) == (0, "")
    assert [line.split()[::2] for line in out.splitlines()] == [
        ["llama-dense", "same"],
        ["mamba2-dense", "same"],
    ]
    monkeypatch.setattr(conformance, "nmse", lambda *_: 0.5)
    status, out, err = run("check")
    assert (status, err) == (1, "")
    assert "logits: error 5.0e-01" in out


@pytest.mark.usefixtures("configure")
def test_a_model_that_llama_cpp_refuses(run: Run, tmp_path: Path) -> None:
    """Status 2, the reason on stderr, and the other models are checked all the same."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    xml = tmp_path / "report.xml"
    status, out, err = run("check", broken, MODELS["llama-dense"].path, "--junit", xml)
    assert status == 2
    assert str(broken) in err
    assert "snapshot/restore" in out
    bad, good = ElementTree.parse(xml).getroot()  # noqa: S314
    assert (bad.get("errors"), good.get("errors")) == ("1", "0")
    assert str(broken) in (bad.findtext("testcase/error") or "")
    status, out, _ = run("check", broken, "--json")
    assert status == 2
    assert str(broken) in json.loads(out)["reports"][0]["problem"]


def test_wrong_use(run: Run, tmp_path: Path) -> None:
    """Each error names the file, what it is, and what to do; nothing is checked before."""
    text = tmp_path / "text"
    text.write_text("just text")
    model = MODELS["llama-dense"].path
    state = GOLDEN / "v11.session"
    for arguments, sentences in (
        ([tmp_path / "none"], ["none: no such file; give the model's .gguf file"]),
        ([tmp_path], ["a folder; give the model's .gguf file"]),
        ([text], ["not a GGUF file; give the model's .gguf file"]),
        ([state], ["a state (session file), not a model", f"llama-state inspect {state}"]),
        ([model, "--library", tmp_path / "none"], ["cannot be used; give", "no such file"]),
        ([model, "--library", text], ["cannot be used; give", "cannot be opened"]),
        ([model, "--junit", tmp_path / "none" / "x.xml"], ["none/x.xml: No such file"]),
    ):
        status, out, err = run("check", *arguments)
        assert (status, out) == (2, "")
        for sentence in sentences:
            assert sentence in err


def test_quick_is_some_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three configurations of the fifteen; how far it is, line by line where no bar can be."""
    assert conformance.QUICK.items() < conformance.CONFIGURATIONS.items()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    status, out, err = run("check", "--quick", MODELS["llama-dense"].path)
    assert (status, out.splitlines()[-1]) == (0, "43 same")
    assert err.splitlines()[-1] == "check llama-dense.gguf: 43 of 43 round trips"
    assert len(err.splitlines()) == 11


def test_the_module_is_the_command() -> None:
    """``python -m llama_state.testing`` takes the same arguments and prints the same."""
    one, other = (llama_state(*words) for words in (["check", "none.gguf"], ["check", "--help"]))
    assert (one.returncode, other.returncode) == (2, 0)
    for words, expected in ((["none.gguf"], one), (["--help"], other)):
        done = llama_state(*words, module="llama_state.testing")
        assert (done.returncode, done.stdout, done.stderr) == (
            expected.returncode,
            expected.stdout,
            expected.stderr,
        )
