"""Help texts, wrong arguments, and Ctrl-C. No libllama is needed."""

from __future__ import annotations

import argparse
import re

import pytest

from llama_state import cli
from tests.cli.commands import Run

COMMANDS = (
    "inspect",
    "verify",
    "diff",
    "convert",
    "store",
    "check",
    "demo",
    "doctor",
    "completion",
)
OF_STORE = (
    "ls",
    "show",
    "find",
    "warm",
    "verify",
    "evict",
    "rm",
    "copy",
    "stats",
    "doctor",
    "bench",
)


@pytest.mark.parametrize("command", [*COMMANDS, *(f"store {name}" for name in OF_STORE)])
def test_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sentence on each argument, an example that parses, the exit statuses; 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert max(map(len, text.splitlines())) <= 80
    example = text.partition("example:\n")[2].splitlines()[0].split()
    group = command.split()
    assert example[: len(group) + 1] == ["llama-state", *group]
    assert cli._parser().parse_args(example[1:]).command == group[0]
    assert "exit status:\n  0  " in text
    with pytest.raises(SystemExit):
        cli.main([*group[:-1], "--help"])
    assert re.search(rf"\n    {group[-1]}\s", capsys.readouterr().out)


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a parser."""
    found = (each.choices for each in parser._actions if isinstance(each.choices, dict))
    return next(found, {})


def test_every_argument_has_a_help_text() -> None:
    """None is left without one."""
    commands = commands_of(cli._parser())
    of_store = commands_of(commands["store"])
    assert sorted(commands) == sorted(COMMANDS)
    assert sorted(of_store) == sorted(OF_STORE)
    for parser in [*commands.values(), *of_store.values()]:
        assert all(action.help for action in parser._actions if action.metavar != "COMMAND")


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a command without a traceback, with the status that shells use for it."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_state.inspection.inspect_file", interrupt)
    assert run("inspect", "file") == (130, "", "")


@pytest.mark.parametrize("arguments", [["--n-tokens", "0"], ["--n-tokens", "x"], ["--nonsense"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err
