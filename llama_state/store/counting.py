"""Counts that several threads add to."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Final

from .._io.platform.processes import in_each_child

# One for all: it is held for the length of an addition. The collector can come back to it in the
# middle of one, in the same thread.
_lock: Final = [threading.RLock()]


def counting() -> AbstractContextManager[object]:
    """Return the lock to hold while a count is changed: ``+=`` reads, adds and writes.

    Between the reading and the writing another thread can add, with a GIL and without one.
    """
    return _lock[0]


def _renew() -> None:
    """Make it usable in a forked process, where a thread may have held the lock."""
    _lock[0] = threading.RLock()


in_each_child(_renew)
