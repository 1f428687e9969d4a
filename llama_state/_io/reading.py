"""Read and map regular files."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from ..errors import TruncatedError
from . import Progress, StrPath
from .buffers import anonymous
from .platform.files import open_for_reading
from .progress import PIECE, no_progress


def read_file(path: StrPath) -> memoryview:
    """Return a copy of the bytes of a regular file.

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
    """Fill *view* from *file*, reporting the progress."""
    report(0, len(view))
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + PIECE])
        if not got:
            raise TruncatedError("the file shrank while it was read", need=len(view), have=done)
        done += got
        report(done, len(view))


def map_file(path: StrPath) -> memoryview:
    """Map a regular file: its pages are read when they are first used.

    If the file is truncated while it is mapped, a read after its new end kills the process. So map
    for long only files that are replaced, never rewritten.

    Raises:
        OSError: It cannot be opened or mapped.
    """
    with open_regular(path) as (file, size):
        return _pages(file, size)


class WatchedFile:
    """A mapped file that is kept open, to tell whether it is still as it was when it was opened.

    The name does not matter: the file can be renamed, removed or replaced by another.

    Args:
        path: The file. It must not be truncated while it is mapped: see :func:`map_file`.
        writable: Let :attr:`view` be written to. That does not change the file.

    Attributes:
        view: Its bytes.

    Raises:
        OSError: It cannot be opened or mapped.
    """

    def __init__(self, path: StrPath, *, writable: bool = False) -> None:
        self._file, info = _regular(path)
        self._first = _stamp(info)
        self.view = _pages(self._file, info.st_size, writable=writable)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def unchanged(self) -> bool:
        """Return whether nobody wrote to the file, by its size and its time."""
        return _stamp(os.fstat(self._file.fileno())) == self._first


def _stamp(info: os.stat_result) -> tuple[int, int]:
    return info.st_size, info.st_mtime_ns


def _pages(file: FileIO, size: int, *, writable: bool = False) -> memoryview:
    if size == 0:
        return memoryview(b"")
    access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
    return memoryview(mmap.mmap(file.fileno(), size, access=access))


@contextmanager
def open_regular(path: StrPath) -> Iterator[tuple[FileIO, int]]:
    """Open a regular file; yield it and its size."""
    file, info = _regular(path)
    with file:
        yield file, info.st_size


def _regular(path: StrPath) -> tuple[FileIO, os.stat_result]:
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", os.fspath(path))
    file = open_for_reading(path)
    try:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    except BaseException:
        file.close()
        raise
    return file, info
