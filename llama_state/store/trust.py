"""Whose objects are whose: the keys of a store, and which positions each is for.

A store can have a key of its own, a tenant's, and one that it shares with others for the first
positions of every prompt. The end of an object decides: what ends there is under the shared key,
all that goes on from it under the tenant's. ``docs/formats.md`` says how each is used.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from .ciphers import Aes, hkdf
from .objects import Header, Seal, sealer
from .prompt import Keys, Prompt, n_positions_of

_NAMES: Final = b"llama_state names"
_OBJECTS: Final = b"llama_state objects"


@dataclass(frozen=True, slots=True)
class Domain:
    """What is made with one key.

    Attributes:
        keys: Computes keys of prefixes.
        seal: Digests objects.
    """

    keys: Keys
    seal: Seal

    def names(self, header: Header) -> bool:
        """Return whether the key in the name of an object is made of its parent and tokens."""
        name = header.name
        if name.kind == "N":
            return True
        # Words that take more positions would reach behind the end that decides of the domain.
        if not 0 < name.n_positions == n_positions_of(header.words):
            return False
        return self.keys.next(name.parent, name.n_positions, header.words) == name.key


class Trust:
    """The keys of a store.

    Args:
        key: The tenant's; None for names and digests without one.
        shared_key: That of the first positions.
        shared_tokens: How many these are; media count as the positions that they take.
        encrypted: Whether objects are encrypted. Their names are others then, so that none is
            taken for a damaged one of the other kind.

    Attributes:
        keyed: Whether there are keys.
        shared_end: The position behind the shared part; 0 where there is none.
        aes: Encrypts objects; None where nothing does.
        ciphers: What the keys of encrypted objects are derived from: the tenant's, the shared one.

    Raises:
        ValueError: A key is too short, or one of these is of no use without another.
        UnsupportedError: cryptography is not installed, which encryption needs.
    """

    def __init__(
        self,
        key: bytes | None,
        shared_key: bytes | None = None,
        shared_tokens: int = 0,
        *,
        encrypted: bool = False,
    ) -> None:
        _check(key, shared_key, shared_tokens, encrypted=encrypted)
        self.keyed: bool = key is not None
        self.shared_end = shared_tokens
        secrets = [each for each in (key, shared_key) if each is not None]
        Keys.check(*secrets)
        self.aes: Aes | None = Aes() if encrypted else None
        self.ciphers: tuple[bytes, ...] = (
            tuple(hkdf(each, b"", _OBJECTS) for each in secrets) if encrypted else ()
        )
        own, shared = (_named(each, encrypted) for each in (key, shared_key or key))
        self._own = Domain(Keys(own), sealer(own))
        self._shared = Domain(Keys(shared), sealer(shared))

    @property
    def is_split(self) -> bool:
        """Whether there are two keys."""
        return self.shared_end > 0

    def is_shared(self, end: int) -> bool:
        """Return whether an object that ends at a position is under the shared key."""
        return self.is_split and end <= self.shared_end

    def root(self, identity: bytes) -> bytes:
        """Return the key of the empty prefix, of what a namespace is described by."""
        return self._shared.keys.root(identity)

    def at(self, end: int) -> Domain:
        """Return what an object that ends at a position is under."""
        return self._shared if self.is_shared(end) else self._own

    def other(self, end: int) -> Domain | None:
        """Return the domain that an object that ends at a position is not under."""
        if not self.is_split:
            return None
        return self._own if self.is_shared(end) else self._shared

    def shared_part(self, prompt: Prompt) -> int:
        """Return how many tokens of a prompt are under the shared key."""
        return prompt.index(self.shared_end) if self.is_split else 0

    def onward(self, key: bytes, end: int, prompt: Prompt) -> bytes:
        """Return the key that what goes on from a prefix of *prompt* names as its parent.

        Args:
            key: Of the prefix.
            end: Its positions.
            prompt: The prompt.
        """
        leaves = self.is_shared(end) and end >= prompt.position(self.shared_part(prompt))
        return self._own.keys.onward(key) if leaves else key

    def along(self, root: bytes, prompt: Prompt, size: int) -> list[bytes]:
        """Return what goes on from a prompt's prefixes names as its parent.

        As far as that can be foreseen: where all chunks have *size* positions.
        """
        found, at, shared = [], root, self.shared_part(prompt)
        ends = [0, *(last for _, last in Prompt(prompt.tokens[:shared]).chunks(0, size))]
        ends += [last for _, last in prompt.chunks(shared, size)]
        for first, last in pairwise(ends):
            at = self.onward(at, prompt.position(first), prompt)
            found.append(at)
            start, end = prompt.position(first), prompt.position(last)
            at = self.at(end).keys.next(at, end - start, prompt.words(first, last))
        return [*found, self.onward(at, prompt.n_positions, prompt)]

    def onwards(self, key: bytes, end: int) -> tuple[bytes, ...]:
        """Return the keys that anything that goes on from a prefix can name as its parent."""
        return (key, self._own.keys.onward(key)) if self.is_shared(end) else (key,)

    def left(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return what stands for prefixes where the shared part ends -> their keys."""
        return {self._own.keys.onward(key): key for key in keys} if self.is_split else {}


def _named(secret: bytes | None, encrypted: bool) -> bytes | None:
    """Return what names and digests are made with."""
    return hkdf(secret, b"", _NAMES) if secret is not None and encrypted else secret


def _check(
    key: bytes | None, shared_key: bytes | None, shared_tokens: int, *, encrypted: bool
) -> None:
    """Raise ValueError where something is missing."""
    if encrypted and key is None:
        raise ValueError("encrypt=True needs a key: key=secrets.token_bytes(32)")
    if shared_tokens and (key is None or shared_key is None):
        lacking = "key" if key is None else "shared_key"
        raise ValueError(
            f"shared_tokens without {lacking}: the first {shared_tokens} tokens are kept under"
            " shared_key, which others have too, and all else under key, which is the tenant's own"
        )
    if shared_key is not None and not shared_tokens:
        raise ValueError("shared_key without shared_tokens: say how many tokens are for everybody")
    if shared_key is not None and key is not None and hmac.compare_digest(key, shared_key):
        raise ValueError("key and shared_key are the same: nothing would be the tenant's own")
