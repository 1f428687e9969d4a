"""llama.cpp's state functions over an open call: how big, read it, write it.

A *scope* is a valid sequence id, or None for the whole context. *flags* are llama.cpp's
``llama_state_seq_flags``; with any set, the caller has required the capability ``state-flags``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ._buffers import POOL, flat
from ._handles import Call
from ._llama_cffi import ffi, lib
from .errors import CapacityError, StateError

if TYPE_CHECKING:
    from ._types import Buffer

Scope: TypeAlias = "int | None"

# Smaller memory comes from what the process has already.
_WORTH_HUGE: Final = 4 << 20

# llama_state_seq_flags
PARTIAL_ONLY: Final = 1
ON_DEVICE: Final = 2


def size(call: Call, scope: Scope, flags: int = 0) -> int:
    """Bytes that :func:`read` would give now."""
    if scope is None:
        return lib.llama_state_get_size(call.api, call.ptr)
    if flags:
        return lib.llama_state_seq_get_size_ext(call.api, call.ptr, scope, flags)
    return lib.llama_state_seq_get_size(call.api, call.ptr, scope)


def read(call: Call, scope: Scope, flags: int = 0) -> bytes:
    """The state as bytes, with one copy out of llama.cpp and no second pass."""
    # Filled in place before anybody else sees it: zeroed pages come from the system as they are
    # touched, so this costs one pass, where a bytearray would cost two and a copy three.
    blob = bytes(size(call, scope, flags))
    target = ffi.from_buffer("uint8_t[]", blob)
    if len(blob) >= _WORTH_HUGE:
        lib.pages_huge(target, len(blob))
    _fill(call, scope, target, len(blob), flags)
    return blob


@contextmanager
def lent(call: Call, scope: Scope) -> Iterator[memoryview]:
    """The state in a buffer that is lent, for what needs it no longer than the block."""
    with POOL.lend(size(call, scope), spill=True) as buffer:
        yield read_into(call, scope, buffer)


def read_into(call: Call, scope: Scope, out: Buffer, flags: int = 0) -> memoryview:
    """Fill the start of a writable buffer with the state.

    Returns:
        A view of the part written.

    Raises:
        CapacityError: The buffer is too small.
    """
    need = size(call, scope, flags)
    view = flat(out)
    if len(view) < need:
        raise CapacityError("output buffer, in bytes", need=need, have=len(view))
    # Released here and not by the garbage collector: see flat().
    with ffi.from_buffer("uint8_t[]", view, require_writable=True) as target:
        _fill(call, scope, target, need, flags)
    return view[:need]


def prepare(pages: memoryview) -> None:
    """Have pages of a mapped file in memory before llama.cpp writes to them.

    Raises:
        OSError: The disk has no room for them, or is broken.
    """
    number = lib.pages_populate(ffi.from_buffer("uint8_t[]", pages), len(pages), True)
    if number not in (0, errno.EINVAL):  # an older system has them as they are touched
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def overwrite(view: memoryview, start: int, data: bytes) -> None:
    """Write *data* into a buffer of ours; of a private mapping that is read-only its pages change.

    Raises:
        MemoryError: They can not be written to.
    """
    if view.readonly:
        here = ffi.from_buffer("uint8_t[]", view) + start
        if not lib.pages_writable(here, len(data)):
            raise MemoryError("the pages of a file can not be written to")
        ffi.memmove(here, data, len(data))
    else:
        view[start : start + len(data)] = data


def _fill(call: Call, scope: Scope, target: Any, need: int, flags: int) -> None:
    if scope is None:
        written = lib.llama_state_get_data(call.api, call.ptr, target, need)
    elif flags:
        written = lib.llama_state_seq_get_data_ext(call.api, call.ptr, target, need, scope, flags)
    else:
        written = lib.llama_state_seq_get_data(call.api, call.ptr, target, need, scope)
    if written != need:
        log = "; ".join(call.log())
        raise StateError(
            f"llama.cpp wrote {written} of {need} bytes of state: {log or 'no reason given'}"
        )


def write(call: Call, scope: Scope, blob: Buffer, flags: int = 0) -> int:
    """Give a state to llama.cpp; nothing is checked here.

    Returns:
        The bytes that it consumed: fewer than the blob has mean that it was refused or misread.
    """
    with ffi.from_buffer("uint8_t[]", blob) as source:
        if scope is None:
            return lib.llama_state_set_data(call.api, call.ptr, source, len(source))
        if flags:
            return lib.llama_state_seq_set_data_ext(
                call.api, call.ptr, source, len(source), scope, flags
            )
        return lib.llama_state_seq_set_data(call.api, call.ptr, source, len(source), scope)
