"""Failures of every call of the system, one at a time or from one on, and at every line."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import llama_state
from llama_state._io import part
from llama_state._io.platform import files
from llama_state.store.places import folder

PACKAGE = str(Path(llama_state.__file__).parent)
CALLS: tuple[tuple[ModuleType | type, str], ...] = (
    *((os, name) for name in ("fchmod", "fstat", "fsync", "ftruncate", "link", "lstat", "open")),
    *((os, name) for name in ("posix_fallocate", "replace", "rename", "stat", "unlink", "write")),
    (fcntl, "fcntl"),
    (fcntl, "flock"),
    (mmap, "mmap"),
)
FILES: tuple[tuple[ModuleType | type, str], ...] = (
    *CALLS,
    *((os, name) for name in ("listdir", "mkdir", "pread", "pwrite", "scandir", "utime")),
    *((module, "FileIO") for module in (files, folder, part)),
)
"""With these all that a store in a folder does."""


class Injected(BaseException):
    """An interruption: not an Exception, as KeyboardInterrupt is not."""


class Countdown:
    """Raises at the event of number *turn*, or at every one from there on; counts them all.

    Args:
        turn: The number.
        error: Makes what is raised.
        lasting: Whether it goes on.
    """

    def __init__(
        self, turn: int, error: Callable[[], BaseException], *, lasting: bool = False
    ) -> None:
        self.turn = turn
        self.error = error
        self.lasting = lasting
        self.place = ""
        self.count = 0

    @property
    def raised(self) -> bool:
        """Whether it did."""
        return self.count > self.turn

    def tick(self, place: str) -> None:
        self.count += 1
        if self.count == self.turn + 1 or (self.lasting and self.raised):
            self.place = place
            raise self.error()


@contextmanager
def failing_calls(
    turn: int,
    error: Callable[[], BaseException],
    calls: tuple[tuple[ModuleType | type, str], ...] = CALLS,
    *,
    lasting: bool = False,
) -> Iterator[Countdown]:
    """Let the call of the system of number *turn* fail before it does anything.

    Args:
        turn: The number.
        error: Makes the error.
        calls: Which calls count.
        lasting: Whether all calls after it fail too.
    """
    countdown = Countdown(turn, error, lasting=lasting)
    originals = [(owner, name, getattr(owner, name)) for owner, name in calls]

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if sys._getframe(1).f_code.co_filename.startswith((PACKAGE, os.__file__[:-5])):
                countdown.tick(name)
            return original(*arguments, **options)

        return call

    for owner, name, original in originals:
        replaced = _counted_file(countdown) if name == "FileIO" else counted(name, original)
        setattr(owner, name, replaced)
    try:
        yield countdown
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _counted_file(countdown: Countdown) -> type[FileIO]:
    """A FileIO whose opening by name and whose reads count."""

    class Counted(FileIO):
        def __init__(self, file: Any, *arguments: Any, **options: Any) -> None:
            if not isinstance(file, int) and "opener" not in options:
                countdown.tick("FileIO")
            super().__init__(file, *arguments, **options)

        def read(self, *arguments: Any) -> Any:
            countdown.tick("read")
            return super().read(*arguments)

        def readinto(self, *arguments: Any) -> Any:
            countdown.tick("readinto")
            return super().readinto(*arguments)

    return Counted


@contextmanager
def failing_lines(turn: int, within: str = PACKAGE) -> Iterator[Countdown]:
    """Raise :class:`Injected` at the line of number *turn* that runs inside *within*."""
    countdown = Countdown(turn, Injected)

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
