"""The pytest plugin: the conformance check as tests of a project that is not this one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.libllama import MODELS

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.libllama

ROOT = Path(__file__).parents[2]
OWN = "def test_own(): pass"
BROKEN = """
import pytest
from tests.mutants import install, stale_cell

install(pytest.MonkeyPatch(), stale_cell)
"""
UNUSED = """
import sys

def test_nothing_is_imported():
    names = [name for name in sys.modules if name.split(".")[0] == "llama_state"]
    assert names == ["llama_state", "llama_state.pytest_plugin"]
"""
Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest as another project does, which has one test of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(OWN)

    def call(*arguments: object) -> pytest.RunResult:
        options = ("-p", "llama_state.pytest_plugin", "-p", "no:cacheprovider", "-W", "error")
        return pytester.runpytest_subprocess(*options, *map(str, arguments))

    return call


def of_model(*arguments: object) -> tuple[object, ...]:
    return ("--llama-state-model", MODELS["llama-dense"].path, *arguments)


def test_rows_are_tests(run: Run, pytester: pytest.Pytester) -> None:
    """They stand beside the project's own, -k chooses, the XML has their figures."""
    chosen = "own or (unified and plain and save_state and not empty)"
    result = run(*of_model("-k", chosen, "--junitxml", "out.xml"))
    # Three ways in each of two types of cache, of which llama.cpp refuses one.
    result.assert_outcomes(passed=3 + 1, skipped=3, deselected=216 - 7)
    result.stdout.fnmatch_lines(["collected 216 items / *"])
    cases = [*ElementTree.parse(pytester.path / "out.xml").iter("testcase")]  # noqa: S314 - pytest wrote it
    names = [case.get("name") for case in cases]
    assert "3 unified, plain, f16: save_state/load_state" in names
    (case,) = (case for case in cases if case.get("name") == names[1])
    figures = {one.get("name"): float(one.get("value", "nan")) for one in case.iter("property")}
    assert figures.pop("bytes") > 1000
    assert figures == {"nmse": 0.0}


def test_a_wrong_restore_fails(run: Run, pytester: pytest.Pytester) -> None:
    """One cell of another token is seen, and said."""
    pytester.makeconftest(BROKEN)
    result = run(*of_model("-k", "split and flash and f16 and seq_snapshot"))
    result.assert_outcomes(passed=1, failed=1, deselected=214)  # the empty one has no cell
    result.stdout.fnmatch_lines(["differs: bytes: other ones when saved again *"])


def test_one_row_of_many_runs_alone(run: Run) -> None:
    """Each process of xdist runs the rows that it was given."""
    chosen = ("-k", "split and flash and f16 and checkpoint")
    run(*of_model(*chosen, "-n", 2, "--dist", "loadgroup")).assert_outcomes(passed=2)
    run(*of_model(*chosen, "-n", 2)).assert_outcomes(passed=2)


def test_what_cannot_be_loaded_is_said(run: Run, pytester: pytest.Pytester) -> None:
    """No such file before anything runs; no model and no library by each row."""
    result = run("--llama-state-model", "none.gguf")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--llama-state-model: there is no file none.gguf"])
    pytester.maketxtfile(text="no model")
    one = ("-k", "split and plain and f16 and savepoint")
    result = run("--llama-state-model", "text.txt", *one)
    result.assert_outcomes(errors=1, deselected=215)
    result.stdout.fnmatch_lines(["text.txt: *not a GGUF file*"])
    result = run(*of_model("--llama-state-library", "none.so", *one))
    result.assert_outcomes(errors=1, deselected=215)
    result.stdout.fnmatch_lines(["*none.so: no such file"])


def test_it_costs_nothing_unasked(run: Run, pytester: pytest.Pytester) -> None:
    """Without the option no module of llama_state is imported."""
    pytester.makepyfile(UNUSED)
    run().assert_outcomes(passed=1)
