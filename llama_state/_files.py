"""Files that are whole or absent, and reads that trust no length but the file's own.

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ._types import StrPath
from .errors import SaveError, TruncatedError

if TYPE_CHECKING:
    from ._types import Buffer

try:
    import fcntl
except ImportError:  # not POSIX: writers of one target are not serialized there
    fcntl = None  # type: ignore[assignment]

_PIECE: Final = 16 << 20
_NAME_MAX: Final = 255
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def write_file(
    path: StrPath, parts: Iterable[Buffer], *, durable: bool, at_most: int | None = None
) -> int:
    """Write *parts* one after the other to *path*: all of it, or nothing.

    Args:
        path: The file; an existing one is replaced, a link is followed.
        parts: Contiguous buffers.
        durable: Wait until file and folder entry are on the disk (fsync).
        at_most: Bytes that there will not be more of, where *parts* are made while they are
            written; room for as many is taken first.

    Returns:
        The file's size in bytes.

    Raises:
        SaveError: With the ``errno`` of what failed; what stood at *path* is still there.
    """
    if at_most is None:
        parts = [*parts]
        at_most = sum(memoryview(part).nbytes for part in parts)
    size = 0
    outcome = "state not saved, what was there is untouched"
    try:
        target = Path(os.path.realpath(path))
        mode = _replaceable(target)
        with _sibling(target) as (fd, sibling):
            if mode is not None:
                os.fchmod(fd, mode)
            _preallocate(fd, at_most)
            for part in parts:
                size += _write_all(fd, memoryview(part).cast("B"))
            os.ftruncate(fd, size)
            if durable:
                os.fsync(fd)
            sibling.replace(target)
        outcome = "state saved, but not sure to survive a power cut"
        if durable:
            _sync_folder(target.parent)
    except OSError as error:
        raise SaveError(error.errno, f"{outcome}: {error.strerror}", os.fspath(path)) from error
    except ValueError as error:  # a NUL in the path
        raise SaveError(errno.EINVAL, f"{outcome}: {error}", os.fspath(path)) from error
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
        view = memoryview(mmap.mmap(-1, size))
        done = 0
        while done < len(view):
            got = file.readinto(view[done : done + _PIECE])
            if not got:
                raise TruncatedError("the file shrank while it was read", need=len(view), have=done)
            done += got
        return view


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


def _replaceable(target: Path) -> int | None:
    """The mode to keep of what stands at *target*; None where nothing does."""
    try:
        info = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return stat.S_IMODE(info.st_mode)


@contextmanager
def _sibling(target: Path) -> Iterator[tuple[int, Path]]:
    """An empty, locked file beside *target* and its name; it is gone after the block."""
    part = target.with_name(_part_name(target.name))
    fd = _open_locked(part)
    try:
        try:
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


def _preallocate(fd: int, size: int) -> None:
    """Find out now whether there is room; also the fastest way to write a new file."""
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def _write_all(fd: int, view: memoryview) -> int:
    done = 0
    while done < len(view):
        done += os.write(fd, view[done : done + _PIECE])
    return done


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # folders can not be opened there
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
