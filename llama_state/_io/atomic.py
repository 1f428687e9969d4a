"""Files that are whole or absent.

A file is written beside its target under one fixed name, locked, preallocated, and put in place
with ``os.replace``. Whatever interrupts that (an exception, a signal, ``kill -9``) leaves the old
file as it was; what a killed writer left behind has the same name and is taken over by the next.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from ..errors import SaveError
from . import Progress, StrPath
from .buffers import flat
from .pages import populate
from .progress import no_progress, pieces

if TYPE_CHECKING:
    from . import Buffer

try:
    import fcntl
except ImportError:  # not POSIX: writers of one target are not serialized there
    fcntl = None  # type: ignore[assignment]

_NAME_MAX: Final = 255
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
# The system frees the pages of a file with its last name or descriptor: 30 ms for 0.5 GiB.
_SLOW_TO_FREE: Final = 16 << 20


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
    report = progress or no_progress
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
    durable: bool,
    progress: Progress | None = None,
) -> int:
    """Let *fill* write the *size* bytes of a file into its own pages: all of it, or nothing.

    For what finds no second place in memory: the system can write such pages out meanwhile.
    Slower than :func:`write_file`, whose other arguments, result and errors it has.

    Args:
        size: Bytes that the file will have.
        fill: Writes all of them.

    Raises:
        SaveError: Also where the file system reserves no room for the file.
    """
    report = progress or no_progress
    with replacing(path, durable=durable) as (fd, saving):
        with saving:
            if not reserve(fd, size):
                reason = "no memory for a copy, and the file system reserves no room for the file"
                raise OSError(errno.ENOMEM, reason)
            pages = memoryview(mmap.mmap(fd, size))
        report(0, size)
        for start, end in pieces(size):
            with saving:
                populate(pages[start:end], write=True)
            report(end, size)
        fill(pages)
    return size


class Saving:
    """Makes a SaveError of what the system refuses inside its blocks.

    Whatever is not ours (progress callbacks, parts that are made meanwhile) runs outside them,
    and its exceptions are passed on as they are.

    Attributes:
        outcome: What an error says of the file.
    """

    def __init__(self, path: StrPath) -> None:
        self._path = path
        self.outcome = "state not saved, what was there is untouched"

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            reason = f"{self.outcome}: {error.strerror or error}"
            raise SaveError(error.errno or errno.EIO, reason, os.fspath(self._path)) from error
        if isinstance(error, ValueError):  # a NUL in the path
            reason = f"{self.outcome}: {error}"
            raise SaveError(errno.EINVAL, reason, os.fspath(self._path)) from error


@contextmanager
def replacing(path: StrPath, *, durable: bool) -> Iterator[tuple[int, Saving]]:
    """Yield an empty file that takes the place of *path* when the block ends without an error.

    Args:
        path: The file; an existing one is replaced and its mode kept, a link is followed.
        durable: Wait until file and folder entry are on the disk (fsync).

    Yields:
        The file's descriptor, and what must be around everything that is done to it.

    Raises:
        SaveError: With the ``errno`` of what failed; what stood at *path* is still there.
    """
    saving = Saving(path)
    with saving:
        target = Path(os.path.realpath(path))
        old = _replaceable(target)
    with _sibling(saving, target) as (fd, sibling):
        if old is not None:
            with saving:
                os.fchmod(fd, stat.S_IMODE(old.st_mode))
        yield fd, saving
        with saving:
            if durable:
                os.fsync(fd)
            with _freed_later(target, old):
                sibling.replace(target)
    saving.outcome = "state saved, but not sure to survive a power cut"
    if durable:
        with saving:
            _sync_folder(target.parent)


def reserve(fd: int, size: int) -> bool:
    """Find out now whether there is room; also the fastest way to write a new file.

    Returns:
        False where the file system cannot reserve any.
    """
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return size == 0
    try:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno != errno.ENOSPC or not _wait_for_frees():
                raise
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        return False
    return True


def _write_all(fd: int, view: memoryview) -> int:
    done = 0
    while done < len(view):
        done += os.write(fd, view[done:])
    return done


def _replaceable(target: Path) -> os.stat_result | None:
    """What stands at *target*; None where nothing does."""
    try:
        info = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return info


@contextmanager
def _sibling(saving: Saving, target: Path) -> Iterator[tuple[int, Path]]:
    """An empty, locked file beside *target* and its name; it is gone after the block."""
    with saving:
        part = target.with_name(_part_name(target.name))
        fd = _open_locked(part)
    try:
        try:
            with saving:
                os.ftruncate(fd, 0)
            yield fd, part
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    finally:
        os.close(fd)


def _part_name(name: str) -> str:
    """Always the same for one target, and not too long for a folder where *name* is not."""
    part = f".{name}.part"
    if len(os.fsencode(part)) <= _NAME_MAX:
        return part
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()}.part"


def _open_locked(part: Path) -> int:
    # Never through a link that somebody else may have put there.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    while True:
        fd = os.open(part, flags, 0o666)
        if fcntl is None:
            return fd
        fcntl.flock(fd, fcntl.LOCK_EX)
        # The writer that we waited for has renamed or removed what we opened: begin anew.
        try:
            if os.path.samestat(os.fstat(fd), part.stat()):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # folders cannot be opened there
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- large old files are freed by a thread, so that saving over one takes no longer than anew

_frees: list[threading.Thread] = []


@contextmanager
def _freed_later(target: Path, old: os.stat_result | None) -> Iterator[None]:
    """Keep a large *target* open over the block that removes its name, and close it elsewhere."""
    fd = None
    if old is not None and old.st_size >= _SLOW_TO_FREE and old.st_nlink == 1:
        with suppress(OSError):  # one that may be written and not read
            fd = os.open(target, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        yield
    finally:
        if fd is not None:
            _close_elsewhere(fd)


def _close_elsewhere(fd: int) -> None:
    _frees[:] = [thread for thread in _frees if thread.is_alive()]
    thread = threading.Thread(target=os.close, args=(fd,), name="llama_state-free")
    try:
        thread.start()
    except RuntimeError:  # no threads any more, or none left
        os.close(fd)
    else:
        _frees.append(thread)


def _wait_for_frees() -> bool:
    """Wait for files that are about to be freed; False when there were none."""
    waiting = [*_frees]
    for thread in waiting:
        thread.join()
    return bool(waiting)
