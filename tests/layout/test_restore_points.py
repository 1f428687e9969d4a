"""Restore points behind the payload of a slot file: found, read, and never invented."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state import FormatError, UnsupportedError, inspect_file
from llama_state.errors import StateError, TruncatedError, VersionError
from llama_state.inspection.summary import describe
from llama_state.inspection.text import text as text_of
from llama_state.layout import RestorePoint, Span, parse_file_header
from llama_state.layout.appended import FilePayload, pack_points, packed_size, parse_payload
from tests.layout.blobs import State, text
from tests.layout.slots import packed
from tests.layout.statefiles import native, slot, write

KINDS = [
    "kv",
    "iswa",
    "recurrent",
    "hybrid",
    "hybrid-iswa",
    "hybrid-idx",
    "dsa-iswa",
    "msa",
    "dsv4",
]
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
    header = parse_file_header(data)
    return parse_payload(data, header, version=header.session_version)


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
        assert one.blob == replace(state(kind, n_tokens), partial=True).blob()
        assert one.span == Span(0, n_tokens - 1)


@given(moments=st.lists(st.integers(1, 9), max_size=3))
def test_they_are_written_as_they_are_read(moments: list[int]) -> None:
    blobs = [replace(state("hybrid", n), partial=True).blob() for n in moments]
    listed = list(map(RestorePoint, moments, blobs))
    expected = points("hybrid", moments) if moments else b""
    assert b"".join(map(bytes, pack_points(listed))) == expected
    assert packed_size(listed) == len(expected)


PLAIN = slot(state("hybrid", 9), packed(range(9)))
POINTS = points("hybrid", [3, 5])
DAMAGED: dict[str, tuple[bytes, type[StateError], str]] = {
    "cut": (POINTS[:-1], TruncatedError, "further blobs"),
    "cut early": (POINTS[:10], TruncatedError, "restore points"),
    "longer": (POINTS + b"\0", FormatError, "1 bytes after"),
    "another magic": (b"SCKQ" + POINTS[4:], FormatError, "first bytes are damaged"),
    "another version": (b"SCKP\2" + POINTS[5:], VersionError, "restore points"),
    "too many": (POINTS[:8] + b"\xff" * 4 + POINTS[12:], TruncatedError, "restore points"),
    "none": (POINTS[:12], TruncatedError, "restore points"),
    "no blob": (POINTS.replace(b"\xd8\x3c\x14\xaf", b"\xd8\x3c\x14\xae"), FormatError, "after 3"),
    "too long": (POINTS[:28] + b"\xff" * 8 + POINTS[36:], TruncatedError, "blob"),
    "other positions": (POINTS[:24] + b"\1\0\0\0" + POINTS[28:], FormatError, "last position"),
    "of no tokens": (POINTS[:12] + bytes(8) + POINTS[20:], FormatError, "n_tokens"),
    "of another": (points("iswa", [3]), FormatError, "no partial state of this sequence"),
    "later": (points("hybrid", [12]), FormatError, "not reached"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_their_first_bytes_are_damaged(kind: str) -> None:
    """They are found all the same, by the heads of their blobs."""
    plain = slot(state(kind, 9), packed(range(9)))
    with pytest.raises(FormatError, match="first bytes are damaged") as caught:
        parsed(plain + b"SCKQ" + points(kind, [3])[4:])
    assert caught.value.offset == len(plain)


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_damaged_is_refused(damage: str, tmp_path: Path) -> None:
    """By what is wrong with the restore points, and the state itself is shown all the same."""
    trailer, error, words = DAMAGED[damage]
    with pytest.raises(error, match=words) as caught:
        parsed(PLAIN + trailer)
    assert "streams" not in str(caught.value)
    found = inspect_file(write(tmp_path, PLAIN + trailer))
    assert str(found.problem) == str(caught.value)
    assert found.layout == parsed(PLAIN).layout


def test_they_are_shown(tmp_path: Path) -> None:
    found = inspect_file(write(tmp_path, PLAIN + POINTS))
    about = describe(found)
    assert [point["n_tokens"] for point in about["restore_points"]] == [3, 5]
    assert about["bytes"]["restore points"] == len(POINTS)
    assert sum(about["bytes"].values()) == len(PLAIN + POINTS)
    assert "after 5 tokens: positions 0 to 4" in text_of(found)


def test_those_of_a_draft_model_are_not_known() -> None:
    data = PLAIN + points("hybrid", [3])[:-1] + b"\1"
    with pytest.raises(UnsupportedError, match="draft model"):
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
    assert packed_size(found.restore_points) == len(data) - found.end
