"""Counts that several threads add to."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final

from .._io.locks import Lock

# One for all: it is held for the length of an addition.
_LOCK: Final = Lock()


def counting() -> AbstractContextManager[object]:
    """Return the lock to hold while a count is changed: ``+=`` reads, adds and writes.

    Between the reading and the writing another thread can add, with a GIL and without one.
    """
    return _LOCK
