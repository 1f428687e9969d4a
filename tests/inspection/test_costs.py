"""What a stranger's bytes can cost: time and memory are bounded by their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_state import Checkpoint, inspect_file
from llama_state.errors import FormatError
from llama_state.inspection.conversion import convert_file
from llama_state.inspection.verification import verify_file
from tests.inspection import costs
from tests.layout.blobs import State

pytestmark = pytest.mark.linux  # which alone limits the memory of a process

SEEDS = range(150)


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """Measure the files of a folder in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.inspection.costs", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (lines[-1:], done.stderr[-2000:])
    return {name["name"]: cost for name, cost in zip(lines[::2], lines[1::2], strict=True)}


@pytest.mark.parametrize("name", costs.BOMBS)
def test_bombs(tmp_path: Path, name: str) -> None:
    """What is small costs little, whatever numbers are in it."""
    (tmp_path / f"{name}.bin").write_bytes(costs.BOMBS[name]())
    (cost,) = measured(tmp_path).values()
    assert max(cost.values()) < 1, cost


def test_damage(tmp_path: Path) -> None:
    """Nor does damage make a file cost more."""
    for seed in SEEDS:
        (tmp_path / f"{seed}.bin").write_bytes(costs.damaged(seed))
    found = measured(tmp_path)
    assert len(found) == len(SEEDS)
    assert {name: cost for name, cost in found.items() if max(cost.values()) >= 1} == {}


def test_decompression_is_bounded(tmp_path: Path) -> None:
    """Zeros shrink to nearly a thousandth: who reads them can say how much may come out."""
    path = tmp_path / "zeros.llst"
    payload = State("kv", seq=0).blob() + 16 * (os.urandom(8 << 10) + bytes(4 << 20))
    bomb = Checkpoint(payload, kind="sequence", session_version=11, source=0)
    assert bomb.save(path, compress=True, durable=False) < 1 << 20
    with pytest.raises(FormatError, match="max_size"):
        Checkpoint.load(path, max_size=1 << 20)
    with pytest.raises(FormatError, match="max_size"):
        convert_file(path, tmp_path / "out", max_size=1 << 20)
    for problem in (
        inspect_file(path, max_size=1 << 20).problem,
        *verify_file(path, max_size=1 << 20).problems,
    ):
        assert "max_size" in str(problem)
    assert inspect_file(path).state.nbytes == len(payload)
