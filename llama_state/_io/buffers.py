"""Memory for a second state: lent, taken back, and used again.

Fresh memory is the enemy: the system clears each page at its first touch, which takes longer
than the copy that follows. So large buffers are in huge pages, where there are any, and what
comes back is kept for the next one who asks. What is kept the system may take (MADV_FREE).
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from . import Buffer

KEPT: Final = 2 << 30
"""Bytes that :data:`POOL` keeps at most."""

_HUGE: Final = 2 << 20
_SMALL: Final = 1 << 16
# A state grows with each token, and what was made for it should do for some more of them.
_GROWTH: Final = 8


class Pool:
    """Buffers that are lent, and kept when they come back.

    It holds at most as many as were ever lent at once. Safe to use from several threads.

    Args:
        kept: Bytes that are kept at most while they are not lent.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._idle: list[mmap.mmap] = []  # in the order in which they came back
        self._limits = threading.local()

    @property
    def idle(self) -> int:
        """Bytes that are kept and not lent."""
        with self._lock:
            return sum(map(len, self._idle))

    @contextmanager
    def limited(self, nbytes: int | None) -> Iterator[None]:
        """Let this thread borrow no buffer of more than *nbytes* in the block; None: any."""
        before = getattr(self._limits, "nbytes", None)
        self._limits.nbytes = nbytes
        try:
            yield
        finally:
            self._limits.nbytes = before

    @contextmanager
    def lend(self, nbytes: int, *, spill: bool = False) -> Iterator[memoryview]:
        """Yield *nbytes* of page-aligned memory that hold anything, for the length of the block.

        Nothing that refers to it may be used afterwards.

        Args:
            nbytes: Length of the buffer.
            spill: Where memory is short or :meth:`limited`, take pages of a temporary file:
                the system can write them out.

        Raises:
            MemoryError: It cannot be had.
        """
        try:
            memory = self._take(nbytes)
        except MemoryError:
            if not spill:
                raise
            yield memoryview(_file_pages(nbytes))[:nbytes]
            return
        try:
            yield memoryview(memory)[:nbytes]
        finally:
            self._give_back(memory)

    def trim(self) -> int:
        """Let go of every buffer that is not lent; return their bytes."""
        with self._lock:
            idle, self._idle = self._idle, []
        return sum(map(len, idle))

    def _take(self, nbytes: int) -> mmap.mmap:
        limit = getattr(self._limits, "nbytes", None)
        if limit is not None and nbytes > limit:
            raise MemoryError(f"a buffer of {nbytes} bytes, {limit} are allowed")
        with self._lock:
            fitting = min((one for one in self._idle if len(one) >= nbytes), key=len, default=None)
            if fitting is not None:
                self._idle.remove(fitting)
                return fitting
            if self._idle:  # too small: what is made now is kept in its place
                self._idle.remove(max(self._idle, key=len))
        try:
            return anonymous(_rounded(nbytes + nbytes // _GROWTH))
        except OSError:
            self.trim()
        try:
            return anonymous(_rounded(nbytes))
        except OSError as error:
            raise MemoryError(f"a buffer of {nbytes} bytes: {error.strerror}") from error

    def _give_back(self, memory: mmap.mmap) -> None:
        if hasattr(mmap, "MADV_FREE"):
            with suppress(OSError):
                memory.madvise(mmap.MADV_FREE)
        with self._lock:
            self._idle.append(memory)
            while self._idle and sum(map(len, self._idle)) > self._kept:
                self._idle.pop(0)


POOL: Final = Pool(KEPT)


def trim_buffers() -> int:
    """Give the memory back that is kept for the next save or load.

    Between calls up to 2 GiB are kept, and marked so that the system takes them when it runs
    short.

    Returns:
        Bytes that were kept.
    """
    return POOL.trim()


def flat(buffer: Buffer) -> memoryview:
    """The bytes of any contiguous buffer, not copied.

    Raises:
        TypeError: It is no buffer, or not contiguous.
    """
    view = memoryview(buffer)
    with suppress(TypeError, ValueError, NotImplementedError):
        return view.cast("B")
    # Formats that memoryview does not know, and Fortran's order. Not for all: a memoryview of
    # which there is such a buffer crashes Python before 3.12.6 when both are collected as garbage.
    try:
        return PickleBuffer(buffer).raw()
    except BufferError as error:
        raise TypeError(f"not a contiguous buffer: {error}") from None


def _rounded(nbytes: int) -> int:
    grain = _HUGE if nbytes >= _HUGE else _SMALL
    return max(-(-nbytes // grain), 1) * grain


def anonymous(nbytes: int) -> mmap.mmap:
    """Fresh memory. What mmap gives by default is shared, and cannot have huge pages."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _file_pages(nbytes: int) -> mmap.mmap:
    """The pages of a temporary file that has no name."""
    try:
        with tempfile.TemporaryFile(prefix="llama_state-") as file:
            # Reserved: writing to pages for which the disk has no room kills the process.
            os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))
            return mmap.mmap(file.fileno(), max(nbytes, 1))
    except (AttributeError, OSError) as error:
        raise MemoryError(f"no room for {nbytes} bytes, in memory or on disk: {error}") from error
