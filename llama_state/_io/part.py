"""The part file of a save: a new file beside the target that takes the target's name, or goes.

Each save has one of its own, made exclusively: nothing that lies there is taken over, and no save
waits for another. Its lock marks it as in use. What a killed process leaves has no lock, and the
next save beside it removes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from io import FileIO
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Final

from .platform import files

_NAME_MAX: Final = 255
_LONGEST_SUFFIX: Final = len(".9999.part")
_MOST_NAMES: Final = 10_000
_CANNOT_LINK = files.NOT_SUPPORTED | {errno.EPERM, errno.EMLINK}
# Where a file has to be closed before it is renamed, it has no lock meanwhile: a new one is no
# leftover there.
_NEW_SECONDS: Final = 3600


class PartFile:
    """An empty file beside *target*, for the length of a block.

    Its mode is the final one from the start: nobody can open it who could not open the target.

    Args:
        target: The file whose name it is to take, without links.
        mode: The mode of the file that it replaces; None for the default mode.

    Raises:
        OSError: It cannot be made.
    """

    _file: FileIO | None = None

    def __init__(self, target: Path, mode: int | None) -> None:
        self._target = target
        self._process = os.getpid()
        self._path = target
        # By one call of C: an interrupt leaves no descriptor that nobody owns.
        self._opener = partial(os.open, mode=0o666 if mode is None else mode)
        try:
            self._make(mode)
        except BaseException:
            self.close()
            if self._file is None and self._path != target:
                _remove_leftover(self._path)  # made, perhaps, by a call that was interrupted
            raise

    @property
    def fd(self) -> int:
        """Its descriptor."""
        if self._file is None:
            raise ValueError("the part file is closed")
        return self._file.fileno()

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self.close()

    def __del__(self) -> None:
        with suppress(OSError):
            self.close()

    def replace_target(self) -> None:
        """Take the target's name, whatever has it."""
        self._take(files.replace)

    def become_target(self) -> None:
        """Take the target's name.

        Raises:
            FileExistsError: There is something of that name.
        """
        try:
            self._take(files.take_name)
        except OSError as error:
            if files.OPEN_FILES_STAY or error.errno not in _CANNOT_LINK:
                raise
            self._reserve_target()

    def _take(self, name: Callable[[Path, Path], None]) -> None:
        if not files.OPEN_FILES_STAY:
            name(self._path, self._target)
            return
        if self._file is not None:
            self._file.close()
        try:
            name(self._path, self._target)
        except BaseException:
            with suppress(OSError):
                self._path.unlink()
            raise

    def _reserve_target(self) -> None:
        """Take the target's name where a file cannot have two: an empty file reserves it."""
        with FileIO(self._target, "x") as reserved:
            try:
                self.replace_target()
            except BaseException:
                _remove(self._target, reserved)
                raise

    def close(self) -> None:
        """Close it, and remove it if it still has its own name."""
        if self._file is None or self._file.closed:
            return
        # A process that was forked meanwhile has a copy of this object, but the file is not its.
        if os.getpid() != self._process:
            self._file.close()
            return
        try:
            _remove(self._path, self._file)
        except BaseException:
            _remove(self._path, self._file)  # it was interrupted
            raise
        finally:
            self._file.close()

    def _make(self, mode: int | None) -> None:
        if not any(map(self._made_at, islice(_names(self._target), _MOST_NAMES))):
            raise OSError(errno.EMFILE, "too many part files of other saves beside it")
        if mode is not None:
            files.keep_mode(self.fd, mode)

    def _made_at(self, path: Path) -> bool:
        """Make it and lock it; return False if *path* is taken."""
        self._path = path
        try:
            self._file = FileIO(path, "x+", opener=self._opener)
        except FileExistsError:
            if not _remove_leftover(path):
                return False
            with suppress(FileExistsError):
                self._file = FileIO(path, "x+", opener=self._opener)
        # Another save can have taken it for a leftover before it was locked.
        if self._file is None:
            return False
        if files.try_lock(self.fd) is not False and _is_at(path, self.fd):
            return True
        self._file.close()
        self._file = None
        return False


def _names(target: Path) -> Iterator[Path]:
    """Yield the names that a part file of *target* can have; none is too long if its own is not."""
    name = target.name
    if len(os.fsencode(name)) + 1 + _LONGEST_SUFFIX > _NAME_MAX:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    yield target.with_name(f".{name}.part")
    for number in count(1):
        yield target.with_name(f".{name}.{number}.part")


def _remove_leftover(path: Path) -> bool:
    """Remove the part file at *path* if a dead process of this user left it; return whether."""
    with suppress(OSError):
        # The type first: to open a device can have effects, and a FIFO waits.
        info = os.lstat(path)
        if _is_ours(info) and (info.st_nlink == 1 or _has_its_target(path, info)):
            with FileIO(path) as file:
                return bool(files.try_lock(file.fileno())) and _remove(path, file)
    return False


def _is_ours(info: os.stat_result) -> bool:
    new = files.OPEN_FILES_STAY and time.time() - info.st_mtime < _NEW_SECONDS
    return stat.S_ISREG(info.st_mode) and files.is_of_this_user(info) and not new


def _has_its_target(path: Path, info: os.stat_result) -> bool:
    """Tell whether the other name of a part file is that of its target, which it has taken."""
    name = path.name[1:].removesuffix(".part")
    stem, _, number = name.rpartition(".")
    targets = [name, stem] if number.isdecimal() else [name]
    others = (path.with_name(target) for target in targets if target)
    found = (os.lstat(other) for other in others if os.path.lexists(other))
    return info.st_nlink == 2 and any(os.path.samestat(info, other) for other in found)


def _remove(path: Path, file: FileIO) -> bool:
    """Remove the name *path* if it is one of *file*."""
    with suppress(OSError):
        if _is_at(path, file.fileno()):
            if files.OPEN_FILES_STAY:
                file.close()
            path.unlink()
            return True
    return False


def _is_at(path: Path, fd: int) -> bool:
    if files.OPEN_FILES_STAY:
        return True
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def remove_leftovers(folder: Path) -> None:
    """Remove all part files that dead processes left in a folder."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(".") and path.name.endswith(".part"):
                _remove_leftover(path)
