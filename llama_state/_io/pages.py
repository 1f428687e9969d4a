"""Memory pages: use huge ones, read them ahead of their use, make them writable.

The calls are in C (``include/pages.h``), so that other threads run while the disk is read. If the
extension is not built, they do nothing, as on a system that lacks them.
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

# Smaller buffers come from memory that the process has already.
_WORTH_HUGE: Final = 4 << 20


def make_huge(buffer: Buffer) -> None:
    """Ask for huge pages for a buffer that was not written to yet, if it is large enough."""
    if lib is None:
        return
    view = ffi.from_buffer("uint8_t[]", buffer)
    if len(view) >= _WORTH_HUGE:
        lib.pages_huge(view, len(view))


def populate(pages: memoryview, *, write: bool) -> bool:
    """Load the pages of a mapped file into memory, where errors can be reported.

    If the disk fails at the first use of a page instead, the process is killed.

    Args:
        pages: A view that begins at a page boundary.
        write: Whether the pages will be written to.

    Returns:
        False if the system cannot do that: then each page is loaded at its first use.

    Raises:
        OSError: The disk has no space for them, or fails.
    """
    if lib is None:
        return False
    number = lib.pages_populate(ffi.from_buffer("uint8_t[]", pages), len(pages), write)
    if number not in (0, errno.EINVAL, errno.ENOSYS):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return number == 0


def overwrite(view: memoryview, start: int, data: bytes) -> None:
    """Write *data* into a view at *start*, also if it is a private, read-only mapping.

    The pages of such a mapping are made writable first. The file itself does not change.

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
