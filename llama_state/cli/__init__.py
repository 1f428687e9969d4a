"""The command ``llama-state``: arguments in, text out, exit status back. No logic of its own.

Each command imports what it needs when it runs: those for states work without any libllama.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

from .. import __version__
from ..errors import StateError
from . import engines, states

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DESCRIPTION = "Save and restore llama.cpp's inference state; look into what was saved."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="llama-state", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"llama_state {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    states.add_commands(commands)
    engines.add_commands(commands)
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        status = run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (StateError, OSError, ValueError) as error:
        print(sentence(error), file=sys.stderr)
        trouble: int = options.trouble
        return trouble
    return status


def sentence(error: Exception) -> str:
    """Return an error as a person wants to read it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
