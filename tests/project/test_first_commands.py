"""What newcomers type in a shell: each mistake gets an exit status and a sentence that helps.

A row is what is typed, the exit status, and words that are printed.
"""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

import llama_state as ls
from llama_state import cli
from llama_state.testing import write_model

ROOT = Path(ls.__file__).parents[1]

pytestmark = pytest.mark.libllama


class Row(NamedTuple):
    """What is typed, and what comes of it."""

    typed: str
    status: int
    words: tuple[str, ...]
    not_words: tuple[str, ...] = ()


def _typed(row: Row) -> str:
    return row.typed


ROWS = [
    Row(
        "inspect a.seq --model text.txt",
        2,
        ("the model text.txt: this is no file",),
        ("text.txt: text.txt",),
    ),
    Row("inspect a.seq --model none", 2, ("none: No such file",)),
    Row("inspect a.seq b.seq", 0, ("a.seq", "b.seq", "10 cells")),
    Row("inspect a.seq none b.seq", 2, ("a.seq", "none: No such file", "b.seq")),
    Row("inspect a.seq cut", 1, ("a.seq", "cut: cut off in")),
    Row("inspect a.seq b.seq --json", 0, ('"path": "a.seq"', '"path": "b.seq"')),
    Row("inspect a.seq b.seq --plot p.png", 2, ("--plot", "one FILE")),
    Row("inspect a.seq b.seq --html p.html", 2, ("--html", "one FILE")),
    Row("doctor --json", 0, ('"library": {', '"session_version": ')),
    # A PDF too would be one word in the table of formats; nobody has asked for one.
    Row(
        "inspect a.seq --plot c",
        2,
        ("pictures are .png or .svg, not without a suffix",),
        ("sequence",),
    ),
    Row("inspect a.seq --plot c.pdf", 2, ("pictures are .png or .svg, not .pdf",), ("sequence",)),
    Row("inspect a.seq --plot none/c.png", 2, ("none/c.png: No such file",), ("sequence",)),
    Row("inspect a.seq --html c", 2, ("pages are .html or .htm, not without",), ("sequence",)),
    Row("inspect fifo", 2, ("fifo: not a regular file",)),
    Row("inspect -", 0, ("sequence file", "10 cells")),
    Row("inspect - --json", 0, ('"path": "-"',)),
    Row("verify -", 0, ("-: sound",)),
    Row("diff - a.seq", 0, ("equal",)),
    Row("diff a.seq b.seq c.seq", 2, ("usage: llama-state diff", "unrecognized arguments: c.seq")),
    Row("convert - c.llst", 0, ("c.llst: checkpoint",)),
    Row("inspect tiny.gguf", 2, ("tiny.gguf: not a state but a GGUF file (a model)",)),
    Row("inspect picture.png", 2, ("picture.png: not a state (it begins with the bytes 89 50",)),
    Row("inspect folder", 2, ("folder: it is a folder, not a file",)),
    Row("convert a.seq b.seq", 2, ("b.seq: exists; --force replaces it",)),
    *(
        Row(f"{command} --help", 0, ("example:\n  llama-state ", *words))
        for command, words in (
            ("inspect", ("FILE ", "a session, sequence or slot file")),
            ("verify", ("FILE ", "a state file of any kind")),
            ("diff", ("A  ", "the first state file", "B  ", "the second")),
        )
    ),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the rows name; the standard input is a.seq."""
    monkeypatch.chdir(tmp_path)
    with ls.Model(write_model("tiny.gguf")) as model, model.context(n_ctx=256, n_threads=1) as ctx:
        ctx.decode(range(10))
        for name in ("a.seq", "b.seq"):
            ctx.seq_save_state(name, 0, range(10))
    Path("cut").write_bytes(Path("a.seq").read_bytes()[:200])
    Path("text.txt").write_text("some text, and no state\n" * 9)
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    Path("folder").mkdir()
    os.mkfifo("fifo")
    given = io.TextIOWrapper(io.BytesIO(Path("a.seq").read_bytes()))
    monkeypatch.setattr(sys, "stdin", given)
    return tmp_path


@pytest.mark.parametrize("row", ROWS, ids=_typed)
def test_what_is_typed(row: Row, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The status and the sentence that were asked for; no file is left behind by a mistake."""
    before = sorted(Path().iterdir())
    try:
        status = cli.main(shlex.split(row.typed))
    except SystemExit as done:  # of argparse
        status = int(done.code or 0)
    text = "".join(capsys.readouterr())
    assert [word for word in row.words if word not in text] == [], text
    assert [word for word in row.not_words if word in text] == [], text
    assert status == row.status, text
    assert "Traceback" not in text
    if row.status:
        assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(("name", "shows"), [("a.seq", False), ("a.llst", True)])
def test_no_bar_flashes(name: str, shows: bool, folder: Path) -> None:
    """A terminal sees the bar of a checkpoint's digests, and none for what reports no progress."""
    ls.Checkpoint.from_native(folder / "a.seq").save(folder / "a.llst")
    ours, theirs = os.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "llama_state", "inspect", name],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        check=False,
    )
    os.close(theirs)
    with suppress(BlockingIOError, OSError):  # EIO: the other end is closed
        os.set_blocking(ours, False)
        seen = b""
        seen = os.read(ours, 4096)
    os.close(ours)
    assert done.returncode == 0
    assert bool(seen) == shows
