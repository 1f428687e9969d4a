"""The benchmarks on small states: they run, and report what they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_state.testing import write_model
from tests.libllama import LIBRARY
from tests.project.benchmarks import check, check_store, run, run_state_io, run_store
from tests.servers.redis_server import program

pytestmark = pytest.mark.libllama


def test_store_buckets(tmp_path: Path) -> None:
    """Both ways read the same bytes from the server, and no file stays."""
    out = tmp_path / "out.json"
    output = run(
        "store_buckets.py",
        *("--tokens", "4", "--folder", str(tmp_path), "--json", str(out)),
        LLAMA_STATE_LIBRARY=str(LIBRARY.path),
    )
    timings = json.loads(out.read_text())["timings"]
    assert len(timings) == 3
    assert len({one["nbytes"] for one in timings}) == 1
    assert all(len(one["seconds"]) == 2 and one["way"] in output for one in timings)
    assert "wanted 0.6" in output
    assert [*tmp_path.iterdir()] == [out]


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


def test_real_models(tmp_path: Path) -> None:
    """Of each model and length all ways are measured and judged; here with a tiny one."""
    path, out = write_model(tmp_path / "tiny.gguf", text=True), tmp_path / "out.json"
    arguments = (str(path), "--tokens", "40,80", "--json", str(out))
    output = run("real_models.py", *arguments, LLAMA_STATE_LIBRARY=str(LIBRARY.path))
    found = json.loads(out.read_text())
    assert len(found["timings"]) == 2 * 3
    bounded = [one for one in found["findings"] if one["bound"] is not None]
    assert len(bounded) == len(found["findings"]) == 2 * 2
    assert all(one["configuration"] in output for one in bounded)
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "tiny.gguf"}


def test_store(tmp_path: Path) -> None:
    """Turns, their growth, and chats: all have their figures, and the same ones from the JSON."""
    path = str(write_model(tmp_path / "tiny.gguf", text=True))
    chart = tmp_path / "chart.svg"
    output, found = run_store(
        tmp_path, path, "--chart", str(chart), LLAMA_STATE_LIBRARY=str(LIBRARY.path)
    )
    check_store(output, found)
    ways = {one["way"] for one in found["chats"]}
    assert ways == {"no store", "PrefixStore", "PrefixStore, restarted"}
    assert chart.read_text().count("<path") > 30
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "chart.svg", "tiny.gguf"}
    again, same = run_store(tmp_path, "--from", str(tmp_path / "out.json"))
    assert (again, same) == (output, found)


def test_store_servers(tmp_path: Path) -> None:
    """A server of its own: every way is measured, what is demanded is judged, nothing stays."""
    program("redis")
    out = tmp_path / "out.json"
    arguments = ("--mib", "32", "--folder", str(tmp_path), "--json", str(out))
    output = run("store_servers.py", *arguments, LLAMA_STATE_LIBRARY=str(LIBRARY.path))
    found = json.loads(out.read_text())
    assert len(found["timings"]) == 5
    assert all(one["way"] in output for one in found["timings"])
    assert [one["label"].split()[0] for one in found["findings"] if one["bound"]] == ["recall()"]
    assert {path.name for path in tmp_path.iterdir()} == {"out.json"}
