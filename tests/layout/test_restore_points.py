"""Restore points behind the payload of a slot file: found, read, and never invented."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state import FormatError, UnsupportedError
from llama_state.layout import FilePayload, Span, parse_file_header, parse_payload
from llama_state.layout.restore_points import pack_points
from tests.layout.blobs import State, text
from tests.layout.slots import packed
from tests.layout.statefiles import native, slot

KINDS = ["iswa", "recurrent", "hybrid", "hybrid-iswa"]
BEGINNING = b"SCKP\1\0\0\0"


def state(kind: str, n_tokens: int) -> State:
    return State(kind, cells=text(n_tokens, 0), seq=0)


def point(kind: str, n_tokens: int) -> bytes:
    """Build a restore point as llama-server does."""
    blob = replace(state(kind, n_tokens), partial=True).blob()
    head = struct.pack("<QiiQ", n_tokens, 0, n_tokens - 1, len(blob))
    return head + blob + bytes(16)


def points(kind: str, moments: Sequence[int]) -> bytes:
    return BEGINNING + struct.pack("<I", len(moments)) + b"".join(point(kind, n) for n in moments)


def parsed(data: bytes) -> FilePayload:
    return parse_payload(data, parse_file_header(data))


@pytest.mark.parametrize("kind", KINDS)
@given(moments=st.lists(st.integers(1, 9), max_size=3))
def test_a_slot_file_with_restore_points(kind: str, moments: list[int]) -> None:
    """The state is what it is without them, and each is where it is said to be."""
    plain = slot(state(kind, 9), packed(range(9)))
    data = plain + (points(kind, moments) if moments else b"")
    found = parsed(data)
    assert found.end == len(plain)
    assert found.layout == parsed(plain).layout
    assert [one.n_tokens for one in found.restore_points] == moments
    for one, n_tokens in zip(found.restore_points, moments, strict=True):
        blob = data[one.offset : one.offset + one.nbytes]
        assert blob == replace(state(kind, n_tokens), partial=True).blob()
        assert one.span == Span(0, n_tokens - 1)


@given(moments=st.lists(st.integers(1, 9), max_size=3))
def test_they_are_written_as_they_are_read(moments: list[int]) -> None:
    blobs = [replace(state("hybrid", n), partial=True).blob() for n in moments]
    listed = [(n, Span(0, n - 1), blob) for n, blob in zip(moments, blobs, strict=True)]
    expected = points("hybrid", moments) if moments else b""
    assert b"".join(map(bytes, pack_points(listed))) == expected


PLAIN = slot(state("hybrid", 9), packed(range(9)))
POINTS = points("hybrid", [3, 5])
DAMAGED = {
    "cut": POINTS[:-1],
    "longer": POINTS + b"\0",
    "another version": POINTS.replace(BEGINNING, b"SCKP\2\0\0\0"),
    "too many": POINTS[:8] + b"\xff\xff\xff\xff" + POINTS[12:],
    "none": POINTS[:12],
    "another magic": POINTS.replace(b"\xd8\x3c\x14\xaf", b"\xd8\x3c\x14\xae"),
    "a length that is too large": POINTS[:28] + b"\xff" * 8 + POINTS[36:],
    "other positions": POINTS[:24] + b"\1\0\0\0" + POINTS[28:],
    "of no tokens": POINTS[:12] + bytes(8) + POINTS[20:],
    "another state in it": POINTS[:12] + point("iswa", 3) + point("hybrid", 5),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_damaged_is_refused(damage: str) -> None:
    with pytest.raises((FormatError, UnsupportedError)):
        parsed(PLAIN + DAMAGED[damage])


def test_those_of_a_draft_model_are_not_known() -> None:
    data = PLAIN + points("hybrid", [3])[:-1] + b"\1"
    with pytest.raises((UnsupportedError, FormatError)):
        parsed(data)


def test_only_a_sequence_has_them() -> None:
    whole = native(replace(state("hybrid", 9), seq=None))
    with pytest.raises((FormatError, UnsupportedError)):
        parsed(whole + POINTS)


@given(st.integers(0, len(PLAIN + POINTS) - 1), st.integers(1, 255))
def test_no_flipped_byte_is_worse_than_refused(at: int, flip: int) -> None:
    data = bytearray(PLAIN + POINTS)
    data[at] ^= flip
    try:
        found = parsed(bytes(data))
    except (FormatError, UnsupportedError):
        return
    assert found.end <= len(data)
    assert all(one.offset + one.nbytes <= len(data) for one in found.restore_points)
