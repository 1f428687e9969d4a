"""State files as they are loaded: their own pages where nobody can change them, else a copy."""

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

# Smaller files are sooner read than mapped.
_WORTH_MAPPING: Final = 1 << 20


@contextmanager
def opened(path: StrPath, *, progress: Progress | None = None) -> Iterator[memoryview]:
    """Yield the bytes of a regular file, for the length of the block.

    All of it is in memory then. The bytes are the file's own pages under a lease: who wants to
    write to the file or cut it off meanwhile, waits. Where there are no leases (another owner's
    file, one that somebody has open for writing, another system) they are a copy; and the pages
    without a lease where there is no memory for a copy.

    Args:
        path: The file.
        progress: Called before, and after each 16 MiB.

    Yields:
        A view; what is read-only of it is a private mapping.

    Raises:
        OSError: It cannot be opened or read.
        TruncatedError: It became shorter meanwhile.
    """
    report = progress or no_progress
    with open_regular(path) as (file, size), ExitStack() as stack:
        view = None
        if size >= _WORTH_MAPPING and (lease := stack.enter_context(_lease(file))):
            view = _mapped(file, report)
            # One that somebody waits for is lost some time later.
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
    """The pages of *file*, after all of them were read from the disk.

    Were they read when they are looked at, a broken disk would kill the process.
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
    """Have the pages of *view*, which begin at *start* of *file*, in memory."""
    if not populate(view, write=False) and sys.platform == "linux":
        # Before Linux 5.14. To the null device nothing is copied: the pages are only found.
        with Path(os.devnull).open("wb") as null:
            end = start + len(view)
            while start < end and (
                got := os.sendfile(null.fileno(), file.fileno(), start, end - start)
            ):
                start += got


class _Lease:
    """A promise of the system that no_progress writes to a file: whoever wants to waits for us.

    After 45 seconds, or what ``/proc/sys/fs/lease-break-time`` says, it does not wait longer.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def held(self) -> bool:
        """Nobody waits for its end."""
        return fcntl.fcntl(self._fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK


@contextmanager
def _lease(file: FileIO) -> Iterator[_Lease | None]:
    """Yield a lease on *file*, or None where none is given."""
    fd = file.fileno()
    try:
        # We are told by a signal that somebody waits: one that is ignored, not SIGIO, which kills.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except (AttributeError, OSError):
        yield None
        return
    try:
        yield _Lease(fd)
    finally:
        # The mapping refers to the file too: closing it is not enough.
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
