"""Failures, one at a time: of every call of the system and at every line of a save or a load."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import llama_state

PACKAGE = str(Path(llama_state.__file__).parent)
CALLS: tuple[tuple[ModuleType | type, str], ...] = (
    *((os, name) for name in ("fchmod", "fstat", "fsync", "ftruncate", "link", "lstat", "open")),
    *((os, name) for name in ("posix_fallocate", "replace", "rename", "stat", "unlink", "write")),
    (fcntl, "fcntl"),
    (fcntl, "flock"),
    (mmap, "mmap"),
)


class Injected(BaseException):
    """An interruption: not an Exception, as KeyboardInterrupt is not."""


class Countdown:
    """Raises at the event of number *turn*; counts them all."""

    def __init__(self, turn: int, error: BaseException) -> None:
        self.turn = turn
        self.error: BaseException | None = error
        self.place = ""
        self.count = 0

    @property
    def raised(self) -> bool:
        """Whether it did."""
        return self.count > self.turn

    def tick(self, place: str) -> None:
        self.count += 1
        if self.count == self.turn + 1:
            self.place = place
            # Kept, it would keep the frames that it passes.
            error, self.error = self.error, None
            assert error is not None
            raise error


@contextmanager
def failing_calls(turn: int, error: Callable[[], BaseException]) -> Iterator[Countdown]:
    """Let the call of the system of number *turn* fail before it does anything."""
    countdown = Countdown(turn, error())
    originals = [(owner, name, getattr(owner, name)) for owner, name in CALLS]

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if sys._getframe(1).f_code.co_filename.startswith((PACKAGE, os.__file__[:-5])):
                countdown.tick(name)
            return original(*arguments, **options)

        return call

    for owner, name, original in originals:
        setattr(owner, name, counted(name, original))
    try:
        yield countdown
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@contextmanager
def failing_lines(turn: int, within: str = PACKAGE) -> Iterator[Countdown]:
    """Raise :class:`Injected` at the line of number *turn* that runs inside *within*."""
    countdown = Countdown(turn, Injected())

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(within) or _in_destructor(frame):
            return None
        if event == "line":
            countdown.tick(f"{frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_lineno}")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield countdown
    finally:
        sys.settrace(before)


def _in_destructor(frame: FrameType | None) -> bool:
    """Return whether what is raised in a frame would reach nobody."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def descriptors() -> list[str]:
    """Return what this process has open, after a collection."""
    gc.collect()
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(link.readlink()))
        except OSError:  # the one of the list itself
            continue
    return sorted(found)
