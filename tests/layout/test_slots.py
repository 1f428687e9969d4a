"""The packed prompts of llama-server's slot files."""

from __future__ import annotations

from array import array
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state.errors import FormatError, TruncatedError, VersionError
from llama_state.layout import (
    MediaChunk,
    is_packed,
    listed_tokens,
    parse_file_header,
    parse_slot_tokens,
)
from tests.layout.blobs import u32
from tests.layout.slots import audio, image, packed

TEXT = [1, 259, 107, 108]
MIXED = [5, *[-1] * 12, 6, 7, *[-1] * 7]
MEDIA = {1: image(4, 3, "a hash"), 15: audio(7, "another")}


def test_text_only() -> None:
    """The prompt is found, and nothing else."""
    words = packed(TEXT)
    assert is_packed(words)
    found = parse_slot_tokens(words)
    assert (found.version, list(found.tokens), found.media) == (1, TEXT, ())
    assert parse_slot_tokens(words.tobytes()) == found


@given(st.lists(st.integers(0, 2**31 - 1), max_size=50))
def test_any_text(tokens: list[int]) -> None:
    """What was packed is unpacked."""
    assert list(parse_slot_tokens(packed(tokens)).tokens) == tokens


@pytest.mark.parametrize("version", [1, 2])
def test_media(version: int) -> None:
    """Images and sounds are distinguished, with the tokens that stand for them."""
    media = {1: image(4, 3, "a hash", version=version), 15: audio(7, "another", version=version)}
    words = packed(MIXED, media)
    found = parse_slot_tokens(words)
    assert list(found.tokens) == MIXED
    assert [chunk.start for chunk in found.media] == [1, 15]
    assert [chunk.n_tokens for chunk in found.media] == [12, 7]
    assert [(c.kind, c.grid, c.id) for c in found.media] == [
        ("image", (4, 3), "a hash"),
        ("audio", None, "another"),
    ]
    for chunk, raw in zip(found.media, media.values(), strict=True):
        assert words.tobytes()[chunk.offset : chunk.offset + chunk.nbytes] == raw


def test_media_side_by_side() -> None:
    """Of two images without text between, the second starts where the first ends."""
    media = {0: image(1, 2, "one"), 2: image(1, 3, "two")}
    found = parse_slot_tokens(packed([-1] * 5, media))
    assert [(chunk.start, chunk.n_tokens) for chunk in found.media] == [(0, 2), (2, 3)]


def test_descriptions_that_are_not_known() -> None:
    """A chunk of another version, or cut off, is there, but not described."""
    for chunk in (image(4, 3, "x", version=3), image(4, 3, "x")[:30], b"\1", audio(7, "x")[:25]):
        (found,) = parse_slot_tokens(packed([-1] * 12, {0: chunk})).media
        assert (found.start, found.n_tokens, found.nbytes) == (0, 12, len(chunk))
        assert (found.kind, found.grid, found.id) == (None, None, None)
    assert MediaChunk(0, 1, 2, 3).kind is None


def test_an_id_is_cut() -> None:
    """However long a name claims to be, little of it is kept."""
    (found,) = parse_slot_tokens(packed([-1], {0: image(1, 1, "n" * 10_000)})).media
    assert found.id == "n" * 256


def test_plain_lists_are_not_packed() -> None:
    """A token list is packed only where it starts with -1."""
    assert not is_packed(array("i"))
    assert not is_packed(array("i", TEXT))
    with pytest.raises(FormatError, match="not a packed"):
        parse_slot_tokens(array("i", TEXT))


def test_versions() -> None:
    """Another version is named."""
    with pytest.raises(VersionError) as caught:
        parse_slot_tokens(u32(0xFFFFFFFF, 2, 0, 0))
    assert (caught.value.found, caught.value.expected, caught.value.offset) == (2, 1, 4)


@pytest.mark.parametrize(
    ("tokens", "media"),
    [
        ([5, -1, 6], {}),  # a media token without media
        ([5, -1, 6], {0: image(1, 1, "x")}),  # media at a text token
        ([5, -1, 6], {3: image(1, 1, "x")}),  # media behind the end
        ([-1, -1, 5], {1: image(1, 1, "x")}),  # a run that starts before its media
        ([-1, 5, -1], {2: image(1, 1, "x"), 0: image(1, 1, "y")}),  # not in order
        ([5, -2, 6], {}),  # no token at all
        ([-1], {0: b""}),  # an empty description
    ],
)
def test_contradictions(tokens: list[int], media: dict[int, bytes]) -> None:
    """Media and the tokens that stand for them must agree."""
    with pytest.raises(FormatError):
        parse_slot_tokens(packed(tokens, media))


def test_every_cut() -> None:
    """A list that is cut off anywhere is refused."""
    raw = packed(MIXED, MEDIA).tobytes()
    end = len(raw) - len(raw) % 4
    for length in range(0, end - 4, 1):
        with pytest.raises(FormatError):
            parse_slot_tokens(raw[:length])
    with pytest.raises(FormatError, match="bytes after"):
        parse_slot_tokens(raw + bytes(4))
    with pytest.raises(TruncatedError, match="4294967295 tokens"):
        parse_slot_tokens(u32(0xFFFFFFFF, 1, 0xFFFFFFFF, 0))


def test_any_flip() -> None:
    """A changed word is read or refused, never anything else."""
    words = packed(MIXED, MEDIA)
    random = Random(1)
    for at in range(len(words)):
        for value in (0, -1, 2**31 - 1, random.randrange(-(2**31), 2**31)):
            changed = array("i", words)
            changed[at] = value
            try:
                found = parse_slot_tokens(changed)
            except FormatError:
                continue
            assert all(chunk.nbytes < 4 * len(words) for chunk in found.media)


@pytest.mark.parametrize(("magic", "slot_file"), [(b"qsgg", True), (b"nsgg", False)])
def test_listed_tokens(magic: bytes, slot_file: bool) -> None:
    """What a file says of its prompt: -1 marks a packed list in sequence files only."""
    version = 4 if slot_file else 11
    for words in (array("i", TEXT), packed(TEXT), packed(MIXED, MEDIA)):
        data = magic + u32(version, len(words)) + words.tobytes()
        prompt = listed_tokens(data, parse_file_header(data))
        assert prompt.words == words
        unpacked = parse_slot_tokens(words) if slot_file and is_packed(words) else None
        assert prompt.slot == unpacked
        assert prompt.listed == (unpacked.tokens if unpacked else words)
        assert prompt.media == (unpacked.media if unpacked else ())
        assert prompt.tokens == (() if prompt.media else tuple(prompt.listed))
