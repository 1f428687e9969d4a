"""What the README does with a tiny model, done with real ones; its commands on their states."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.cli import main

pytestmark = pytest.mark.real_model

README = Path(__file__).parents[2] / "README.md"
OWN = re.compile(r'write_model\("tiny\.gguf", text=True\)  # or any GGUF file of yours')


def test_its_examples_run(
    real_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Every example, with the line that says so changed to "any GGUF file of yours"."""
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"^```.*$", "", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text, n_changed = OWN.subn(repr(str(real_path)), text)
    assert n_changed == 1
    test = doctest.DocTestParser().get_doctest(text, {}, "README", str(README), 0)
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert found.attempted > 20
    assert found.failed == 0, capsys.readouterr().out


def test_its_commands_run(
    real: ls.Model, real_path: Path, prose: list[int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """inspect, verify, diff and convert, on states of a real model."""
    session, sequence = tmp_path / "session", tmp_path / "sequence"
    with real.context(n_ctx=1024) as context:
        context.decode(prose)
        context.save_state(session, prose)
        context.seq_save_state(sequence, 0, prose)

    def output(*arguments: str | Path) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    assert f"{len(prose)}" in output("inspect", session)
    assert output("verify", session, sequence).count(": sound") == 2
    checkpoint, native = tmp_path / "checkpoint", tmp_path / "native"
    output("convert", sequence, checkpoint)
    output("diff", sequence, checkpoint)
    output("convert", checkpoint, native, "--to", "native")
    assert native.read_bytes() == sequence.read_bytes()
