"""The conformance check: that it fails where something is wrong, and only there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

import llama_state as ls
from llama_state._llama import calls
from llama_state.testing import conformance, controls
from llama_state.testing.conformance import CONFIGURATIONS, check_model
from llama_state.testing.report import Report
from llama_state.testing.runs import Answers
from tests.libllama import MODELS
from tests.mutants import MUTANTS, Mutate, install, stale_cell, wrong_position

pytestmark = pytest.mark.libllama

NAME = "3 unified, flash, f16"
SHORT = {NAME: CONFIGURATIONS[NAME]}
# Models whose first cache is one of K and V, with two layers or more.
KINDS = [kind for kind in ("llama-dense", "deepseek2-moe", "gemma3-dense") if kind in MODELS]


def check(kind: str, **options: Any) -> Report:
    return check_model(MODELS[kind], configurations=SHORT, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_it_sees_one_small_thing(
    kind: str, mutate: Mutate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong layer, position or cell: red by the logits, too, where they depend on it.

    K is rotated when it is computed: positions in the past only decide what is masked.
    """
    install(monkeypatch, mutate)
    report = check(kind)
    assert not report.ok
    for row in report.rows:
        restored = "empty" not in row.function
        assert (row.outcome == "differs") == restored, row
        assert ("bytes: other ones" in row.detail) == restored, row
        by_logits = restored and mutate is not wrong_position
        assert ("llama.cpp's own restore" in row.detail) == by_logits, row


def test_the_logits_alone_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the bytes are not looked at: the error to llama.cpp's own restore has room for both."""
    monkeypatch.setattr(conformance, "_byte_differences", lambda *_: ())
    install(monkeypatch, stale_cell)
    errors = {row.nmse_llama for row in check("llama-dense").rows if row.outcome == "differs"}
    assert errors
    assert all(error is not None and error > 100 * conformance.OWN_LIMIT for error in errors)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restore_is_llama_cpps_own(kind: str) -> None:
    """Bit by bit: the same cells lie in the same places."""
    report = check(kind)
    assert report.ok
    assert {row.nmse_llama for row in report.rows} == {0.0}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let what follows a run without interruption, or with moved cells, be off by a factor."""

    def scaled(found: Answers, factor: float) -> Answers:
        logits = [memoryview(_scaled(one, factor)) for one in found.logits]
        return Answers(logits, found.tokens)

    run = conformance.run
    originals = {name: getattr(controls, name) for name in ("_after", "_in_pieces")}

    def off(expected: float, moved: float) -> None:
        def wrong_run(*arguments: Any) -> Any:
            found = run(*arguments)
            return replace(found, answers=scaled(found.answers, expected))

        monkeypatch.setattr(conformance, "run", wrong_run)
        for name, original in originals.items():
            wrong = partial(lambda control, *given: scaled(control(*given), moved), original)
            monkeypatch.setattr(controls, name, wrong)

    return off


def _scaled(logits: memoryview[float], factor: float) -> Any:
    from array import array

    return array("f", [factor * value for value in logits])


def test_what_llama_cpp_does_itself_is_no_difference(answers: Callable[..., None]) -> None:
    """An error above the bound, the same after llama.cpp's restore, and with moved cells."""
    answers(1.01, 1.0)
    report = check("llama-dense")
    assert report.ok
    assert {row.outcome for row in report.rows} == {"as llama.cpp itself"}
    assert all(row.ok and row.nmse_moved > row.nmse / 10 for row in report.rows)
    assert "as llama.cpp itself" in str(report).splitlines()[-1]
    assert max(map(len, str(report).splitlines()[3:])) <= 100


def test_what_moved_cells_do_not_explain_is_one(answers: Callable[..., None]) -> None:
    """llama.cpp's own restore may be wrong: that it agrees is not enough."""
    answers(1.01, 1.01)
    report = check("llama-dense")
    assert {row.outcome for row in report.rows} == {"differs"}
    assert all("with moved cells" in row.detail for row in report.rows)


def test_a_refused_control_leaves_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where llama.cpp itself refuses the state, nothing is excused."""
    monkeypatch.setattr(controls.calls, "write", _refusing(calls.write))
    row = next(iter(check("llama-dense").rows))
    assert row.outcome in ("same", "error")


def _refusing(write: Callable[..., int]) -> Callable[..., int]:
    return lambda *_: 0


def test_other_greedy_tokens_are_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the logits agree."""
    answer = conformance.answer

    def wrong(*arguments: Any) -> Answers:
        found = answer(*arguments)
        return Answers(found.logits, [(*tokens[:-1], -1) for tokens in found.tokens])

    monkeypatch.setattr(conformance, "answer", wrong)
    report = check("llama-dense")
    assert {row.outcome for row in report.rows} == {"differs"}
    assert all("other greedy tokens" in row.detail for row in report.rows)


def test_progress_counts_every_row(llama: ls.Model) -> None:
    """A configuration that llama.cpp refuses counts for all of its rows."""
    seen: list[tuple[int, int]] = []
    some = {**SHORT, "refused": {"flash_attn": False, "type_v": "q8_0"}}
    check_model(llama, configurations=some, progress=lambda *done: seen.append(done))
    totals = {total for _, total in seen}
    assert len(totals) == 1
    assert [done for done, _ in seen] == [*range(1, 16), *totals]
