"""Writes packed token lists of llama-server, by their grammar and not by the parser's tables."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence

from tests.layout.blobs import u32

IMAGE, AUDIO = 1, 2


def packed(tokens: Sequence[int], media: Mapping[int, bytes] | None = None) -> array[int]:
    """Build a packed token list; *media* has chunks by the index at which they start."""
    media = media or {}
    raw = struct.pack("<iI", -1, 1)
    raw += u32(len(tokens)) + struct.pack(f"<{len(tokens)}i", *tokens)
    raw += u32(len(media), *media)
    raw += b"".join(u32(len(chunk)) + chunk for chunk in media.values())
    words = array("i")
    words.frombytes(raw + bytes(-len(raw) % 4))
    return words


def image(columns: int, rows: int, name: str, *, version: int = 2) -> bytes:
    """Build the description of an image, with one picture of 1 x 1 pixels."""
    head = struct.pack("<QIQB", version, IMAGE, 0, 1)
    settings = struct.pack("<5I", columns, rows, 1, 0, 1)
    picture = struct.pack("<BBii", 0, 0, 1, 1) + bytes(4 * (version == 2))
    return head + settings + text(name) + struct.pack("<BQ", 0, 1) + picture + b"\0"


def audio(n_tokens: int, name: str, *, version: int = 2) -> bytes:
    """Build the description of a sound without samples."""
    head = struct.pack("<QIQBB", version, AUDIO, 0, 0, 1)
    return head + u32(n_tokens) + text(name) + struct.pack("<BQ", 1, 0)


def text(name: str) -> bytes:
    return struct.pack("<Q", len(name.encode())) + name.encode()
