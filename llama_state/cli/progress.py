"""How far a long save or load is, for people at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .._io import Progress

_LINES = 10
"""Lines of text from nothing to all, where there is no bar."""


@contextmanager
def shown(label: str, *, asked: bool | None = None) -> Iterator[Progress | None]:
    """Yield a progress that shows itself on stderr, or None where nothing is to be shown.

    It is a bar where stderr is a terminal and rich is installed, else some lines of text.

    Args:
        label: What is being done.
        asked: False: nothing; True: also where stderr is no terminal.
    """
    terminal = sys.stderr.isatty()
    if asked is False or not (terminal or asked):
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars
    except ImportError:
        terminal = False
    if not terminal:
        yield _lines(label)
        return
    columns = "{task.description}", BarColumn(), DownloadColumn(True), TransferSpeedColumn()
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None)

        def report(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield report


def _lines(label: str) -> Progress:
    written = -1

    def report(done: int, total: int) -> None:
        nonlocal written
        step = _LINES * done // total if total else _LINES
        if step > written:
            written = step
            print(f"{label}: {done >> 20} of {total >> 20} MiB", file=sys.stderr)

    return report
