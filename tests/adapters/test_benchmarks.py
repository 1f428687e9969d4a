"""``benchmarks/state_io.py`` inside llama-cpp-python: its own functions take part."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.project.benchmarks import check, run_state_io

pytestmark = pytest.mark.llama_cpp

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def test_state_io(tmp_path: Path) -> None:
    output, found = run_state_io(tmp_path)
    check(output, found)
    ways = {one["way"] for one in found["timings"] if one["party"] == "llama-cpp-python"}
    assert ways == {"Llama.save_state()", "Llama.load_state()"}
    compared = [one["label"] for one in found["findings"] if "Llama.load_state()" in one["label"]]
    assert len(compared) == 3
    assert found["facts"]["packages"].startswith("llama_cpp_python")
