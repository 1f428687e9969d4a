"""Open state files for loading: mapped while a lease protects them, otherwise copied."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from typing import Final

from . import Progress, StrPath
from .buffers import POOL
from .pages import populate
from .platform import files
from .platform.memory import map_privately
from .progress import no_progress, pieces
from .reading import open_regular, read_into

# Smaller files are faster to read than to map.
_WORTH_MAPPING: Final = 1 << 20
# What is read at once where pages cannot be asked for.
_READ_AHEAD: Final = 1 << 20


class Opened:
    """The bytes of a file, all of them in memory.

    Attributes:
        view: A view of them: read-only if it is a private mapping of the file.
    """

    def __init__(
        self, file: FileIO, size: int, lease: _Lease | None, stack: ExitStack, report: Progress
    ) -> None:
        self._file = file
        self._lease = lease
        self._stack = stack
        self.view = memoryview(b"")
        if lease is None:
            self._copy(size, report)
        else:
            self.view = _mapped(file, report)
            self.secure()

    def secure(self) -> bool:
        """Copy the file if another process waits to write to it, or already has.

        The copy can differ from what :attr:`view` was before: it must be checked again.

        Returns:
            Whether :attr:`view` is another one now.
        """
        if self._lease is None or self._lease.held:
            return False
        self._copy(os.fstat(self._file.fileno()).st_size, no_progress, spill=True)
        self._lease.end()
        self._lease = None
        return True

    def _copy(self, size: int, report: Progress, *, spill: bool = False) -> None:
        try:
            view = self._stack.enter_context(POOL.lend(size, spill=spill))
        except MemoryError:
            self.view = _mapped(self._file, report)
            return
        self._file.seek(0)
        read_into(self._file, view, report)
        self.view = view


@contextmanager
def opened(path: StrPath, *, progress: Progress | None = None) -> Iterator[Opened]:
    """Yield the bytes of a regular file, all of them in memory, for the length of the block.

    They are the file's own pages under a lease: a process that wants to write to the file or to
    truncate it must wait, but not longer than 45 seconds. So call this when nothing else has to be
    waited for, and :meth:`Opened.secure` after work that takes long. If there can be no lease (the
    file of another user, one that is open for writing, another system than Linux) they are a copy.
    If there is no memory for a copy, they are the pages without a lease.

    Args:
        path: The file.
        progress: Called at the start and after each 16 MiB.

    Raises:
        OSError: It cannot be opened or read.
        TruncatedError: The file became shorter during the read.
    """
    with open_regular(path) as (file, size), ExitStack() as stack:
        lease = stack.enter_context(_lease(file)) if size >= _WORTH_MAPPING else None
        yield Opened(file, size, lease, stack, progress or no_progress)


def _mapped(file: FileIO, report: Progress) -> memoryview:
    """Return the pages of *file*, after reading all of them from the disk.

    If a page were read at its first use instead, a disk error would kill the process.
    """
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return memoryview(b"")
    view = memoryview(map_privately(file.fileno(), size))
    report(0, size)
    for start, end in pieces(size):
        _read_ahead(file, view[start:end], start)
        report(end, size)
    return view


def _read_ahead(file: FileIO, view: memoryview, start: int) -> None:
    """Read the pages of *view*, which begin at *start* of *file*, into memory."""
    if populate(view, write=False):
        return
    # Only Linux 5.14 and newer can be asked for pages. To read the file brings them too.
    end = start + len(view)
    while start < end and (
        got := len(files.read_at(file.fileno(), min(_READ_AHEAD, end - start), start))
    ):
        start += got


class _Lease:
    """A read lease on a file: a process that wants to write to the file must wait until it ends.

    The wait is limited to 45 seconds (``/proc/sys/fs/lease-break-time``). Then the lease is lost.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file

    @property
    def held(self) -> bool:
        """Whether no other process waits for its end, or waited for too long."""
        return files.has_lease(self._file.fileno())

    def end(self) -> None:
        """Let writers go on. To close the file is not enough: the mapping refers to it too."""
        # An error says that the lease was lost, or that a collection has closed the file.
        with suppress(OSError, ValueError):
            files.end_lease(self._file.fileno())


@contextmanager
def _lease(file: FileIO) -> Iterator[_Lease | None]:
    """Yield a lease on *file*, None if the system grants none."""
    if not files.take_lease(file.fileno()):
        yield None
        return
    lease = _Lease(file)
    try:
        yield lease
    finally:
        lease.end()
