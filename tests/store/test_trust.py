"""What objects are under which key, and what of a header is looked at before it is verified."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama_state as ls
from llama_state.store import Media
from llama_state.store.lookup import Lookup
from llama_state.store.objects import NO_PARENT, Name, pack, parse
from llama_state.store.places.memory import MemoryBackend
from llama_state.store.prompt import Prompt, Token, n_positions_of
from llama_state.store.trust import Trust

ALICE, BOB, PUBLIC = (hashlib.sha256(text).digest() for text in (b"alice", b"bob", b"public"))
TOKENS: st.SearchStrategy[list[Token]] = st.lists(
    st.one_of(st.integers(0, 5), st.builds(Media, st.just(bytes(16)), st.integers(1, 9))),
    max_size=20,
)


def keys(trust: Trust, prompt: Prompt) -> list[tuple[bytes, bytes, int]]:
    """Of chunks of one token: parent, key and end."""
    at, found = trust.root(b"{}"), []
    for n in range(len(prompt)):
        start, end = prompt.position(n), prompt.position(n + 1)
        parent = trust.onward(at, start, prompt)
        at = trust.at(end).keys.next(parent, end - start, prompt.words(n, n + 1))
        found.append((parent, at, end))
    return found


@given(TOKENS, st.integers(1, 20))
def test_what_is_shared(tokens: list[Token], n: int) -> None:
    """Two tenants name what ends in the shared part alike, and nothing of what is behind it."""
    prompt = Prompt.of(tokens)
    one, two = (keys(Trust(key, PUBLIC, n), prompt) for key in (ALICE, BOB))
    shared = Trust(ALICE, PUBLIC, n).shared_part(prompt)
    assert one[:shared] == two[:shared] == keys(Trust(PUBLIC), prompt)[:shared]
    assert all(end <= n for *_, end in one[:shared])
    assert all(end > n for *_, end in one[shared:])
    behind = [
        {key for parent, key, _ in each[shared:] for key in (parent, key)} for each in (one, two)
    ]
    assert not behind[0] & behind[1]
    assert not behind[0] & {key for _, key, _ in keys(Trust(PUBLIC), prompt)}


@given(TOKENS)
def test_positions(tokens: list[Token]) -> None:
    """Words tell how many positions they take."""
    prompt = Prompt.of(tokens)
    assert n_positions_of(prompt.words(0, len(prompt))) == prompt.n_positions


def test_half_of_an_image() -> None:
    """Words that end inside of an image are those of no tokens."""
    words = Prompt.of([1, Media(bytes(16), 5)]).words(0, 2)
    assert n_positions_of(words) == 6
    assert n_positions_of(words[:-4]) is None
    assert n_positions_of(words[:8]) is None


def made(
    trust: Trust, end: int, tokens: tuple[int, ...] = (1, 2, 3, 4), n_positions: int = 4
) -> tuple[Name, bytes]:
    """An object of some tokens."""
    words, domain = struct.pack(f"<{len(tokens)}i", *tokens), trust.at(end)
    key = domain.keys.next(bytes(32), n_positions, words)
    name = Name(bytes(32), key, n_positions, "R")
    parts = pack(
        name,
        bytes(32),
        words,
        [b"payload"],
        domain.seal,
        first=end - 4,
        end=end,
        session_version=11,
        keyed=True,
    )
    return name, b"".join(map(bytes, parts))


@given(st.integers(0, 167), st.integers(1, 255), st.sampled_from([4, 8, 9, 20]))
def test_any_byte_of_a_header(at: int, change: int, end: int) -> None:
    """Nothing in a header can be another one: root, chain, positions, tokens, digests, flags."""
    trust = Trust(ALICE, PUBLIC, 8)
    name, data = made(trust, end)
    lookup = Lookup(MemoryBackend(1), trust)
    assert lookup.parsed(name, data).end == end
    with pytest.raises(ls.FormatError):
        lookup.parsed(name, data[:at] + bytes([data[at] ^ change]) + data[at + 1 :])


@pytest.mark.parametrize(
    ("tokens", "n_positions"), [((), 0), ((1,), 0), ((), 1), ((1, 2), 1), ((1,), 2), ((-1, 1), 2)]
)
def test_tokens_and_positions(tokens: tuple[int, ...], n_positions: int) -> None:
    """Tokens take as many positions as an object says, and one or more; whoever has made it."""
    trust = Trust(ALICE, PUBLIC, 8)
    for end in (8, 9):
        name, data = made(trust, end, tokens, n_positions)
        with pytest.raises(ls.FormatError, match="of another name"):
            Lookup(MemoryBackend(1), trust).parsed(name, data)
    name, data = made(trust, 8, (1, 2), 2)
    assert Lookup(MemoryBackend(1), trust).parsed(name, data).start == 6


@pytest.mark.parametrize("flags", [3, 0x81, 0xFF])
def test_unknown_flags(flags: int) -> None:
    """Flags that are not known are refused, also where they are authenticated."""
    seal = Trust(ALICE).at(4).seal
    _, data = made(Trust(ALICE), 4)
    fields = data[:11] + bytes([flags]) + data[12:152]
    forged = fields + seal([fields, data[168:184]]) + data[168:]
    with pytest.raises(
        ls.FormatError, match=f"unknown flags in the header of an object: {flags:#x}"
    ):
        parse(forged, seal, keyed=True)


def test_the_root_is_shared() -> None:
    """The description of a namespace is under the shared key: its first position is none."""
    alice, bob = (Trust(key, PUBLIC, 8) for key in (ALICE, BOB))
    root = alice.root(b"{}")
    name = Name(NO_PARENT, root, 0, "N")
    options = {"first": 0, "end": 0, "session_version": 0, "keyed": True}
    parts = pack(name, root, b"", [b"{}"], alice.at(0).seal, **options)  # type: ignore[arg-type]
    data = b"".join(map(bytes, parts))
    for trust in (bob, Trust(PUBLIC)):
        assert trust.root(b"{}") == root
        assert Lookup(MemoryBackend(1), trust).parsed(name, data).root == root
    with pytest.raises(ls.ChecksumError):
        Lookup(MemoryBackend(1), Trust(BOB)).parsed(name, data)
