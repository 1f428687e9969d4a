"""State files made of the states of ``blobs``, and what their values should be."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

from tests.layout.blobs import State, u32

SEQUENCE_VERSION = {9: 2, 10: 3, 11: 4}
GOLDEN = Path(__file__).parents[1] / "golden"


def native(state: State, tokens: Sequence[int] = ()) -> bytes:
    """Build the session file of a whole state, or the sequence file of a sequence state."""
    words = struct.pack(f"<{len(tokens)}i", *tokens)
    if state.seq is None:
        return b"nsgg" + u32(state.version, len(tokens)) + words + state.blob()
    version = SEQUENCE_VERSION[state.version]
    return b"qsgg" + u32(version, len(tokens)) + words + state.payload()


def slot(state: State, words: array[int]) -> bytes:
    """Build the slot file of a sequence state."""
    return native(state, words)


def write(folder: Path, data: bytes, name: str = "state") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path
