"""Objects as files in a folder, which any number of processes share.

There is no index: what is there is what the folder says. One file, ``lock``, is locked while room
is made, and holds how many bytes are used; where that is wrong, say after a crash, the files are
counted again.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Final, TypeVar

from ..._io import atomic, lease
from ..._io.buffers import flat
from ..._io.part import remove_leftovers
from ..._io.platform import files
from ..._io.reading import open_regular
from ...errors import TruncatedError
from ..objects import Name
from .backend import Stored, name_of, text_of
from .eviction import in_order

if TYPE_CHECKING:
    from ..._io import Buffer

T = TypeVar("T")

_USED = Struct("<Q")
_LOCK: Final = "lock"
_ASIDE: Final = "damaged"
# Of the capacity: what is freed beyond what is needed, so that not every write looks at all files.
_SLACK: Final = 0.05
_GONE = (FileNotFoundError, NotADirectoryError)


def is_store(folder: Path) -> bool:
    """Return whether a store was made in a folder."""
    return (folder / _LOCK).is_file()


class FolderBackend:
    """Objects in a folder, each in a file of its own.

    Args:
        folder: Made if it is not there.
        capacity_bytes: The most that all files in it take.
        durable: Whether an object is on the disk (fsync) when :meth:`put` returns.
        readonly: Nothing is written, not even when an object was used.

    Raises:
        OSError: The folder cannot be made, or not be used.
        UnsupportedError: The system has no file locks, and it is not *readonly*.
    """

    remote = False

    def __init__(
        self, folder: Path, capacity_bytes: int, *, durable: bool = False, readonly: bool = False
    ) -> None:
        self._folder = folder.absolute()
        self.location: str = str(self._folder)
        self.capacity_bytes = capacity_bytes
        self.readonly = readonly
        self._durable = durable
        if readonly:
            if not self._folder.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.location)
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.evict(capacity_bytes)

    # -- reading

    def expect(self, parents: Sequence[bytes]) -> None:
        """See :class:`Backend`: it is near."""

    def children(self, parent: bytes) -> Sequence[Name]:
        """See :class:`Backend`."""
        begin = parent.hex()
        found = (
            name_of(entry.name) for entry in self._listed(begin[:2]) if entry.name[:64] == begin
        )
        return [name for name in found if name is not None]

    def has(self, name: Name) -> bool:
        """See :class:`Backend`."""
        return os.path.exists(self._file(name))  # noqa: PTH110

    def head(self, name: Name, nbytes: int) -> bytes:
        """See :class:`Backend`."""
        with open_regular(self._file(name)) as (file, size):
            return file.read(min(nbytes, size)) or b""

    @contextmanager
    def open(self, name: Name, nbytes: int) -> Iterator[memoryview]:
        """See :class:`Backend`."""
        path = self._file(name)
        # Before anything is read: the file can say that it has any length.
        if (size := os.stat(path).st_size) != nbytes:  # noqa: PTH116
            raise TruncatedError("an object", need=nbytes, have=size)
        with lease.opened(path) as file:
            yield file.view

    def entries(self) -> Iterator[Stored]:
        """See :class:`Backend`."""
        for fan in self._listed(""):
            if len(fan.name) == 2:
                for entry in self._listed(fan.name):
                    name = name_of(entry.name)
                    if name is not None and entry.name.startswith(fan.name):
                        with suppress(*_GONE):
                            info = entry.stat(follow_symlinks=False)
                            yield Stored(name, info.st_size, info.st_mtime)

    def used_bytes(self) -> int:
        """See :class:`Backend`."""
        return self._count()

    # -- writing

    def put(self, name: Name, parts: Iterable[Buffer]) -> bool:
        """See :class:`Backend`."""
        views = [flat(part) for part in parts]
        size = sum(map(len, views))
        path = self._path(name)
        if self.readonly or size > self.capacity_bytes or path.exists():
            return False
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with self._new(path) as (fd, save_errors), save_errors:
                self._locked(partial(self._reserve, fd, size, path, name))
                for view in views:
                    atomic.write_all(fd, view)
        except _NoRoomError:
            return False
        except FileExistsError:
            self._count_anew()
            return False
        except BaseException:
            self._count_anew()
            raise
        return True

    def touch(self, names: Iterable[Name], when: float | None = None) -> None:
        """See :class:`Backend`."""
        if self.readonly:
            return
        now = time.time() if when is None else when
        for name in names:
            with suppress(OSError):
                os.utime(self._file(name), (now, now))

    def remove(self, name: Name) -> int:
        """See :class:`Backend`."""
        if self.readonly:
            return 0
        return self._locked(lambda used: self._remove(used, self._path(name)))

    def set_aside(self, name: Name) -> None:
        """See :class:`Backend`: it stays for who wants to look at it, as the first that goes."""
        if self.readonly:
            return
        aside, path = self._folder / _ASIDE, self._path(name)
        try:
            aside.mkdir(mode=0o700, exist_ok=True)
            path.replace(aside / path.name)
        except FileNotFoundError:
            return
        except OSError:  # no room for the folder, or something else has its name
            if not self.remove(name):
                # A folder has the object's name, or somebody reads the object.
                with suppress(*_GONE, *([PermissionError] if files.OPEN_FILES_STAY else [])):
                    path.replace(path.with_name(f"{path.name}.{_ASIDE}"))

    def evict(self, to_bytes: int) -> int:
        """See :class:`Backend`."""
        if self.readonly:
            return 0

        def evict(used: _Used) -> int:
            used.count(self._count())
            return self._evict(used, to_bytes)

        return self._locked(evict)

    # -- the capacity, under the lock

    def _new(self, path: Path) -> AbstractContextManager[tuple[int, atomic.SaveErrors]]:
        return atomic.replacing(path, durable=self._durable, replace=False, mode=0o600)

    def _reserve(self, fd: int, size: int, path: Path, name: Name, used: _Used) -> None:
        """Give an empty file its size, once there is room.

        Raises:
            _NoRoomError: What is there is pinned, or being written; or another process writes
                this object.
        """
        found = self._listed(path.parent.name)
        beside = (_size(each) for each in found if path.name in each.name)
        if any(beside):
            raise _NoRoomError
        if used.nbytes + size > self.capacity_bytes:
            used.count(self._count())
            self._evict(used, int(self.capacity_bytes * (1 - _SLACK)) - size, name)
        if used.nbytes + size > self.capacity_bytes:
            raise _NoRoomError
        used.count(used.nbytes + size)
        if not atomic.reserve(fd, size):
            os.ftruncate(fd, size)

    def _count_anew(self) -> None:
        self._locked(lambda used: used.count(self._count()))

    def _evict(self, used: _Used, to_bytes: int, needed: Name | None = None) -> int:
        freed = 0
        for entry in self._listed(_ASIDE):
            if used.nbytes <= to_bytes:
                return freed
            freed += self._remove(used, Path(entry.path))
        for stored in in_order(self.entries(), needed=needed):
            if used.nbytes <= to_bytes:
                break
            freed += self._remove(used, self._path(stored.name))
        return freed

    def _remove(self, used: _Used, path: Path) -> int:
        try:
            info = os.lstat(path)
            if stat.S_ISDIR(info.st_mode):
                return 0  # whoever made it can remove it
            path.unlink()
        except _GONE:
            return 0
        except PermissionError:
            if files.OPEN_FILES_STAY:
                return 0  # somebody reads it
            raise
        size = info.st_size if stat.S_ISREG(info.st_mode) else 0
        used.count(max(used.nbytes - size, 0))
        return size

    def _count(self) -> int:
        """Return the bytes of all files; what killed processes left is removed."""
        total = 0
        waiting = [""]
        while waiting:
            inside = waiting.pop()
            if not self.readonly:
                remove_leftovers(self._folder / inside)
            for entry in self._listed(inside):
                total += _size(entry)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(os.path.join(inside, entry.name))
        return total

    def _locked(self, act: Callable[[_Used], T]) -> T:
        """Act while every other process, and thread, that makes room is kept out.

        No context manager: one whose end is interrupted ends when the exception is forgotten, and
        until then nobody else gets in.
        """
        lock = self._folder / _LOCK
        if not lock.exists():
            lock.touch(mode=0o600)
        file = FileIO(lock, "r+")
        try:
            try:
                files.lock(file.fileno())
                return act(_Used(file))
            finally:
                file.close()
        except BaseException:
            file.close()  # the first may be what was interrupted
            raise

    # -- names

    def _file(self, name: Name) -> str:
        """Return where an object is: as text, of which a path takes longer than to look there."""
        file = text_of(name)
        return f"{self.location}/{file[:2]}/{file}"

    def _path(self, name: Name) -> Path:
        return Path(self._file(name))

    def _listed(self, inside: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(self._folder / inside) as entries:
                yield from entries
        except _GONE:
            return


class _NoRoomError(Exception):
    """There is no room for an object."""


class _Used:
    """The bytes that are used, in the lock file."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        data = files.read_at(file.fileno(), _USED.size, 0)
        self.nbytes: int = _USED.unpack(data)[0] if len(data) == _USED.size else 0

    def count(self, nbytes: int) -> None:
        """Write how many there are now."""
        self.nbytes = nbytes
        files.write_at(self._file.fileno(), _USED.pack(nbytes), 0)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        info = entry.stat(follow_symlinks=False)
    except _GONE:
        return 0
    return info.st_size if stat.S_ISREG(info.st_mode) else 0
