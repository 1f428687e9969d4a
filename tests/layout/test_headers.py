"""The head of session and sequence files."""

from __future__ import annotations

from array import array
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state.errors import FormatError, TruncatedError, VersionError
from llama_state.layout import (
    SEQUENCE_VERSION,
    FileHeader,
    pack_file_header,
    parse_file_header,
    unpack_tokens,
)
from tests.layout.blobs import u32

Kind = Literal["whole", "sequence"]
TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20).map(lambda ids: array("i", ids))
VERSIONS = [("whole", 9), ("whole", 10), ("whole", 11)] + [("sequence", v) for v in (2, 3, 4)]


def test_bytes_on_disk() -> None:
    """The magic numbers, then version, count and tokens."""
    assert pack_file_header("whole", 11, array("i", [7, -1])) == (
        b"nsgg" + u32(11, 2, 7, 0xFFFFFFFF)
    )
    assert pack_file_header("sequence", 4) == b"qsgg" + u32(4, 0)
    assert pack_file_header("sequence", 4, u32(5, 6)) == b"qsgg" + u32(4, 2, 5, 6)


@given(st.sampled_from(VERSIONS), TOKENS, st.binary(max_size=9))
def test_round_trip(what: tuple[Kind, int], tokens: array[int], payload: bytes) -> None:
    """What was packed is parsed, whatever follows."""
    kind, version = what
    head = pack_file_header(kind, version, tokens)
    header = parse_file_header(head + payload)
    assert header == FileHeader(kind, version, len(tokens), len(head))
    assert unpack_tokens(head + payload, header) == tokens
    expected = version if kind == "whole" else {s: v for v, s in SEQUENCE_VERSION.items()}[version]
    assert header.session_version == expected


def test_only_the_start_is_needed() -> None:
    """The lengths are compared with the size of the file, not with what was read of it."""
    head = pack_file_header("whole", 11, array("i", range(100)))
    assert parse_file_header(head[:12], size=412).payload_offset == 412
    with pytest.raises(TruncatedError) as caught:
        parse_file_header(head[:12], size=411)
    assert (caught.value.need, caught.value.have) == (412, 411)
    with pytest.raises(TruncatedError):
        unpack_tokens(head[:411], parse_file_header(head))


@pytest.mark.parametrize("length", range(12))
def test_too_short(length: int) -> None:
    """Less than three integers is no header."""
    head = pack_file_header("whole", 11)
    with pytest.raises(TruncatedError):
        parse_file_header(head[:length])
    with pytest.raises(TruncatedError):
        parse_file_header(head, size=length)


def test_a_count_beyond_the_file() -> None:
    """A token count is not believed."""
    with pytest.raises(TruncatedError, match="4294967295 tokens"):
        parse_file_header(b"nsgg" + u32(11, 0xFFFFFFFF) + bytes(100))


def test_other_files() -> None:
    """Other magic numbers, and versions of the other kind, are refused."""
    with pytest.raises(FormatError, match=r"not a .* state file"):
        parse_file_header(b"GGUF" + bytes(8))
    for kind, magic, version in (("whole", b"nsgg", 4), ("sequence", b"qsgg", 11)):
        with pytest.raises(VersionError) as caught:
            parse_file_header(magic + u32(version, 0))
        assert (caught.value.found, caught.value.offset) == (version, 4)
        # A caller that knows which version to expect compares it; a library writes its own.
        content = pack_file_header(kind, version)  # type: ignore[arg-type]
        assert parse_file_header(content, any_version=True).version == version


@pytest.mark.parametrize("tokens", [b"123", array("q", [1]), array("b", [1, 2, 3, 4])])
def test_tokens_are_int32(tokens: bytes | array[int]) -> None:
    """Items of another size would be read as other tokens."""
    with pytest.raises(ValueError, match="int32"):
        pack_file_header("whole", 11, tokens)
