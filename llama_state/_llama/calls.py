"""llama.cpp's memory and state functions over an open call.

Sequence ids are validated by the callers: llama.cpp aborts the process on a wrong one. Every
memory function takes a memory pointer that may be null (encoders have no memory). *flags* are
llama.cpp's ``llama_state_seq_flags``; with any set, the caller has required the capability
``state-flags``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from .. import layout
from .._io.buffers import POOL, flat
from .._io.pages import make_huge
from ..errors import CapacityError, StateError
from ._llama_cffi import ffi, lib
from .handles import Call

if TYPE_CHECKING:
    from .._io import Buffer

Target: TypeAlias = "int | None"
"""A sequence id, or None for the whole context."""

# llama_state_seq_flags
PARTIAL_ONLY: Final = 1
ON_DEVICE: Final = 2


# -- memory


def positions(call: Call, seq_id: int) -> layout.Span:
    """Return what llama.cpp says of one sequence."""
    mem = lib.llama_get_memory(call.api, call.ptr)
    return layout.Span(
        lib.llama_memory_seq_pos_min(call.api, mem, seq_id),
        lib.llama_memory_seq_pos_max(call.api, mem, seq_id),
    )


def occupied(call: Call, n_seq_max: int) -> dict[int, layout.Span]:
    """Return the non-empty sequences and their positions."""
    spans = {seq_id: positions(call, seq_id) for seq_id in range(n_seq_max)}
    return {seq_id: span for seq_id, span in spans.items() if span.last >= 0}


def remove(call: Call, seq_id: int, start: int = -1, end: int = -1) -> bool:
    """Remove ``start <= position < end`` (negative: open) of a sequence; False where refused."""
    mem = lib.llama_get_memory(call.api, call.ptr)
    return lib.llama_memory_seq_rm(call.api, mem, seq_id, start, end)


def share(call: Call, src: int, dest: int, start: int = -1, end: int = -1) -> None:
    """Let *dest* own the cells of *src* too: immediate only within one stream."""
    mem = lib.llama_get_memory(call.api, call.ptr)
    lib.llama_memory_seq_cp(call.api, mem, src, dest, start, end)


def empty(call: Call, target: Target) -> None:
    """Remove what a sequence holds, or every sequence."""
    mem = lib.llama_get_memory(call.api, call.ptr)
    if target is None:
        lib.llama_memory_clear(call.api, mem, False)
    else:
        lib.llama_memory_seq_rm(call.api, mem, target, -1, -1)


# -- state


def size(call: Call, target: Target, flags: int = 0) -> int:
    """Bytes that :func:`read` would give now."""
    if target is None:
        return lib.llama_state_get_size(call.api, call.ptr)
    if flags:
        return lib.llama_state_seq_get_size_ext(call.api, call.ptr, target, flags)
    return lib.llama_state_seq_get_size(call.api, call.ptr, target)


def read(call: Call, target: Target, flags: int = 0) -> bytes:
    """Return the state as bytes, with one copy out of llama.cpp and no second pass."""
    # Filled in place before anybody else sees it: zeroed pages come from the system as they are
    # touched, so this costs one pass, where a bytearray would cost two and a copy three.
    blob = bytes(size(call, target, flags))
    make_huge(blob)
    room = ffi.from_buffer("uint8_t[]", blob)
    _fill(call, target, room, len(blob), flags)
    return blob


@contextmanager
def lent(call: Call, target: Target, flags: int = 0) -> Iterator[memoryview]:
    """Return the state in a buffer that is lent, for what needs it no longer than the block."""
    with POOL.lend(size(call, target, flags), spill=True) as buffer:
        yield read_into(call, target, buffer, flags)


def read_into(call: Call, target: Target, out: Buffer, flags: int = 0) -> memoryview:
    """Fill the start of a writable buffer with the state.

    Returns:
        A view of the part written.

    Raises:
        CapacityError: The buffer is too small.
    """
    need = size(call, target, flags)
    view = flat(out)
    if len(view) < need:
        raise CapacityError("output buffer, in bytes", need=need, have=len(view))
    # Released here and not by the garbage collector: see flat().
    with ffi.from_buffer("uint8_t[]", view, require_writable=True) as room:
        _fill(call, target, room, need, flags)
    return view[:need]


def _fill(call: Call, target: Target, room: Any, need: int, flags: int) -> None:
    if target is None:
        written = lib.llama_state_get_data(call.api, call.ptr, room, need)
    elif flags:
        written = lib.llama_state_seq_get_data_ext(call.api, call.ptr, room, need, target, flags)
    else:
        written = lib.llama_state_seq_get_data(call.api, call.ptr, room, need, target)
    if written != need:
        log = "; ".join(call.log())
        raise StateError(
            f"llama.cpp wrote {written} of {need} bytes of state: {log or 'no reason given'}"
        )


def write(call: Call, target: Target, blob: Buffer, flags: int = 0) -> int:
    """Give a state to llama.cpp; nothing is checked here.

    Returns:
        The bytes that it consumed: fewer than the blob has mean that it was refused or misread.
    """
    with ffi.from_buffer("uint8_t[]", blob) as source:
        if target is None:
            return lib.llama_state_set_data(call.api, call.ptr, source, len(source))
        if flags:
            return lib.llama_state_seq_set_data_ext(
                call.api, call.ptr, source, len(source), target, flags
            )
        return lib.llama_state_seq_set_data(call.api, call.ptr, source, len(source), target)
