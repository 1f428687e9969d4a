"""Memory: new pages, pages of files, and what the system is told about them."""

from __future__ import annotations

import mmap
import os
import sys
from contextlib import suppress
from io import FileIO
from pathlib import Path


def new_memory(nbytes: int) -> mmap.mmap:
    """Return new memory, private: shared memory, the default of mmap, cannot have huge pages."""
    if sys.platform == "win32" or not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE)


def map_privately(fd: int, size: int) -> mmap.mmap:
    """Map a file for reading; what it changes to may show or not."""
    if sys.platform == "win32" or not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


def advise(memory: mmap.mmap, advice: str) -> None:
    """Give the system an advice on memory, by the name in :mod:`mmap`, if it knows it."""
    if sys.platform != "win32" and hasattr(mmap, advice):
        with suppress(OSError):
            memory.madvise(getattr(mmap, advice))


def memory_file(name: str) -> tuple[FileIO, Path] | None:
    """Return a file without a folder, and its path; None where there are no such files."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return None
    if not Path("/proc/self/fd").exists():
        return None
    try:
        file = FileIO(os.memfd_create(name), "r+")
    except OSError:
        return None
    return file, Path(f"/proc/self/fd/{file.fileno()}")
