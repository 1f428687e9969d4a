"""What a checkpoint is made of and what a file may hold obey one set of rules."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state import Checkpoint, Fingerprint, FormatError
from llama_state.checkpoint import container
from tests.layout.slots import packed

IDS = st.none() | st.integers(-2, 300) | st.just(2**31)
TEXTS = st.dictionaries(
    st.text(max_size=3) | st.just("n" * (1 << 14)) | st.just("n" * ((1 << 14) + 1)),
    st.text(max_size=3) | st.just("v" * ((1 << 14) + 1)) | st.just(1),
    max_size=2,
)
JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
META = st.dictionaries(st.text(max_size=3) | st.integers(8, 12), JSON | st.lists(JSON), max_size=3)
FIELDS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["whole", "sequence", "sequence", "both", "", 1]),
        "source": IDS,
        "session version": st.sampled_from([9, 9, 8, 10, 9.0, True]),
        "logits of": IDS,
        "fingerprint": st.fixed_dictionaries(dict.fromkeys(("model", "context", "unknown"), TEXTS)),
        "meta": META,
    }
)
WORDS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3)
PACKED = WORDS | st.lists(st.integers(0, 300), max_size=3).map(packed)
LOGITS = st.none() | st.integers(0, 9).map(bytes)


def made(fields: dict[str, Any], tokens: list[int], words: list[int], logits: Any) -> Checkpoint:
    return Checkpoint(
        b"state",
        kind=fields["kind"],
        session_version=fields["session version"],
        source=fields["source"],
        tokens=tokens,
        packed_tokens=words,
        logits=logits,
        logits_of=fields["logits of"],
        fingerprint=Fingerprint(**fields["fingerprint"]),
        meta=fields["meta"],
    )


def loaded(fields: dict[str, Any], tokens: list[int], words: list[int], logits: Any) -> Checkpoint:
    """Of a file that somebody wrote without asking the library whether it may."""
    written = {**fields, "packed tokens": bool(words)}
    data = container.pack(
        json.dumps(written).encode(),
        b"state",
        tokens=array("i", tokens or words),
        logits=logits or b"",
    )
    return Checkpoint.from_bytes(b"".join(data))


@given(FIELDS, WORDS, PACKED, LOGITS)
def test_what_is_made_can_be_loaded(
    fields: dict[str, Any], tokens: list[int], words: list[int], logits: bytes | None
) -> None:
    """Whatever can be made comes back equal from its file; the rest is refused at once."""
    try:
        checkpoint = made(fields, tokens, words, logits)
    except (ValueError, TypeError):
        return
    back = Checkpoint.from_bytes(checkpoint.to_bytes())
    assert back == checkpoint
    assert (back.tokens, back.packed_tokens) == (checkpoint.tokens, checkpoint.packed_tokens)
    assert (back.kind, back.source, back.meta) == (
        checkpoint.kind,
        checkpoint.source,
        checkpoint.meta,
    )
    assert (back.logits is None) == (checkpoint.logits is None)


@given(FIELDS, PACKED, st.booleans())
def test_what_is_not_loaded_cannot_be_made(
    fields: dict[str, Any], words: list[int], is_packed: bool
) -> None:
    """A file is refused exactly where the same fields are."""
    lists = ([], words) if is_packed else (words, [])
    try:
        back = loaded(fields, *lists, None)
    except FormatError:
        with pytest.raises((ValueError, TypeError)):
            made(fields, *lists, None)
    else:
        assert back == made(fields, *lists, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "sequence", "source": None},
        {"kind": "whole", "source": 0},
        {"fingerprint": Fingerprint({"weights": "0" * (1 << 15)})},
        {"fingerprint": Fingerprint({}, {}, {"a": 5})},  # type: ignore[dict-item]
        {"tokens": [1], "packed_tokens": [2]},
        {"logits": b""},
        {"logits": b"123"},
    ],
)
def test_what_only_the_file_refused(changes: dict[str, Any]) -> None:
    """Each of these could be saved, and then not loaded, or came back as something else."""
    fields = {"kind": "sequence", "source": 0, "session_version": 9, **changes}
    with pytest.raises(FormatError):
        Checkpoint(b"state", **fields)


def test_the_keys_of_meta_are_texts() -> None:
    """As JSON has them, and in the same order before and after a file."""
    checkpoint = Checkpoint(b"", kind="whole", session_version=9, meta={10: "a", 9: "b"})  # type: ignore[dict-item]
    assert checkpoint.meta == {"10": "a", "9": "b"}
    assert Checkpoint.from_bytes(checkpoint.to_bytes()) == checkpoint
