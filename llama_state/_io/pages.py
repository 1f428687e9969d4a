"""Pages of memory: huge ones, read ahead of their use, made writable.

The calls are C (``include/pages.h``), so that other threads run while the disk is read. Where the
extension is not built they do nothing, as on a system that does not have them.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

try:
    from ._pages import ffi, lib
except ImportError:
    lib = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from . import Buffer

# Smaller memory comes from what the process has already.
_WORTH_HUGE: Final = 4 << 20


def make_huge(buffer: Buffer) -> None:
    """Let a buffer that was not touched yet have huge pages, where that pays."""
    if lib is None:
        return
    view = ffi.from_buffer("uint8_t[]", buffer)
    if len(view) >= _WORTH_HUGE:
        lib.pages_huge(view, len(view))


def populate(pages: memoryview, *, write: bool) -> bool:
    """Have the pages of a mapped file in memory, to be read or to be written.

    A page that cannot be read from the disk when it is looked at kills the process.

    Args:
        pages: A view that begins at a page.
        write: They will be written to.

    Returns:
        False where the system cannot do that: the pages come as they are touched.

    Raises:
        OSError: The disk has no room for them, or is broken.
    """
    if lib is None:
        return False
    number = lib.pages_populate(ffi.from_buffer("uint8_t[]", pages), len(pages), write)
    if number not in (0, errno.EINVAL):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return number == 0


def overwrite(view: memoryview, start: int, data: bytes) -> None:
    """Write *data* into a view at *start*, also where it is a private, read-only mapping.

    The pages of such a mapping are made writable first; the file itself never changes.

    Raises:
        MemoryError: They cannot be made writable.
    """
    if not view.readonly:
        view[start : start + len(data)] = data
        return
    if lib is None:
        raise MemoryError("the pages of a file cannot be written to: the extension is not built")
    here = ffi.from_buffer("uint8_t[]", view) + start
    if not lib.pages_writable(here, len(data)):
        raise MemoryError("the pages of a file cannot be written to")
    ffi.memmove(here, data, len(data))
