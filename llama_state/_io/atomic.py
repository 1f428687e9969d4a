"""Write files atomically: the new file completely, or the old one unchanged.

A file is written beside its target (``part.py``), preallocated, and renamed to the target. An
exception, a signal or ``kill -9`` before the rename leaves the old file unchanged.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, TypeAlias

from ..errors import SaveError
from . import Progress, StrPath
from .advice import advice
from .buffers import POOL, flat
from .pages import populate
from .part import PartFile
from .platform import files
from .progress import no_progress, pieces

if TYPE_CHECKING:
    from . import Buffer

Fill: TypeAlias = "Callable[[memoryview], object]"
"""What writes all bytes of a file into the view that it is given."""

# The system frees the pages of a file when its last name and descriptor go: 30 ms for 0.5 GiB.
_SLOW_TO_FREE: Final = 16 << 20


def write_file(
    path: StrPath,
    parts: Iterable[Buffer],
    *,
    durable: bool,
    at_most: int | None = None,
    replace: bool = True,
    progress: Progress | None = None,
) -> int:
    """Write *parts* one after the other to *path*: all of them, or nothing.

    Args:
        path: The file. An existing one is replaced, a link is followed.
        parts: Contiguous buffers.
        durable: Wait until file and folder entry are on the disk (fsync).
        at_most: Upper bound of the size, for *parts* that are produced while they are written.
            This much is reserved first.
        replace: False: an existing file is an error, and a link is not followed.
        progress: Called at the start and after each 16 MiB.

    Returns:
        The file's size in bytes.

    Raises:
        SaveError: It failed, with the ``errno`` of the cause; the old file is unchanged.
        FileExistsError: *path* exists, with ``replace=False``.
    """
    if at_most is None:
        parts = [*parts]
        at_most = sum(len(flat(part)) for part in parts)
    report = progress or no_progress
    size = 0
    with replacing(path, durable=durable, replace=replace) as (fd, save_errors):
        with save_errors:
            reserve(fd, at_most)
        report(0, at_most)
        for part in parts:
            view = flat(part)
            for start, end in pieces(len(view)):
                with save_errors:
                    size += write_all(fd, view[start:end])
                report(size, at_most)
        with save_errors:
            os.ftruncate(fd, size)
        if size < at_most:
            report(size, size)
    return size


def fill_file(
    path: StrPath,
    size: int,
    fill: Fill,
    *,
    durable: bool,
    progress: Progress | None = None,
) -> int:
    """Let *fill* write the *size* bytes of a file into the pages of the file: all, or nothing.

    For data of which memory cannot hold a copy, or only a new one: the system can write these
    pages out meanwhile, and has to make them anyhow. Slower than :func:`write_file` from memory
    that is used again. That function describes the other arguments, the result and the errors.

    Where the file system cannot reserve space, a copy in memory is written after all: a page of a
    file that the disk has no space for would kill the process.

    Args:
        size: Size of the file in bytes.
        fill: Writes all of them into the view that it is given.

    Raises:
        SaveError: Also if the file system cannot reserve space, and memory is short or limited.
    """
    report = progress or no_progress
    with replacing(path, durable=durable) as (fd, save_errors):
        with save_errors:
            reserved = reserve(fd, size)
        step = partial(_filled_in_place, durable=durable) if reserved else _filled_in_memory
        step(fd, size, fill, save_errors, report)
    return size


def _filled_in_place(
    fd: int, size: int, fill: Fill, save_errors: SaveErrors, report: Progress, *, durable: bool
) -> None:
    with save_errors:
        mapping = mmap.mmap(fd, size)
    pages = memoryview(mapping)
    report(0, size)
    for start, end in pieces(size):
        with save_errors:
            populate(pages[start:end], write=True)
        report(end, size)
    fill(pages)
    if durable:
        with save_errors:
            files.sync_pages(mapping)


def _filled_in_memory(
    fd: int, size: int, fill: Fill, save_errors: SaveErrors, report: Progress
) -> None:
    with ExitStack() as stack:
        with save_errors:
            try:
                buffer = stack.enter_context(POOL.lend(size))
            except MemoryError as error:
                reason = (
                    "no memory for a copy, and the file system cannot reserve space for the file"
                )
                raise OSError(errno.ENOMEM, reason) from error
        report(0, size)
        fill(buffer)
        for start, end in pieces(size):
            with save_errors:
                write_all(fd, buffer[start:end])
            report(end, size)


class SaveErrors:
    """Turns an OSError inside its blocks into a SaveError.

    Without *replace*, that something exists is a FileExistsError.

    Code of the caller (progress callbacks, generators of parts) runs outside of them, so that its
    exceptions are not changed.

    Attributes:
        outcome: What the error says about the file.
    """

    def __init__(self, path: StrPath, *, replace: bool = True) -> None:
        self._path = path
        self._replace = replace
        self.outcome = "state not saved, the old file is unchanged"

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, FileExistsError) and not self._replace:
            raise FileExistsError(
                errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(self._path)
            ) from None
        if isinstance(error, OSError):
            reason = f"{self.outcome}: {error.strerror or error}{advice(error.errno, self._path)}"
            raise SaveError(error.errno or errno.EIO, reason, os.fspath(self._path)) from error
        if isinstance(error, ValueError):  # a NUL in the path
            reason = f"{self.outcome}: {error}"
            raise SaveError(errno.EINVAL, reason, os.fspath(self._path)) from error


@contextmanager
def replacing(
    path: StrPath, *, durable: bool, replace: bool = True, mode: int | None = None
) -> Iterator[tuple[int, SaveErrors]]:
    """Yield an empty file that becomes *path* if the block ends without an error.

    Args:
        path: The file. An existing one is replaced and its mode kept, a link is followed.
        durable: Wait until file and folder entry are on the disk (fsync).
        replace: False: nothing that exists is replaced, no link followed.
        mode: The mode of a new file; None for the default mode.

    Yields:
        The file's descriptor, and the context manager for all operations on it.

    Raises:
        SaveError: It failed, with the ``errno`` of the cause; the old file is unchanged.
        FileExistsError: *path* exists, with ``replace=False``.
    """
    save_errors = SaveErrors(path, replace=replace)
    with save_errors:
        target = _target(path, follow=replace)
        old = _replaceable(target, replace=replace)
        part = PartFile(target, mode if old is None else stat.S_IMODE(old.st_mode))
    with part:
        yield part.fd, save_errors
        with save_errors:
            if durable:
                files.sync(part.fd)
            with _freed_later(target, old):
                if replace:
                    part.replace_target()
                else:
                    part.become_target()
        save_errors.outcome = "state saved, but it may not survive a power failure"
        with save_errors:
            part.close()
            if durable:
                _sync_folder(target.parent)


def reserve(fd: int, size: int) -> bool:
    """Reserve space for a file: a full disk fails early, and writing is faster.

    Returns:
        False if the file system cannot reserve space.
    """
    if size == 0:
        return True
    try:
        return files.reserve(fd, size)
    except OSError as error:
        if error.errno != errno.ENOSPC or not _wait_for_frees():
            raise
    return files.reserve(fd, size)


def write_all(fd: int, view: memoryview) -> int:
    """Write all of *view* to a file, and return its bytes."""
    done = 0
    while done < len(view):
        done += os.write(fd, view[done:])
    return done


def _target(path: StrPath, *, follow: bool) -> Path:
    """Return the file that *path* names; with *follow*, where a link at its end leads."""
    if follow:
        return Path(os.path.realpath(path))
    folder, name = os.path.split(os.fspath(path))
    return Path(os.path.realpath(folder), name)


def _replaceable(target: Path, *, replace: bool) -> os.stat_result | None:
    """Return the status of the file at *target*, None if there is none, as without *replace*."""
    if not replace:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        return None
    try:
        info = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return info


def _sync_folder(folder: Path) -> None:
    if not files.FOLDERS_OPEN:
        return
    opened = _Folder(folder)
    try:
        files.sync(opened.fd)
    finally:
        del opened  # which an error, that refers to this frame, would keep


class _Folder:
    """The descriptor of a folder, which is closed with this object, even after an interrupt."""

    def __init__(self, folder: Path) -> None:
        self.fd = os.open(folder, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


# -- a thread frees the pages of a large old file, so that replacing one takes no extra time

_FREES: Final = "llama_state-free"
"""The name of these threads, by which they are found: a list of them would need a lock."""


@contextmanager
def _freed_later(target: Path, old: os.stat_result | None) -> Iterator[None]:
    """Keep a large *target* open while the block removes its name, then close it in a thread."""
    file = None
    large = old is not None and old.st_size >= _SLOW_TO_FREE and old.st_nlink == 1
    if large and not files.OPEN_FILES_STAY:
        with suppress(OSError):  # no permission to read it
            file = FileIO(target)
    try:
        yield
    finally:
        if file is not None:
            _close_in_thread(file)


def _close_in_thread(file: FileIO) -> None:
    try:
        threading.Thread(target=_free, args=(file,), name=_FREES).start()
    except RuntimeError:  # too many threads, or the interpreter shuts down
        _free(file)


def _free(file: FileIO) -> None:
    with suppress(OSError):
        file.close()


def _wait_for_frees() -> bool:
    """Wait until files that were replaced are freed; return False if there were none."""
    waiting = [thread for thread in threading.enumerate() if thread.name == _FREES]
    for thread in waiting:
        if thread.is_alive():  # and not just being started by another thread
            thread.join()
    return bool(waiting)
