"""Files that are whole or absent, and reads that trust no length but the file's own.

A file is written beside its target under one fixed name, locked, preallocated, and put in place
with ``os.replace``. Whatever interrupts that (an exception, a signal, ``kill -9``) leaves the old
file as it was; what a killed writer left behind has the same name and is taken over by the next.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ._buffers import anonymous, flat
from ._replacing import replacing, reserve
from ._types import Progress, StrPath
from .errors import TruncatedError

if TYPE_CHECKING:
    from ._types import Buffer

_PIECE: Final = 16 << 20


def write_file(
    path: StrPath,
    parts: Iterable[Buffer],
    *,
    durable: bool,
    at_most: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write *parts* one after the other to *path*: all of it, or nothing.

    Args:
        path: The file; an existing one is replaced, a link is followed.
        parts: Contiguous buffers.
        durable: Wait until file and folder entry are on the disk (fsync).
        at_most: Bytes that there will not be more of, where *parts* are made while they are
            written; room for as many is taken first.
        progress: Called before, and after each 16 MiB.

    Returns:
        The file's size in bytes.

    Raises:
        SaveError: With the ``errno`` of what failed; what stood at *path* is still there.
    """
    if at_most is None:
        parts = [*parts]
        at_most = sum(len(flat(part)) for part in parts)
    report = progress or nobody
    size = 0
    with replacing(path, durable=durable) as (fd, saving):
        with saving:
            reserve(fd, at_most)
        report(0, at_most)
        for part in parts:
            view = flat(part)
            for start, end in pieces(len(view)):
                with saving:
                    size += _write_all(fd, view[start:end])
                report(size, at_most)
        with saving:
            os.ftruncate(fd, size)
        if size < at_most:
            report(size, size)
    return size


def fill_file(
    path: StrPath,
    size: int,
    fill: Callable[[memoryview], object],
    *,
    prepare: Callable[[memoryview], object],
    durable: bool,
    progress: Progress | None = None,
) -> int:
    """Let *fill* write the *size* bytes of a file into its own pages: all of it, or nothing.

    For what finds no second place in memory: the system can write such pages out meanwhile.
    Slower than :func:`write_file`, whose other arguments, result and errors it has.

    Args:
        size: Bytes that the file will have.
        fill: Writes all of them.
        prepare: Has the pages of a piece in memory, so that *fill* need not wait for each; an
            OSError where that is not possible, since writing to such pages kills the process.

    Raises:
        SaveError: Also where the file system reserves no room for the file.
    """
    report = progress or nobody
    with replacing(path, durable=durable) as (fd, saving):
        with saving:
            if not reserve(fd, size):
                reason = "no memory for a copy, and the file system reserves no room for the file"
                raise OSError(errno.ENOMEM, reason)
            pages = memoryview(mmap.mmap(fd, size))
        report(0, size)
        for start, end in pieces(size):
            with saving:
                prepare(pages[start:end])
            report(end, size)
        fill(pages)
    return size


def read_file(path: StrPath) -> memoryview:
    """The bytes of a regular file, in memory of their own that later changes do not reach.

    Raises:
        OSError: It can not be opened or read.
        TruncatedError: It became shorter while it was read.
    """
    with open_regular(path) as (file, size):
        if size == 0:
            return memoryview(b"")
        view = memoryview(anonymous(size))
        read_into(file, view, nobody)
        return view


def read_into(file: FileIO, view: memoryview, report: Progress) -> None:
    """Fill *view* with the beginning of *file*."""
    report(0, len(view))
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + _PIECE])
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
        OSError: It can not be opened or mapped.
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


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """Start and end of each of the pieces in which files are read and written."""
    for start in range(0, size, _PIECE):
        yield start, min(start + _PIECE, size)


def _write_all(fd: int, view: memoryview) -> int:
    done = 0
    while done < len(view):
        done += os.write(fd, view[done:])
    return done


def nobody(done: int, total: int) -> None:
    """The progress that nobody asked for."""
