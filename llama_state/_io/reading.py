"""Read and map regular files."""

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


def map_file(path: StrPath, *, writable: bool = False) -> memoryview:
    """Map a regular file: its pages are read when they are first used.

    If the file is truncated while it is mapped, a read after its new end kills the process. So map
    for long only files that are replaced, never rewritten.

    Args:
        path: The file.
        writable: Let the view be written to. That does not change the file.

    Raises:
        OSError: It cannot be opened or mapped.
    """
    with open_regular(path) as (file, size):
        if size == 0:
            return memoryview(b"")
        access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
        return memoryview(mmap.mmap(file.fileno(), size, access=access))


def watch(path: StrPath) -> Callable[[], bool]:
    """Return a function that tells whether the file now at *path* is still unchanged.

    A file that was replaced by another counts as unchanged.
    """
    first = Path(path).stat()

    def unchanged() -> bool:
        try:
            now = Path(path).stat()
        except OSError:  # removed: its mapping is still valid
            return True
        replaced = not os.path.samestat(first, now)
        return replaced or ((first.st_size, first.st_mtime_ns) == (now.st_size, now.st_mtime_ns))

    return unchanged


@contextmanager
def open_regular(path: StrPath) -> Iterator[tuple[FileIO, int]]:
    """Open a regular file; yield it and its size."""
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        file = FileIO(fd)
    except IsADirectoryError:
        os.close(fd)
        reason = "it is a folder, not a file"
        raise IsADirectoryError(errno.EISDIR, reason, os.fspath(path)) from None
    with file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        yield file, info.st_size
