"""Objects of an older llama_state, read as ``docs/formats.md`` describes them, byte by byte."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from pathlib import Path

import pytest
from xxhash import xxh3_128

from llama_state.store.objects import parse, payload, sealer
from tests.layout.statefiles import GOLDEN

TOKENS = struct.pack("<3i", 1, 2, 3)
KEYS = {"v11-lfm2": None, "v11-keyed": b"golden" * 3}
FILES = [(name, path) for name in KEYS for path in sorted((GOLDEN / f"{name}.store").glob("??/*"))]


def key_of(secret: bytes | None, data: bytes) -> bytes:
    """The key of a prefix."""
    if secret is None:
        return hashlib.sha256(data).digest()
    return hmac.new(secret, b"prefix" + data, hashlib.sha256).digest()


def digest_of(secret: bytes | None, data: bytes) -> bytes:
    """The digest of a part."""
    if secret is None:
        return xxh3_128(data, seed=0).intdigest().to_bytes(16, "big")
    return hmac.new(secret, b"object" + data, hashlib.sha256).digest()[:16]


def test_which() -> None:
    """Every kind of object but a pin, with and without a key."""
    kinds = sorted(path.suffix for _, path in FILES)
    assert kinds == sorted([".L", ".N", ".R", ".S", ".W"] * len(KEYS))


@pytest.mark.parametrize(("name", "path"), FILES, ids=lambda part: str(part)[-10:])
def test_every_byte(name: str, path: Path) -> None:
    """Each field stands where the table has it, and is what it is said to be."""
    data, secret = path.read_bytes(), KEYS[name]
    (described,) = (GOLDEN / f"{name}.store" / "00").iterdir()
    fields = described.read_bytes()
    fields = fields[len(fields) - int.from_bytes(fields[128:136], "little") :]
    assert fields == json.dumps(json.loads(fields), sort_keys=True, ensure_ascii=False).encode()
    root = key_of(secret, b"root" + fields)
    kind = path.suffix[1:]
    if kind == "N":
        parent, key, tokens, first, end, version = bytes(32), root, b"", 0, 0, 0
    else:
        parent, tokens, end = root, TOKENS, 3
        key = key_of(secret, parent + struct.pack("<I", 3) + tokens)
        first = 0 if kind in "RW" else end
        version = 11 if kind in "RWS" else 0
    n = len(tokens) // 4
    assert path.parent.name == parent.hex()[:2]
    assert path.name == f"{parent.hex()}-{key.hex()}-{n}.{kind}"
    size = 4096  # header and tokens fit into a page
    content = data[size:]
    assert data[:8] == b"\x89LLSP\r\n\x1a"
    assert data[8:32] == struct.pack(
        "<HcBIIiiI", 1, kind.encode(), secret is not None, n, n, first, end, version
    )
    assert (data[32:64], data[64:96], data[96:128]) == (key, parent, root)
    assert data[128:136] == struct.pack("<Q", len(content))
    assert data[136:152] == digest_of(secret, content)
    assert data[152:168] == digest_of(secret, data[:152] + tokens)
    assert data[168 : 168 + 4 * n] == tokens
    assert data[168 + 4 * n : size - 8] == bytes(size - 176 - 4 * n)
    assert data[size - 8 : size] == struct.pack("<Ii", 0xAF143CD8, 0)
    header = parse(data, sealer(secret), keyed=secret is not None)
    assert payload(memoryview(data), header, sealer(secret)) == data[size - 8 :]
