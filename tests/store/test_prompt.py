"""Keys, chunks and media."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state.store import Media
from llama_state.store.prompt import Keys, Prompt, Token, common, ids_of

IMAGE = Media(b"a" * 32, 9)
OTHER = Media(b"b" * 32, 9)

TOKENS: st.SearchStrategy[list[Token]] = st.lists(
    st.one_of(st.integers(0, 5), st.sampled_from([IMAGE, OTHER])), max_size=40
)


def keys(prompt: Prompt, size: int, secret: bytes | None = None) -> list[bytes]:
    """The keys of the chunks of a prompt."""
    made, at, found = Keys(secret), b"root", []
    for first, last in prompt.chunks(0, size):
        n = prompt.position(last) - prompt.position(first)
        at = made.next(at, n, prompt.words(first, last))
        found.append(at)
    return found


@given(TOKENS, st.integers(1, 12))
def test_chunks_hold_all(tokens: list[Token], size: int) -> None:
    """Chunks follow one another, hold every token once, and end inside of no media."""
    prompt = Prompt.of(tokens)
    chunks = list(prompt.chunks(0, size))
    assert [t for first, last in chunks for t in prompt.tokens[first:last]] == tokens
    for first, last in chunks[:-1]:
        n_positions = prompt.position(last) - prompt.position(first)
        assert size <= n_positions < size + IMAGE.n_positions


@given(TOKENS, TOKENS, st.integers(1, 6))
def test_equal_keys(a: list[Token], b: list[Token], size: int) -> None:
    """Two prompts have a key in common where, and only where, their tokens up to it are equal."""
    pairs = [(Prompt.of(tokens), list(Prompt.of(tokens).chunks(0, size))) for tokens in (a, b)]
    ends = [[prompt.tokens[:last] for _, last in chunks] for prompt, chunks in pairs]
    found = [keys(prompt, size) for prompt, _ in pairs]
    for i, key in enumerate(found[0]):
        assert (key in found[1]) == (ends[0][i] in ends[1])


@given(TOKENS)
def test_positions(tokens: list[Token]) -> None:
    """A position and the index of its token lead to each other."""
    prompt = Prompt.of(tokens)
    for index in range(len(prompt) + 1):
        assert prompt.index(prompt.position(index)) == index
    assert len(ids_of(prompt.words(0, len(prompt)))) == len(prompt)


@given(TOKENS, TOKENS)
def test_common(a: list[Token], b: list[Token]) -> None:
    """Common words hold as many whole tokens as the prompts have in common."""
    one, two = Prompt.of(a), Prompt.of(b)
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if expected is None:
        expected = min(len(a), len(b))
    shared = common(one.words(0, len(one)), two.words(0, len(two)))
    assert one.tokens_in(0, shared) == expected


def test_secret() -> None:
    """Another key gives other names, and a short one is refused."""
    prompt = Prompt.of(range(20))
    assert not set(keys(prompt, 4)) & set(keys(prompt, 4, b"s" * 16))
    with pytest.raises(ValueError, match="16 bytes or more"):
        Keys(b"short")


@pytest.mark.parametrize(
    ("tokens", "error", "text"),
    [
        ([1, -2], ValueError, "-2"),
        ([1, "a"], TypeError, "'a'"),
        ([True], TypeError, "True"),
        ([1.5], TypeError, "1.5"),
        ([1 << 40], ValueError, str(1 << 40)),
    ],
)
def test_no_tokens(tokens: list[Token], error: type[Exception], text: str) -> None:
    """What is no token is named."""
    with pytest.raises(error, match=text):
        Prompt.of(tokens)
