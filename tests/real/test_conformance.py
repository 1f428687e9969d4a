"""The conformance check on real models: green, and red where one small thing is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

import llama_state as ls
from llama_state.cli import main
from llama_state.testing.conformance import CONFIGURATIONS, check_model
from tests.mutants import MUTANTS, Mutate, install

pytestmark = pytest.mark.real_model

NAME = "1 sequence, flash, f16"


def test_the_quick_check_is_green(real_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as the README has it: nothing differs, and llama.cpp makes each configuration."""
    assert main(["check", "--quick", str(real_path)]) == 0
    report = capsys.readouterr().out
    assert "differs" not in report
    assert "not available" not in report


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_it_sees_one_small_thing(
    real: ls.Model, mutate: Mutate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong layer, one wrong position, one stale cell: every row with a state in it is red."""
    install(monkeypatch, mutate)
    report = check_model(real, configurations={NAME: CONFIGURATIONS[NAME]})
    assert not report.ok
    for row in report.rows:
        assert (row.outcome == "differs") == ("empty" not in row.function), row
