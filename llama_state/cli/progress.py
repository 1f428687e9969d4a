"""Progress of long reads and writes, for people at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .._io import Progress

_LINES = 10
"""Lines of text from 0 to 100 %, where no bar can be drawn."""


@contextmanager
def shown(
    label: str, *, unit: str | None = None, enabled: bool | None = None
) -> Iterator[Progress | None]:
    """Yield a progress callback that writes to stderr, or None where nothing is to be shown.

    It draws a bar where stderr is a terminal and rich is installed, and else prints lines.

    Args:
        label: The work that is done.
        unit: What is counted; None for bytes.
        enabled: True also shows it where stderr is not a terminal, False never does.
    """
    terminal = sys.stderr.isatty()
    if enabled is False or not (terminal or enabled):
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bars
    except ImportError:
        terminal = False
    if not terminal:
        yield _line_printer(label, unit)
        return
    figures: tuple[ProgressColumn, ...] = (DownloadColumn(True), TransferSpeedColumn())
    if unit is not None:
        figures = (MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    bars = Bars(
        "{task.description}", BarColumn(), *figures, console=Console(stderr=True), transient=True
    )
    task = bars.add_task(label, total=None)

    def report(done: int, total: int) -> None:
        bars.start()  # now: what reports nothing shows nothing
        bars.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        bars.stop()


def _line_printer(label: str, unit: str | None) -> Progress:
    """Return a callback that prints a line at each tenth of the work."""
    printed = -1

    def report(done: int, total: int) -> None:
        nonlocal printed
        step = _LINES * done // total if total else _LINES
        if step > printed:
            printed = step
            amount = f"{done} of {total} {unit}" if unit else f"{done >> 20} of {total >> 20} MiB"
            print(f"{label}: {amount}", file=sys.stderr)

    return report
