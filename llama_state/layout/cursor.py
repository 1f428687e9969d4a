"""Read forward through untrusted bytes: every length is compared with what is left."""

from __future__ import annotations

import sys
from struct import Struct
from typing import TYPE_CHECKING, Any

from .._io.buffers import flat
from ..errors import TruncatedError, UnsupportedError

if TYPE_CHECKING:
    from .._io import Buffer

U32 = Struct("<I")
U64 = Struct("<Q")


def open_view(data: Buffer) -> memoryview:
    """Return a view of the bytes of *data*.

    Raises:
        UnsupportedError: This host is big-endian. llama.cpp writes in host byte order, and
            only little-endian states are read here.
        TypeError: *data* is not contiguous.
    """
    if sys.byteorder != "little":
        raise UnsupportedError("states can be read on little-endian hosts only")
    return flat(data)


class Cursor:
    """A place in a buffer. *at* is a byte offset from its start and never passes its end."""

    __slots__ = ("at", "end", "view")

    def __init__(self, view: memoryview, at: int = 0) -> None:
        self.view: memoryview = view
        self.at: int = at
        self.end: int = len(view)

    def require(self, nbytes: int, what: str) -> None:
        """Raise TruncatedError if fewer than *nbytes* are left."""
        if nbytes > self.end - self.at:
            raise TruncatedError(what, need=self.at + nbytes, have=self.end, offset=self.at)

    def skip(self, nbytes: int, what: str) -> int:
        """Step over *nbytes* and return the offset at which they start."""
        self.require(nbytes, what)
        start = self.at
        self.at += nbytes
        return start

    def read(self, form: Struct, what: str) -> tuple[Any, ...]:
        """Read the numbers of *form*."""
        return form.unpack_from(self.view, self.skip(form.size, what))

    def u32(self, what: str) -> int:
        """Read one unsigned 32-bit number."""
        number: int = self.read(U32, what)[0]
        return number
