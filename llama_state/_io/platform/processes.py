"""Processes: forks, and the cores that one may use."""

from __future__ import annotations

import os
from collections.abc import Callable


def in_each_child(act: Callable[[], None]) -> None:
    """Call *act* in every process that is forked from this one, where processes are."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=act)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
