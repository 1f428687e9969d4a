"""The standard input as a file: states are mapped, and no pipe can be."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from .problems import CommandError

NAME = "-"


@contextmanager
def as_file(name: str) -> Iterator[str]:
    """Yield the path of a file that has what *name* stands for.

    Args:
        name: A path, or "-" for the standard input, which is copied to a file for the block.
    """
    if name != NAME:
        yield name
        return
    if sys.stdin.isatty():
        raise CommandError(f"{NAME}: the standard input is a terminal: give a file, or a pipe")
    # Where a file that is mapped cannot be removed, it is left to the system.
    with TemporaryDirectory(prefix="llama_state-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, "stdin")
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield str(copy)
