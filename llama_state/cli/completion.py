"""What a shell needs to complete the command's arguments: ``completion``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from .._install import pip_install
from .parsers import Commands, add_command
from .problems import CommandError
from .status import Status

SHELLS = ("bash", "fish", "tcsh", "zsh")
# As help texts call what is no file and no folder.
_NO_FILES = ("BYTES", "N", "NAME", "SIZE", "TYPE")


def add_commands(commands: Commands, whole: argparse.ArgumentParser) -> None:
    """Add ``completion``, which describes the *whole* command to a shell."""
    parser = add_command(
        commands,
        "completion",
        partial(run_completion, whole),
        summary="print what lets a shell complete arguments",
        details="Print a script with which a shell completes the commands, options and files of"
        " llama-state at the tab key. A shell reads it from the folder of its completions, or with"
        " source.",
        example="llama-state completion bash",
        exits={0: "printed", 2: "wrong use, or the package shtab is missing"},
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def run_completion(whole: argparse.ArgumentParser, options: argparse.Namespace) -> Status:
    """Print the script for a shell."""
    try:
        import shtab
    except ImportError:
        raise CommandError(f"completions need shtab: {pip_install('completion')}") from None
    for action in _arguments(whole):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, shell=options.shell))
    return Status.OK


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of all commands that take a file."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _arguments(command)
        elif action.nargs != 0 and not action.choices and action.metavar not in _NO_FILES:
            yield action
