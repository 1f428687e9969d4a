"""The benchmarks, run as their user runs them and looked at; no figure of them is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ROUNDS = 2


def run_state_io(folder: Path, *arguments: str, **environment: str) -> tuple[str, Any]:
    """The output and the JSON of one run with a state of 1 MiB."""
    out = folder / "out.json"
    options = ("--sizes", "1,2", "--folder", str(folder), "--json", str(out), *arguments)
    return run("state_io.py", *options, **environment), json.loads(out.read_text())


def run_store(folder: Path, *arguments: str, **environment: str) -> tuple[str, Any]:
    """The output and the JSON of one run with turns after 4 and 8 tokens, and two chats."""
    out = folder / "out.json"
    options = ("--tokens", "4,8", "--chats", "2", "--shared", "40", "--folder", str(folder))
    output = run("store.py", *arguments, *options, "--json", str(out), **environment)
    return output, json.loads(out.read_text())


def run(name: str, *arguments: str, **environment: str) -> str:
    """The output of one run of a benchmark."""
    command = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / name), *arguments]
    command += ["--rounds", str(ROUNDS)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_store(output: str, found: Any) -> None:
    """Every way has its times at each length; chats that share a prompt evaluate it once."""
    timings = found["timings"]
    places = Counter((one["section"], one["nbytes"], one["configuration"]) for one in timings)
    assert {section for section, *_ in places} == {"turns", "growth"}
    assert len(places) == 2 + 2 * 2
    assert set(places.values()) == {6}
    assert all(len(one["seconds"]) == ROUNDS and one["way"] in output for one in timings)
    judged = [one for one in found["findings"] if one["bound"] is not None]
    assert len([one for one in judged if one["configuration"].startswith("f16")]) == 6
    evaluated = {(one["model"], one["way"]): one["evaluated"] for one in found["chats"]}
    for model in {model for model, _ in evaluated}:
        assert evaluated[model, "no store"] == 2 * (40 + 64)
        assert evaluated[model, "PrefixStore"] == 2 * 64
        assert evaluated[model, "PrefixStore, restarted"] == 2
    for one in found["chats"]:
        assert f"{one['way']} ({one['model']})" in output
        assert len(one["seconds"]) == 2
        assert (one["nbytes"] > 0) == (one["way"] not in ("no store", "Llama, none"))


def check(output: str, found: Any) -> None:
    """Every way has its times, every figure is in the output, and nothing was left out."""
    timings, findings = found["timings"], found["findings"]
    sections = Counter(one["section"] for one in timings)
    assert set(sections) == {*("states", "conversions", "sizes", "large", "tiny", "threads")}
    for one in timings:
        assert len(one["seconds"]) == (10 if one["section"] == "tiny" else 1) * ROUNDS
        assert min(one["seconds"]) > 0
        assert one["way"] in output
    configurations = {one["configuration"] for one in timings if one["section"] == "states"}
    assert len(configurations) == 3
    # Each configuration is measured in the same ways, each way once.
    states = Counter(one["way"] for one in timings if one["section"] == "states")
    assert set(states.values()) == {3}
    for one in findings:
        assert one["low"] <= one["high"]
        assert one["label"] in output
        assert (one["met"] is None) == (one["bound"] is None)
    assert all(value and value in output for value in found["facts"].values())
