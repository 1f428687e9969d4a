"""llama.cpp's memory functions over an open call: positions, removal, copies, clearing.

Sequence ids are validated by the callers: llama.cpp aborts the process on a wrong one. Every
function takes a memory pointer that may be null (encoders have no memory).
"""

from __future__ import annotations

from typing import NamedTuple

from ._handles import Call
from ._llama_cffi import lib


class Positions(NamedTuple):
    """Smallest and largest position of a sequence as llama.cpp reports them; -1 when empty."""

    first: int
    last: int


def positions(call: Call, seq_id: int) -> Positions:
    """What llama.cpp says of one sequence."""
    mem = lib.llama_get_memory(call.api, call.ptr)
    return Positions(
        lib.llama_memory_seq_pos_min(call.api, mem, seq_id),
        lib.llama_memory_seq_pos_max(call.api, mem, seq_id),
    )


def occupied(call: Call, n_seq_max: int) -> dict[int, Positions]:
    """The non-empty sequences and their positions."""
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


def clear(call: Call, *, data: bool) -> None:
    """Remove every sequence; with *data* zero the tensors too, which takes time by their size."""
    mem = lib.llama_get_memory(call.api, call.ptr)
    lib.llama_memory_clear(call.api, mem, data)
