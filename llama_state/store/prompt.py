"""The tokens of a prompt, with the media between them, and the keys of its prefixes.

``docs/formats.md`` says how keys are computed.
"""

from __future__ import annotations

import hashlib
import hmac
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import index
from struct import Struct
from typing import Final, TypeAlias, cast

from .._io.arguments import checked
from ..layout.formats import MAX_POSITION

KEY_SIZE: Final = 32
MIN_SECRET: Final = 16
_LINK = Struct("<I")
# What stands for media in a list of token ids, which are never negative.
_MEDIA: Final = -1
_MAX_DIGEST: Final = 64
# The mark, the positions, a SHA-256.
_MEDIA_WORDS: Final = 10


@checked
@dataclass(frozen=True, slots=True)
class Media:
    """An image or a sound in a prompt.

    Attributes:
        digest: What tells it from every other one, say the SHA-256 of its bytes and of the
            settings with which it is encoded: 16 to 64 bytes.
        n_positions: Positions that it takes in the sequence.
    """

    digest: bytes
    n_positions: int

    def __post_init__(self) -> None:
        if not MIN_SECRET <= len(self.digest) <= _MAX_DIGEST:
            raise ValueError(f"a digest of {len(self.digest)} bytes: give 16 to {_MAX_DIGEST}")
        if not 1 <= self.n_positions <= MAX_POSITION:
            raise ValueError(f"n_positions is {self.n_positions}: media take 1 or more")


Token: TypeAlias = "int | Media"  # noqa: S105


@dataclass(frozen=True)
class Prompt:
    """The tokens of a sequence, from its first position on.

    Every call makes one of all tokens of a conversation, of which few are new. So no line of
    Python is run for each of them.

    Attributes:
        tokens: Token ids, and media: of these types, not of subclasses.
    """

    tokens: tuple[Token, ...]

    @classmethod
    def of(cls, tokens: Iterable[Token]) -> Prompt:
        """Return the prompt of *tokens*.

        Raises:
            TypeError: One is neither an integer nor media.
            ValueError: One is negative, or too large.
        """
        if isinstance(tokens, (str, bytes, bytearray, Mapping, Set)):
            raise TypeError(
                f"tokens must be token ids and Media, not {type(tokens).__name__}: turn text into"
                " tokens with Model.tokenize()"
            )
        listed = tuple(tokens)
        if {*map(type, listed)} - {int, Media}:
            listed = tuple(map(_plain, listed))
        prompt = cls(listed)
        ids = [t for t in listed if type(t) is int] if prompt.has_media else prompt.ids
        if ids and not 0 <= min(ids) <= max(ids) <= MAX_POSITION:
            wrong = next(token for token in ids if not 0 <= token <= MAX_POSITION)
            raise ValueError(f"token id {wrong} is not one (0 to {MAX_POSITION})")
        return prompt

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def has_media(self) -> bool:
        """Whether there is anything but token ids."""
        return Media in map(type, self.tokens)

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids; empty where there are media."""
        return () if self.has_media else cast("tuple[int, ...]", self.tokens)

    @cached_property
    def _ids_as_words(self) -> bytes:
        return array("i", self.ids).tobytes()

    @cached_property
    def _ends(self) -> Sequence[int]:
        if not self.has_media:
            return range(1, len(self) + 1)
        return list(accumulate(map(_n_positions, self.tokens)))

    @property
    def n_positions(self) -> int:
        """Positions that the whole takes."""
        return self.position(len(self))

    def position(self, index: int) -> int:
        """Return the position of the token at *index*."""
        return self._ends[index - 1] if index else 0

    def index(self, position: int) -> int:
        """Return how many tokens lie wholly before *position*."""
        if position >= self.n_positions:
            return len(self)
        found = bisect_left(self._ends, position)
        return found + (found < len(self) and self._ends[found] == position)

    def words(self, start: int, end: int) -> bytes:
        """Return the tokens from index *start* to *end* as they are hashed and stored."""
        if not self.has_media:
            return self._ids_as_words[4 * start : 4 * end]
        return b"".join(map(_words, self.tokens[start:end]))

    def tokens_in(self, start: int, n_words: int) -> int:
        """Return how many tokens from index *start* on the first *n_words* words hold whole."""
        if not self.has_media:
            return min(n_words, len(self) - start)
        found = 0
        for token in self.tokens[start:]:
            n_words -= _MEDIA_WORDS if isinstance(token, Media) else 1
            if n_words < 0:
                break
            found += 1
        return found

    def chunks(self, start: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of indices from *start* on, of *size* positions each; the last is shorter.

        A chunk that would end inside of media ends behind them.
        """
        while start < len(self):
            end = bisect_left(self._ends, self.position(start) + size) + 1
            end = min(max(end, start + 1), len(self))
            yield start, end
            start = end


