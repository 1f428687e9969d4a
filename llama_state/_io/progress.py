"""The pieces in which long reads and writes are done and reported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

PIECE: Final = 16 << 20
"""Bytes between two reports of progress."""


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each piece of *size* bytes."""
    for start in range(0, size, PIECE):
        yield start, min(start + PIECE, size)


def no_progress(done: int, total: int) -> None:
    """Do nothing: the default progress callback."""
