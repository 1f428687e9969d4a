"""Checkpoints of llama-server's slot files: their tokens, images and sounds."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest

from llama_state.checkpoint.checkpoint import Checkpoint
from llama_state.checkpoint.container import pack
from llama_state.errors import FormatError, VersionError
from llama_state.inspection import inspect_file
from tests.layout.blobs import State, text
from tests.layout.slots import audio, image, packed
from tests.layout.statefiles import slot, write

SEQUENCE = State("kv", cells=text(5, 3), seq=3)
WHOLE = State("kv", cells=text(5, 0), arch="llama")
TEXT = (1, 259, 107, 108)
MIXED = (5, -1, -1, -1, 6, -1)
MEDIA = {1: image(3, 1, "cat"), 5: audio(1, "bark")}


def of_slot(folder: Path, words: array[int]) -> Checkpoint:
    return Checkpoint.from_native(write(folder, slot(SEQUENCE, words), "slot"))


def given(packed_tokens: Sequence[int], tokens: Sequence[int] = ()) -> Checkpoint:
    return Checkpoint(
        SEQUENCE.blob(),
        kind="sequence",
        session_version=SEQUENCE.version,
        source=3,
        tokens=tokens,
        packed_tokens=packed_tokens,
    )


def copies(one: Checkpoint) -> list[Checkpoint]:
    """What containers and pickles make of a checkpoint."""
    pickled = pickle.loads(pickle.dumps(one, 5))  # noqa: S301 - our own
    return [one, Checkpoint.from_bytes(one.to_bytes()), pickled]


def test_text_is_tokens(tmp_path: Path) -> None:
    """The tokens of a prompt are there; the file that is written again is the same."""
    for one in copies(of_slot(tmp_path, packed(TEXT))):
        assert (one.tokens, one.media) == (TEXT, ())
        assert one.packed_tokens == tuple(packed(TEXT))
        assert "4 tokens, " in repr(one)
        one.to_native(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "slot").read_bytes()
    assert one == of_slot(tmp_path, packed(TEXT)) == given(one.packed_tokens)
    assert one != given((), TEXT)  # which is another file


def test_media_are_no_tokens(tmp_path: Path) -> None:
    """Tokens of text would not give the state: the images and sounds are named instead."""
    for one in copies(of_slot(tmp_path, packed(MIXED, MEDIA))):
        assert one.tokens == ()
        assert [(chunk.kind, chunk.n_tokens) for chunk in one.media] == [("image", 3), ("audio", 1)]
        assert one.slot is not None
        assert tuple(one.slot.tokens) == MIXED
        assert "6 tokens with 2 media, " in repr(one)
        one.to_native(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "slot").read_bytes()


def test_inspected_media_are_the_same(tmp_path: Path) -> None:
    """``inspect_file`` names the same images and sounds, of the file and of its checkpoint."""
    one = of_slot(tmp_path, packed(MIXED, MEDIA))
    one.save(tmp_path / "checkpoint")
    for name in ("slot", "checkpoint"):
        found = inspect_file(tmp_path / name)
        assert found.media == one.media
        assert tuple(found.tokens) == MIXED
    assert inspect_file(write(tmp_path, slot(SEQUENCE, packed(TEXT)))).media == ()


def test_damaged_lists_are_refused(tmp_path: Path) -> None:
    """Where they are, in the file; a list of a later version is named as such."""
    words = packed(MIXED, MEDIA)
    words[5] = 6
    with pytest.raises(FormatError, match="token -1 in a packed") as caught:
        of_slot(tmp_path, words)
    assert (caught.value.offset, caught.value.path) == (12 + 8, str(tmp_path / "slot"))
    with pytest.raises(FormatError, match="packed_tokens: token -1 in"):
        given(words)
    words = packed(TEXT)
    words[1] = 2
    with pytest.raises(VersionError) as version:
        of_slot(tmp_path, words)
    assert (version.value.found, version.value.offset) == (2, 12 + 4)


def test_tokens_and_packed_tokens_agree() -> None:
    """Both can be given, as in a copy, if they are the same."""
    assert given(packed(TEXT), TEXT).tokens == TEXT
    for words in (packed(TEXT[1:]), packed(MIXED, MEDIA)):
        with pytest.raises(FormatError, match="not those of packed_tokens"):
            given(words, TEXT)


def test_a_forged_container_is_described(tmp_path: Path) -> None:
    """A list that no checkpoint could have had is a problem of the file, not a crash."""
    one = given(packed(TEXT))
    parts = pack(one._metadata, one.payload, tokens=packed(TEXT).tobytes()[:-4], logits=b"")
    path = write(tmp_path, b"".join(parts))
    found = inspect_file(path)
    assert (found.checkpoint, list(found.tokens)) == (None, [])
    assert "packed_tokens: " in str(found.problem)
    with pytest.raises(FormatError, match="packed_tokens: "):
        Checkpoint.load(path)


def test_plain_lists_do_not_become_packed_ones(tmp_path: Path) -> None:
    """A list that starts with -1 would be taken for a packed one, but in a session file."""
    one = given((), (-1, 259))
    with pytest.raises(FormatError, match="starts with -1"):
        one.to_native(tmp_path / "native")
    assert not (tmp_path / "native").exists()
    whole = Checkpoint(WHOLE.blob(), kind="whole", session_version=11, tokens=(-1, 259))
    whole.to_native(tmp_path / "native")
    found = Checkpoint.from_native(tmp_path / "native")
    assert (found.tokens, found.packed_tokens) == ((-1, 259), ())
