"""A pool of large buffers.

New memory is slow: the system clears each page when it is first used, which takes longer than to
copy a state there. So large buffers use huge pages, if the system has any, and returned buffers
are kept for the next borrower. The system can take the pages of a kept buffer (MADV_FREE).
"""

from __future__ import annotations

import mmap
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Final

from .locks import Lock
from .platform.files import reserve
from .platform.memory import advise, new_memory

if TYPE_CHECKING:
    from . import Buffer

KEPT: Final = 2 << 30
"""The most bytes that :data:`POOL` keeps."""

_HUGE: Final = 2 << 20
_SMALL: Final = 1 << 16
# A state grows with each token: a buffer is 1/8 larger than asked for, to last for some more.
_GROWTH: Final = 8


class Pool:
    """Lends buffers and keeps them when they are returned.

    It keeps at most as many as were ever lent at the same time. It is thread-safe.

    Args:
        kept: The most bytes to keep while they are not lent.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._lock = Lock()
        self._idle: list[mmap.mmap] = []  # in the order in which they were returned
        self._limits = threading.local()

    @property
    def idle(self) -> int:
        """Bytes that are kept and not lent."""
        with self._lock:
            return sum(map(len, self._idle))

    @contextmanager
    def limited(self, nbytes: int | None) -> Iterator[None]:
        """Let this thread borrow buffers of up to *nbytes* only in the block; None: of any size."""
        before = getattr(self._limits, "nbytes", None)
        try:
            self._limits.nbytes = nbytes
            yield
        finally:
            self._limits.nbytes = before

    @contextmanager
    def lend(
        self, nbytes: int, *, spill: bool = False, only_kept: bool = False
    ) -> Iterator[memoryview]:
        """Yield a page-aligned buffer of *nbytes*, of any content, for the length of the block.

        Views of it must not be used after the block.

        Args:
            nbytes: Length of the buffer.
            spill: If memory is short or :meth:`limited`, use the pages of a temporary file,
                which the system can write out.
            only_kept: Lend none that is too large to be kept, and so would be new each time.

        Raises:
            MemoryError: There is not enough memory, it is :meth:`limited`, or with *only_kept* it
                would not be kept.
        """
        if only_kept and (size := _with_growth(nbytes)) > self._kept:
            raise MemoryError(f"a buffer of {size} bytes is not kept")
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
        """Free every buffer that is not lent; return the number of bytes."""
        with self._lock:
            idle, self._idle = self._idle, []
        return sum(map(len, idle))

    def _take(self, nbytes: int) -> mmap.mmap:
        limit = getattr(self._limits, "nbytes", None)
        if limit is not None and nbytes > limit:
            raise MemoryError(f"a buffer of {nbytes} bytes; the limit is {limit}")
        with self._lock:
            if (memory := self._take_idle(nbytes)) is not None:
                return memory
        try:
            return anonymous(_with_growth(nbytes))
        except OSError:
            self.trim()
        try:
            return anonymous(_rounded(nbytes))
        except OSError as error:
            raise MemoryError(f"a buffer of {nbytes} bytes: {error.strerror}") from error

    def _take_idle(self, nbytes: int) -> mmap.mmap | None:
        while large_enough := [memory for memory in self._idle if len(memory) >= nbytes]:
            smallest = min(large_enough, key=len)
            with suppress(ValueError):  # gone meanwhile
                self._idle.remove(smallest)
                return smallest
        if self._idle:  # All are too small: the new one will be kept in place of the largest.
            with suppress(ValueError):
                self._idle.remove(max(self._idle, key=len))
        return None

    def _give_back(self, memory: mmap.mmap) -> None:
        advise(memory, "MADV_FREE")
        with self._lock:
            self._idle.append(memory)
            self._free_oldest()

    def _free_oldest(self) -> None:
        while self._idle and sum(map(len, self._idle)) > self._kept:
            self._idle.pop(0)


POOL: Final = Pool(KEPT)


def trim_buffers() -> int:
    """Free the memory that is kept for the next save or load.

    Up to 2 GiB are kept between calls, marked so that the system can take them when it runs short.

    Returns:
        The number of bytes that were kept.
    """
    return POOL.trim()


def flat(buffer: Buffer) -> memoryview:
    """Return a view of the bytes of a contiguous buffer, of any format and shape.

    Raises:
        TypeError: It is not a buffer, or not contiguous.
    """
    view = memoryview(buffer)
    with suppress(TypeError, ValueError, NotImplementedError):
        return view.cast("B")
    # For formats that memoryview does not know, and for Fortran order. Not for all buffers: before
    # Python 3.12.6 a PickleBuffer of a memoryview crashes when both are garbage collected.
    try:
        return PickleBuffer(buffer).raw()
    except BufferError as error:
        raise TypeError(f"not a contiguous buffer: {error}") from None


def write_parts(out: memoryview, parts: Iterable[Buffer]) -> None:
    """Write buffers one after the other to the start of *out*, which has room for them."""
    at = 0
    for part in map(flat, parts):
        out[at : at + len(part)] = part
        at += len(part)


def _with_growth(nbytes: int) -> int:
    return _rounded(nbytes + nbytes // _GROWTH)


def _rounded(nbytes: int) -> int:
    grain = _HUGE if nbytes >= _HUGE else _SMALL
    return max(-(-nbytes // grain), 1) * grain


def anonymous(nbytes: int) -> mmap.mmap:
    """Return new memory, of huge pages if there are any."""
    memory = new_memory(nbytes)
    if nbytes >= _HUGE:
        advise(memory, "MADV_HUGEPAGE")
    return memory


def _file_pages(nbytes: int) -> mmap.mmap:
    """Return the pages of a temporary file that has no name."""
    try:
        with tempfile.TemporaryFile(prefix="llama_state-") as file:
            # Reserved, since to write to pages that the disk has no space for kills the process.
            if reserve(file.fileno(), max(nbytes, 1)):
                return mmap.mmap(file.fileno(), max(nbytes, 1))
            error: object = "a file's space cannot be reserved here"
    except OSError as failed:
        error = failed
    raise MemoryError(f"no space for {nbytes} bytes, in memory or on disk: {error}")