def common(a: bytes, b: bytes) -> int:
    """Return how many leading 32-bit words of two lists of words are equal."""
    n = min(len(a), len(b)) // 4
    if a[: 4 * n] == b[: 4 * n]:
        return n
    low, high = 0, n
    while low < high:
        middle = (low + high + 1) // 2
        if a[: 4 * middle] == b[: 4 * middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Keys:
    """Computes the keys of prefixes: a chain, each from the one before and its own tokens.

    Args:
        secret: A key makes names that say nothing to who does not have it; None for none.

    Raises:
        ValueError: The secret is shorter than 16 bytes.
    """

    def __init__(self, secret: bytes | None) -> None:
        self.check(*([] if secret is None else [secret]))
        self._secret = secret

    @staticmethod
    def check(*secrets: bytes) -> None:
        """Raise ValueError where a secret is too short."""
        if any(len(secret) < MIN_SECRET for secret in secrets):
            raise ValueError(f"a key must have {MIN_SECRET} bytes or more: secrets.token_bytes(32)")

    def root(self, identity: bytes) -> bytes:
        """Return the key of the empty prefix, of what a namespace is described by."""
        return self._hash(b"root" + identity)

    def next(self, parent: bytes, n_positions: int, words: bytes) -> bytes:
        """Return the key of a prefix, given that of its beginning and the tokens that follow."""
        return self._hash(parent + _LINK.pack(n_positions) + words)

    def onward(self, key: bytes) -> bytes:
        """Return what stands for a prefix of a shared key as the parent of what is under this one.

        So nobody with the shared key alone can name what goes on from there, list it, or tell from
        which prefix it does.
        """
        return self._hash(b"onward" + key)

    def _hash(self, data: bytes) -> bytes:
        if self._secret is None:
            return hashlib.sha256(data).digest()
        return hmac.new(self._secret, b"prefix" + data, hashlib.sha256).digest()


def _plain(token: Token) -> Token:
    """Return a token as an int, or as Media."""
    if isinstance(token, Media):
        return Media(token.digest, token.n_positions)
    if isinstance(token, bool) or not hasattr(token, "__index__"):
        raise TypeError(f"{token!r} is neither a token id nor Media")
    return index(token)


def _n_positions(token: Token) -> int:
    return token.n_positions if isinstance(token, Media) else 1


def _words(token: Token) -> bytes:
    if not isinstance(token, Media):
        return array("i", [token]).tobytes()
    digest = hashlib.sha256(token.digest).digest()
    return array("i", [_MEDIA, token.n_positions]).tobytes() + digest


def n_positions_of(words: bytes) -> int | None:
    """Return the positions that a list of words takes; None where it is none of any tokens."""
    listed = array("i")
    listed.frombytes(words)
    if _MEDIA not in listed:
        return len(listed)
    total, at = 0, 0
    while at < len(listed):
        is_media = listed[at] == _MEDIA
        if at + (_MEDIA_WORDS if is_media else 1) > len(listed):
            return None
        total += listed[at + 1] if is_media else 1
        at += _MEDIA_WORDS if is_media else 1
    return total


def ids_of(words: bytes) -> list[int | None]:
    """Return the tokens of a list of words: their ids, and None for media."""
    listed = array("i")
    listed.frombytes(words)
    found: list[int | None] = []
    at = 0
    while at < len(listed):
        is_media = listed[at] == _MEDIA
        found.append(None if is_media else listed[at])
        at += _MEDIA_WORDS if is_media else 1
    return found
