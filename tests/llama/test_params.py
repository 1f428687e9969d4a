"""Fields of moving structs are found by their defaults, or the layout is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state._llama.params import CONTEXT_FIELDS, context_offsets, model_offsets
from llama_state.errors import UnsupportedError

HEAD = struct.pack("<4I", 512, 2048, 512, 1)
MINUS_ONE = struct.pack("<f", -1.0)


def block(extra_head: int, extra_tail: int) -> tuple[bytes, dict[str, int]]:
    """Context defaults as llama.cpp's build with that many more 32-bit fields has them."""
    head = HEAD + bytes(4 * extra_head) + struct.pack("<2i", 4, 4)
    enums = len(head)
    body = head + b"\xff" * 16 + bytes(8) + MINUS_ONE * 4 + bytes(4) + MINUS_ONE
    body += bytes(-len(body) % 8)
    types = len(body) + 16
    body += bytes(16) + struct.pack("<2i", 1, 1) + bytes(16 + 8 * extra_tail)
    flags = len(body)
    body += bytes([0, 1, 1, 1, 1, 0])
    offsets = {"flash_attn": enums + 12, "type_k": types, "type_v": types + 4}
    return body.ljust(1024, b"\0"), offsets | {"swa_full": flags + 4, "kv_unified": flags + 5}


@given(extra_head=st.integers(0, 6), extra_tail=st.integers(0, 3))
def test_fields_are_found_wherever_they_lie(extra_head: int, extra_tail: int) -> None:
    """New fields before or between shift the others, and they are found all the same."""
    defaults, expected = block(extra_head, extra_tail)
    found = context_offsets(defaults)
    assert found.keys() == CONTEXT_FIELDS.keys()
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, 513), (12, 2), (24, 7), (88, 2)],
    ids=["n_ctx", "n_seq_max", "an enum", "type_k"],
)
def test_changed_defaults_are_refused(at: int, value: int) -> None:
    """A default that is not the known one means an unknown layout, never a guess."""
    defaults = bytearray(block(0, 0)[0])
    struct.pack_into("<i", defaults, at, value)
    with pytest.raises(UnsupportedError, match=r"attach\(\)"):
        context_offsets(bytes(defaults))


def test_two_matches_are_refused() -> None:
    """A pattern that fits twice decides nothing."""
    defaults = bytearray(block(0, 0)[0])
    defaults[144:160] = b"\xff" * 16
    with pytest.raises(UnsupportedError, match=r"\[24, 144\]"):
        context_offsets(bytes(defaults))


def test_model_parameters() -> None:
    """n_gpu_layers is the -1 at byte 16, or the layout is refused."""
    good = bytes(16) + b"\xff" * 4 + bytes(44)
    assert model_offsets(good) == {"n_gpu_layers": 16}
    with pytest.raises(UnsupportedError):
        model_offsets(bytes(64))
