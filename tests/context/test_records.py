"""The logger says what was saved, restored and refused; nothing unless it is asked."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls

pytestmark = pytest.mark.libllama

TOKENS = [1, 2, 3, 4, 5]
Make = Callable[..., ls.Context]
# What a program sees that has not heard of logging.
SILENT = """
import sys
import llama_state as ls
from llama_state.testing import write_probe

ctx = ls.Model(write_probe(sys.argv[1])).context(n_ctx=64)
ctx.decode([1, 0, 1])
blob = ctx.seq_snapshot(0)
ctx.seq_restore(blob)
try:
    ctx.seq_restore(blob[:-1])
except ls.StateError:
    print("refused")
"""


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    """Return the facts that were logged since the last call, and check that the text has them."""
    caplog.set_level(logging.DEBUG, "llama_state.context")

    def take() -> list[dict[str, Any]]:
        records = [one for one in caplog.records if one.name == "llama_state.context"]
        caplog.clear()
        listed = [dict(vars(record)["facts"]) for record in records]
        for record, facts in zip(records, listed, strict=True):
            assert record.levelno == logging.DEBUG
            words = [record.getMessage().split(" ")[0], *(f"{k}={v!r}" for k, v in facts.items())]
            assert words[0] == facts["doing"]
            assert all(word in record.getMessage() for word in words[2:])
            assert 0 <= facts.pop("seconds") < 60
        return listed

    return take


def test_what_was_done(make: Make, tmp_path: Path, said: Callable[[], Any]) -> None:
    """Every way out of a context and into it has one record, with the size."""
    ctx, path = make(), tmp_path / "state"
    ctx.decode(TOKENS)
    whole, blob = ctx.snapshot(), ctx.seq_snapshot(0)
    assert said() == [
        {"doing": "snapshot", "target": None, "nbytes": len(whole)},
        {"doing": "snapshot", "target": 0, "nbytes": len(blob)},
    ]
    ctx.restore(whole)
    ctx.seq_restore(blob, 0)
    arrived = {"tokens": 0, "n_past": {0: 5}}
    assert said() == [
        {"doing": "restore", "target": None, "nbytes": len(whole), **arrived},
        {"doing": "restore", "target": 0, "nbytes": len(blob), **arrived},
    ]
    size = ctx.seq_save_state(path, 0, TOKENS)
    ctx.seq_load_state(path)
    ctx.seq_save_state(path, 0, TOKENS, memory_limit=0)
    file = {"target": 0, "path": str(path), "nbytes": size, "tokens": 5}
    assert said() == [
        {"doing": "save", **file},
        {"doing": "load", **file, "n_past": {0: 5}},
        {"doing": "save", **file},
    ]


def test_why_it_was_not_done(make: Make, tmp_path: Path, said: Callable[[], Any]) -> None:
    """A refused state has the error's class and text, and so has a file that cannot be opened."""
    ctx = make()
    ctx.decode(TOKENS)
    blob = ctx.seq_snapshot(0)
    said()
    with pytest.raises(ls.TruncatedError) as caught:
        ctx.seq_restore(blob[:-1])
    with pytest.raises(OSError, match="none"):
        ctx.load_state(tmp_path / "none")
    refused, failed = said()
    assert refused["refused"] == f"TruncatedError: {caught.value}"
    assert (refused["doing"], refused["nbytes"]) == ("restore", len(blob) - 1)
    assert failed["failed"].startswith("FileNotFoundError: ")
    assert "refused" not in failed


def test_nothing_is_said_unasked(tmp_path: Path) -> None:
    """Neither of what was done nor of what was refused."""
    command = [sys.executable, "-c", SILENT, str(tmp_path / "model.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")
