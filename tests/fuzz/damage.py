"""Ways to damage a state, each a pure function of a random generator and the bytes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

# What a length, a position, an id or a type can be changed to.
_WORDS = (0, 1, 2, 3, 8, 30, 255, 256, 257, 2**16, 2**31 - 2, 2**31 - 1, 2**31, 2**32 - 1)
# Most of a state is tensors; most of what can go wrong is near its beginning.
_HEAD = 400

Damage = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def _place(rng: random.Random, size: int) -> int:
    return rng.randrange(min(size, _HEAD) if rng.random() < 0.7 else size)


def flip(rng: random.Random, blob: bytes, others: Sequence[bytes]) -> bytes:
    """Turn one to four bits."""
    out = bytearray(blob)
    for _ in range(rng.randint(1, 4)):
        out[_place(rng, len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def word(rng: random.Random, blob: bytes, others: Sequence[bytes]) -> bytes:
    """Set a 32-bit word, aligned to a byte, to an awkward value or near to what it was."""
    at = _place(rng, max(len(blob) - 4, 1))
    out = bytearray(blob.ljust(4, b"\0"))
    (old,) = struct.unpack_from("<I", out, at)
    new = rng.choice((*_WORDS, old + 1, old - 1, old + 256, old * 2)) & 0xFFFFFFFF
    struct.pack_into("<I", out, at, new)
    return bytes(out)


def swap_words(rng: random.Random, blob: bytes, others: Sequence[bytes]) -> bytes:
    """Exchange two neighbouring words, such as two positions or a count and an id."""
    at = _place(rng, max(len(blob) - 8, 1))
    return blob[:at] + blob[at + 4 : at + 8] + blob[at : at + 4] + blob[at + 8 :]


def truncate(rng: random.Random, blob: bytes, others: Sequence[bytes]) -> bytes:
    """Cut the end off."""
    return blob[: _place(rng, len(blob))]


def extend(rng: random.Random, blob: bytes, others: Sequence[bytes]) -> bytes:
    """Put something behind it."""
    return blob + rng.randbytes(rng.choice((1, 4, 12, 100)))


def remove(rng: random.Random, blob: bytes, others: Sequence[bytes]) -> bytes:
    """Take a piece out."""
    at = _place(rng, len(blob))
    return blob[:at] + blob[at + rng.choice((1, 4, 8, 12, 64)) :]


def insert(rng: random.Random, blob: bytes, others: Sequence[bytes]) -> bytes:
    """Put a piece of itself in once more."""
    at, size = _place(rng, len(blob)), rng.choice((4, 8, 12, 64))
    return blob[:at] + blob[at : at + size] + blob[at:]


def splice(rng: random.Random, blob: bytes, others: Sequence[bytes]) -> bytes:
    """Begin as this one and end as another."""
    other = rng.choice(others)
    at = _place(rng, len(blob))
    return blob[:at] + other[min(at, len(other)) :]


def zero(rng: random.Random, blob: bytes, others: Sequence[bytes]) -> bytes:
    """Lose a page, as a disk does."""
    at = _place(rng, len(blob)) & ~0xFF
    return blob[:at] + bytes(min(512, len(blob) - at)) + blob[at + 512 :]


def exchange(rng: random.Random, blob: bytes, others: Sequence[bytes]) -> bytes:
    """Another state altogether: of another kind, model or configuration."""
    return rng.choice(others)


KINDS: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (flip, word, swap_words, truncate, extend, remove, insert, splice, zero, exchange)
}
