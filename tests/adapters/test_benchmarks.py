"""The benchmarks inside llama-cpp-python: its own functions and caches take part."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.project.benchmarks import check, check_store, run_state_io, run_store

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


def test_store(tmp_path: Path) -> None:
    """Each cache of a ``Llama`` takes part in the chats; what a folder has outlives the process."""
    output, found = run_store(tmp_path)
    check_store(output, found)
    ways = {one["way"]: one for one in found["chats"]}
    assert {"Llama, none", "Llama, LlamaRAMCache", "Llama, LlamaDiskCache"} < set(ways)
    restarted = ways["Llama, PromptCache, restarted"]["evaluated"]
    assert restarted < ways["Llama, PromptCache in a folder"]["evaluated"]
