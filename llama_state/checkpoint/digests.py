"""Digests of a container's parts: plain ones detect damage, keyed ones forgery too."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from xxhash import xxh3_128_digest

if TYPE_CHECKING:
    from .._io import Buffer

SIZE: Final = 16
MIN_KEY: Final = 16

Digest: TypeAlias = "Callable[[Buffer], bytes]"
"""Data -> its digest of 16 bytes."""


def plain() -> tuple[Digest, Digest]:
    """Return the digest functions for parts and for the table: XXH3-128, big-endian."""
    return xxh3_128_digest, xxh3_128_digest


def keyed(key: bytes) -> tuple[Digest, Digest]:
    """Return the digest functions for parts and for the table: half of an HMAC-SHA256.

    Raises:
        ValueError: The key is shorter than 16 bytes.
    """
    if len(key) < MIN_KEY:
        raise ValueError(f"a key must have {MIN_KEY} bytes or more: try secrets.token_bytes(32)")
    return partial(_hmac, key, b"part"), partial(_hmac, key, b"table")


def _hmac(key: bytes, purpose: bytes, data: Buffer) -> bytes:
    # A digest for one purpose must not be valid for the other.
    mac = hmac.new(key, purpose, hashlib.sha256)
    mac.update(data)
    return mac.digest()[:SIZE]
