"""The commands that try a place of a prefix store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_state.store.places.folder import FolderBackend
from tests.cli.commands import Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with nothing in it."""
    FolderBackend(tmp_path / "kv", 1 << 30)
    return tmp_path / "kv"


def test_doctor(run: Run, folder: Path) -> None:
    """A folder is fit; one that others can look into is warned of."""
    code, out, _ = run("store", "doctor", str(folder))
    assert code == 0
    assert "an object was written, read and removed" in out
    assert "are free on its disk" in out
    folder.chmod(0o755)
    _, out, _ = run("store", "doctor", str(folder), "--json")
    found = json.loads(out)
    assert found["ok"]
    warned = [each["text"] for each in found["advice"] if each["level"] == "warning"]
    assert any("chmod 700" in text for text in warned), found
    assert not list(folder.glob("??/*.*")), "nothing is left behind"


def test_doctor_of_what_is_not_there(run: Run, tmp_path: Path) -> None:
    """No folder, no server: said, with a status."""
    assert run("store", "doctor", str(tmp_path / "none"))[0] == 2
    code, out, _ = run("store", "doctor", "redis://127.0.0.1:1")
    assert code == 1
    assert "error:" in out
    assert "is the server running?" in out


def test_bench(run: Run, folder: Path) -> None:
    """Every size is measured, and nothing stays."""
    code, out, err = run("store", "bench", str(folder), "--bytes", "1MiB", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [each["nbytes"] for each in found["sizes"]][:2] == [64 << 10, 256 << 10]
    assert [each["n_objects"] for each in found["sizes"]] == [16, 4, 1, 1, 1, 1]
    assert all(each["written"] > 0 < each["read"] for each in found["sizes"])
    assert 0 < found["latency"] < 1
    assert not list(folder.glob("??/*.*"))
    assert "MiB/s" in run("store", "bench", str(folder), "--bytes", "1MiB")[1]


def test_bench_of_memory(run: Run) -> None:
    """What is of one process cannot be measured from another."""
    code, _, err = run("store", "bench", "memory:?size=1MiB")
    assert code == 2
    assert "of one process" in err
