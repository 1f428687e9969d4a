"""Open state files for loading: mapped while a lease protects them, otherwise copied."""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

from . import Progress, StrPath
from .buffers import POOL
from .pages import populate
from .progress import no_progress, pieces
from .reading import open_regular, read_into

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

# Smaller files are faster to read than to map.
_WORTH_MAPPING: Final = 1 << 20


@contextmanager
def opened(path: StrPath, *, progress: Progress | None = None) -> Iterator[memoryview]:
    """Yield the bytes of a regular file, all of them in memory, for the length of the block.

    They are the file's own pages under a lease: a process that wants to write to the file or to
    truncate it must wait. If there can be no lease (the file of another user, one that is open
    for writing, another system than Linux) they are a copy. If there is no memory for a copy, they
    are the pages without a lease.

    Args:
        path: The file.
        progress: Called at the start and after each 16 MiB.

    Yields:
        A view: read-only if it is a private mapping of the file.

    Raises:
        OSError: It cannot be opened or read.
        TruncatedError: The file became shorter during the read.
    """
    report = progress or no_progress
    with open_regular(path) as (file, size), ExitStack() as stack:
        view = None
        if size >= _WORTH_MAPPING and (lease := stack.enter_context(_lease(file))):
            view = _mapped(file, report)
            # A lease that another process waits for will be broken.
            view = view if lease.held else None
        if view is None:
            view = _copied(file, size, stack, report)
        yield view


def _copied(file: FileIO, size: int, stack: ExitStack, report: Progress) -> memoryview:
    try:
        view = stack.enter_context(POOL.lend(size))
    except MemoryError:
        return _mapped(file, report)
    read_into(file, view, report)
    return view


def _mapped(file: FileIO, report: Progress) -> memoryview:
    """Return the pages of *file*, after reading all of them from the disk.

    If a page were read at its first use instead, a disk error would kill the process.
    """
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return memoryview(b"")
    if not hasattr(mmap, "MAP_PRIVATE"):
        memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    else:
        memory = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    view = memoryview(memory)
    report(0, size)
    for start, end in pieces(size):
        _read_ahead(file, view[start:end], start)
        report(end, size)
    return view


def _read_ahead(file: FileIO, view: memoryview, start: int) -> None:
    """Read the pages of *view*, which begin at *start* of *file*, into memory."""
    if not populate(view, write=False) and sys.platform == "linux":
        # Before Linux 5.14. sendfile to the null device reads the pages and copies nothing.
        with Path(os.devnull).open("wb") as null:
            end = start + len(view)
            while start < end and (
                got := os.sendfile(null.fileno(), file.fileno(), start, end - start)
            ):
                start += got


class _Lease:
    """A read lease on a file: a process that wants to write to the file must wait until it ends.

    The wait is limited to 45 seconds (``/proc/sys/fs/lease-break-time``). Then the lease is lost.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def held(self) -> bool:
        """Whether no other process waits for its end."""
        return fcntl.fcntl(self._fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK


@contextmanager
def _lease(file: FileIO) -> Iterator[_Lease | None]:
    """Yield a lease on *file*, None if the system grants none."""
    fd = file.fileno()
    try:
        # The system sends a signal when a process waits. By default SIGIO, which kills; SIGURG is
        # ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except (AttributeError, OSError):
        yield None
        return
    try:
        yield _Lease(fd)
    finally:
        # To close the file is not enough: the mapping refers to it too.
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
