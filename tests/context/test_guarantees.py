"""The figures of docs/guarantees.md: what a restore changes in the next logits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.testing import KINDS
from llama_state.testing.conformance import CONFIGURATIONS, check_model, nmse_limit
from tests.kinds import ALL_WINDOWS, FIGURES, HOST_FIGURES

PAGE = Path(__file__).parents[2] / "docs" / "guarantees.md"
ROW = re.compile(r"^\| `([a-z0-9-]+)` \| (\S+) \| (\S+) \|$", re.MULTILINE)
# Other processors sum in another order.
SLACK = 100


def test_the_page_has_the_figures() -> None:
    """Of every kind of model, and the bound that it is held to."""
    found = {kind: tuple(map(float, numbers)) for kind, *numbers in ROW.findall(PAGE.read_text())}
    archs = {kind: kind.rpartition("-")[0] for kind in KINDS}
    assert found == {kind: (FIGURES[arch], nmse_limit(arch)) for kind, arch in archs.items()}


@pytest.mark.libllama
def test_the_figures_are_true(model: ls.Model) -> None:
    """In the configuration in which rounding shows most: cells change their places."""
    name = f"3 unified, {'flash' if model.arch in ALL_WINDOWS else 'plain'}, f16"
    report = check_model(model, configurations={name: CONFIGURATIONS[name]})
    assert report.ok, report
    worst = max(row.nmse for row in report.rows)
    figure = max(FIGURES[model.arch], HOST_FIGURES.get(model.arch, 0))
    assert worst <= min(SLACK * figure, nmse_limit(model.arch))
