"""Files: how they are opened, locked, reserved, synced and named."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable
from io import FileIO
from mmap import mmap
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from ...errors import UnsupportedError

try:
    import fcntl
except ImportError:  # Windows, and Python in a browser
    fcntl = None  # type: ignore[assignment]

OPEN_FILES_STAY: Final = sys.platform == "win32"
"""Whether a file that is open or mapped cannot be renamed, replaced or removed."""

FOLDERS_OPEN: Final = sys.platform != "win32"
"""Whether folders can be opened and synced."""

NOT_SUPPORTED: Final = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.ENOTTY}
)
"""What a call fails with that a system or a file system lacks; macOS has two numbers for it."""

# Without O_NONBLOCK, opening a FIFO would wait for a writer; without O_BINARY, Windows would change
# the ends of lines.
_READING: Final = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY", "O_NOINHERIT")
)
# macOS, <sys/fcntl.h>: Python has no names for these.
_F_PREALLOCATE: Final = 42
_F_ALLOCATEALL: Final = 4
_F_PEOFPOSMODE: Final = 3
_FSTORE: Final = struct.Struct("=Iiqqq")  # fstore_t: flags, mode, offset, length, allocated
# Windows: which byte of a file is locked. Far from all that is read: others cannot read it then.
_LOCKED_BYTE: Final = 0x7FFF_FFF0
_POLL_SECONDS: Final = 0.005
# Windows: how long to try again while a virus scanner or an indexer has a new file open.
_BUSY_SECONDS: Final = 1.0


# -- open, read, write


def open_for_reading(path: str | os.PathLike[str]) -> FileIO:
    """Open a file of any type without waiting for anybody."""
    return FileIO(os.open(path, _READING))  # at once: what is lost of it is closed


def read_at(fd: int, size: int, start: int) -> bytes:
    """Read up to *size* bytes from *start*; the position of the file may change."""
    if sys.platform != "win32" and hasattr(os, "pread"):
        return os.pread(fd, size, start)
    os.lseek(fd, start, os.SEEK_SET)
    return os.read(fd, size)


def write_at(fd: int, data: bytes, start: int) -> None:
    """Write a few bytes at *start*; the position of the file may change."""
    if hasattr(os, "pwrite"):
        os.pwrite(fd, data, start)
        return
    os.lseek(fd, start, os.SEEK_SET)
    os.write(fd, data)


def path_of_url(path: str) -> Path:
    """Return the path that a file URL has."""
    path = unquote(path)
    if sys.platform == "win32" and re.match(r"/[A-Za-z]:", path):
        path = path[1:]
    return Path(path)


# -- who they are of, and who uses them


def is_of_this_user(info: os.stat_result) -> bool:
    """Return whether a file is the user's, as far as the system says."""
    return not hasattr(os, "geteuid") or info.st_uid == os.geteuid()


def keep_mode(fd: int, mode: int) -> None:
    """Give an open file the mode of the file that it will replace, where files have modes."""
    if hasattr(os, "fchmod") and stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        os.fchmod(fd, mode)


def try_lock(fd: int) -> bool | None:
    """Lock a file; return False if somebody else has, None where there are no locks."""
    try:
        return _lock(fd)
    except OSError:
        return None


def lock(fd: int) -> None:
    """Lock a file, and wait for whoever has it locked. To close it ends that.

    Raises:
        UnsupportedError: The system has no locks.
        OSError: The file system has none.
    """
    if sys.platform != "win32" and fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return
    while not (locked := _lock(fd)):
        if locked is None:
            raise UnsupportedError(
                "this system has no file locks (Python has neither fcntl nor msvcrt), without which"
                " several processes cannot share a folder: use a store in memory or on a server"
            )
        time.sleep(_POLL_SECONDS)


def _lock(fd: int) -> bool | None:
    if sys.platform == "win32":
        import msvcrt

        before = os.lseek(fd, 0, os.SEEK_CUR)
        try:
            os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        finally:
            os.lseek(fd, before, os.SEEK_SET)
        return True
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_lease(fd: int) -> bool:
    """Take a read lease: whoever wants to write to the file must wait until it ends.

    Returns:
        False if the system grants none: only Linux has them, for files of the user that nobody has
        open for writing.
    """
    if sys.platform != "linux" or fcntl is None:
        return False
    try:
        # The system sends a signal when a process waits. By default SIGIO, which kills; SIGURG is
        # ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except (AttributeError, OSError):
        return False
    return True


def has_lease(fd: int) -> bool:
    """Return whether the lease holds, and nobody waits for its end."""
    if sys.platform != "linux":
        return False
    return bool(fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK)


def end_lease(fd: int) -> None:
    """End a lease.

    Raises:
        OSError: The system has ended it.
    """
    if sys.platform == "linux":
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


# -- space, disk, names


def reserve(fd: int, size: int) -> bool:
    """Give an empty file its size, and all of its space on the disk.

    Returns:
        False if the system or the file system cannot: then it is empty still.

    Raises:
        OSError: There is no space.
    """
    try:
        if sys.platform == "darwin":
            _preallocate(fd, size)
        elif hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        else:
            return False
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return False
    return True


def _preallocate(fd: int, size: int) -> None:
    """Reserve as macOS does: space behind the end of the file, and then its size."""
    if sys.platform == "win32" or fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.fcntl(fd, _F_PREALLOCATE, _FSTORE.pack(_F_ALLOCATEALL, _F_PEOFPOSMODE, 0, size, 0))
    os.ftruncate(fd, size)


def sync(fd: int) -> None:
    """Wait until a file, or a folder, is on the disk. On macOS fsync leaves it to the drive when.

    Raises:
        OSError: The disk fails.
    """
    if sys.platform == "darwin" and fcntl is not None:
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:  # a file system on a server may lack it
                raise
        else:
            return
    os.fsync(fd)


def sync_pages(pages: mmap) -> None:
    """Hand what was written to the pages of a file to the file, where :func:`sync` does not."""
    if sys.platform != "linux":
        pages.flush()


def replace(path: Path, target: Path) -> None:
    """Give a file another name, whatever has it."""
    _patiently(lambda: path.replace(target))


def take_name(path: Path, target: Path) -> None:
    """Give a file another name, if nothing has it. The old name may stay beside it.

    Raises:
        FileExistsError: Something has that name.
        OSError: Of :data:`NOT_SUPPORTED` and others, where a file cannot have two names.
    """
    if OPEN_FILES_STAY:
        _patiently(lambda: path.rename(target))  # which never replaces anything there
    else:
        os.link(path, target, follow_symlinks=False)


def _patiently(act: Callable[[], object]) -> None:
    """Act; where open files stay, again while somebody has the file open, for a second."""
    end = time.monotonic() + (_BUSY_SECONDS if OPEN_FILES_STAY else 0)
    while True:
        try:
            act()
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(_POLL_SECONDS)
        else:
            return
