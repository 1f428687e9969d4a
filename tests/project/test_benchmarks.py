"""``benchmarks/state_io.py`` on a state of 1 MiB: it runs, and reports what it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.libllama import LIBRARY
from tests.project.benchmarks import check, run_state_io

pytestmark = pytest.mark.libllama


def test_state_io(tmp_path: Path) -> None:
    """The engine of llama_state: all ways but those of llama-cpp-python, and nothing left over."""
    chart = tmp_path / "chart.svg"
    output, found = run_state_io(
        tmp_path, "--engine", "--chart", str(chart), LLAMA_STATE_LIBRARY=str(LIBRARY.path)
    )
    check(output, found)
    parties = {one["party"] for one in found["timings"]}
    assert parties == {"memory", "llama.cpp", "llama_state", "ion7-core"}
    wanted = {one["label"] for one in found["findings"] if one["bound"] is not None}
    assert len(wanted) == 25
    assert chart.read_text().count("<path") > 50
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "chart.svg"}
    again, same = run_state_io(tmp_path, "--from", str(tmp_path / "out.json"))
    assert (again, same) == (output, found)


@pytest.mark.parametrize("part", ["restore", "tiny"])
def test_one_part(tmp_path: Path, part: str) -> None:
    """--only measures no more than that; --markdown prints tables of it."""
    output, found = run_state_io(
        tmp_path,
        *("--engine", "--markdown", "--only", part),
        LLAMA_STATE_LIBRARY=str(LIBRARY.path),
    )
    assert {one["section"] for one in found["timings"]} == {"tiny" if part == "tiny" else "states"}
    ways = {one["way"] for one in found["timings"]}
    assert any("restore" in way for way in ways)
    assert not any("save" in way for way in ways)
    assert "| --- | ---: |" in output
