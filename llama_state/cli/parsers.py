"""The parsers of the commands: one shape of help for all of them."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from .status import Status

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run: TypeAlias = "Callable[[argparse.Namespace], Status]"

_WIDTH = 78


def add_command(
    commands: Commands,
    name: str,
    run: Run,
    *,
    summary: str,
    details: str,
    example: str,
    exits: Mapping[int, str],
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: Where to add it.
        name: Its name.
        run: Runs it on the parsed arguments.
        summary: One line for the list of commands.
        details: What it does, in a few sentences.
        example: One line as a user types it.
        exits: Exit status -> its meaning.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=wrapped(details),
        epilog=f"example:\n  {example}\n\n{exit_statuses(exits)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_key_file(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add the argument that names a file with a key; see :func:`read_key`."""
    parser.add_argument(
        "--key-file", metavar="KEY", help=f"a file whose bytes are the key {purpose}"
    )


def read_key(options: argparse.Namespace) -> bytes | None:
    """Return the key in the file that was named, if one was."""
    if options.key_file is None:
        return None
    return Path(options.key_file).read_bytes()


def wrapped(text: str) -> str:
    """Return *text* in lines that fit 80 columns."""
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False)


def exit_statuses(meanings: Mapping[int, str]) -> str:
    """Return the part of a help text that lists exit statuses."""
    lines = (f"  {int(status)}  {meaning}" for status, meaning in meanings.items())
    return "\n".join(["exit status:", *lines])


def byte_size(text: str) -> int:
    """Parse a size such as 50GiB."""
    from ..store.places.urls import size_of

    try:
        return size_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """Parse a number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number
