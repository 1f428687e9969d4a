"""Reads and maps of regular files that trust no length but the file's own."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from ..errors import TruncatedError
from . import Progress, StrPath
from .buffers import anonymous
from .progress import PIECE, no_progress


def read_file(path: StrPath) -> memoryview:
    """The bytes of a regular file, in memory of their own that later changes do not reach.

    Raises:
        OSError: It cannot be opened or read.
        TruncatedError: It became shorter while it was read.
    """
    with open_regular(path) as (file, size):
        if size == 0:
            return memoryview(b"")
        view = memoryview(anonymous(size))
        read_into(file, view, no_progress)
        return view


def read_into(file: FileIO, view: memoryview, report: Progress) -> None:
    """Fill *view* with the beginning of *file*."""
    report(0, len(view))
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + PIECE])
        if not got:
            raise TruncatedError("the file shrank while it was read", need=len(view), have=done)
        done += got
        report(done, len(view))


def map_file(path: StrPath, *, writable: bool = False) -> memoryview:
    """The bytes of a regular file as its own pages: nothing is read before it is looked at.

    Args:
        path: The file.
        writable: What is written to the view stays there: the file never changes.

    A file that is made shorter while it is mapped kills whoever looks behind its new end, so
    only files that are replaced, never rewritten, may be mapped for long.

    Raises:
        OSError: It cannot be opened or mapped.
    """
    with open_regular(path) as (file, size):
        if size == 0:
            return memoryview(b"")
        access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
        return memoryview(mmap.mmap(file.fileno(), size, access=access))


def watch(path: StrPath) -> Callable[[], bool]:
    """Whether the file that is at *path* now has, later, not been written to.

    One that was put in its place since is another file.
    """
    first = Path(path).stat()

    def unchanged() -> bool:
        try:
            now = Path(path).stat()
        except OSError:  # removed: what is mapped lives on
            return True
        same = os.path.samestat(first, now)
        stamps = [(info.st_size, info.st_mtime_ns) for info in (first, now)]
        return not same or stamps[0] == stamps[1]

    return unchanged


@contextmanager
def open_regular(path: StrPath) -> Iterator[tuple[FileIO, int]]:
    """A regular file and its size."""
    # A FIFO must not be waited for: it is opened at once and refused.
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    with FileIO(fd) as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        yield file, info.st_size
