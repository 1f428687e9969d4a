"""Containers: what goes in comes out, and nothing but what was written is taken."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
import sys
from array import array
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state.checkpoint import compression, container
from llama_state.checkpoint.container import Container, at_most, open_container, pack
from llama_state.errors import (
    ChecksumError,
    FormatError,
    StateError,
    TruncatedError,
    UnsupportedError,
    VersionError,
)

KEY = bytes(range(32))
TOKENS = array("i", [1, 2, -1, 2**31 - 1])
LOGITS = array("f", [0.5, -0.25])
METADATA = b'{"meta":{}}'


def packed(payload: bytes, **options: Any) -> bytes:
    return b"".join(pack(METADATA, payload, **options))


def verified(data: bytes | bytearray | memoryview, key: bytes | None = None) -> Container:
    found = open_container(data, key=key)
    found.verify()
    return found


def small(**options: Any) -> bytes:
    """One of every part, with two chunks."""
    payload = bytes(range(256)) * 16 + b"end"
    return packed(payload, tokens=TOKENS, logits=LOGITS, chunk=4096, **options)


@given(
    payload=st.binary(max_size=20_000),
    tokens=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9),
    logits=st.lists(st.floats(width=32, allow_nan=False), max_size=9),
    key=st.none() | st.binary(min_size=16, max_size=80),
    compress=st.booleans(),
)
def test_round_trip(
    payload: bytes, tokens: list[int], logits: list[float], key: bytes | None, compress: bool
) -> None:
    """Every part comes back, the payload starts on a page, and the size was foretold."""
    data = packed(
        payload,
        tokens=array("i", tokens),
        logits=array("f", logits),
        key=key,
        compress=compress,
        chunk=4096,
    )
    found = verified(data, key)
    assert bytes(found.metadata) == METADATA
    assert found.tokens.tolist() == tokens
    assert found.logits.tolist() == logits
    assert found.payload() == payload
    assert (found.keyed, found.compressed) == (key is not None, compress)
    size = at_most(
        len(METADATA), len(payload), n_tokens=len(tokens), n_logits=len(logits), chunk=4096
    )
    assert len(data) <= size
    if not compress:
        assert len(data) == size
    first = [part.offset for part in found.parts if part.name.startswith("payload")][:1]
    assert all(offset % 4096 == 0 for offset in first)


def test_the_same_parts_make_the_same_bytes() -> None:
    """No clock, no chance: caches can compare containers."""
    assert small() == small()
    assert small(key=KEY) == small(key=KEY)


def test_the_format_does_not_drift() -> None:
    """Files that are on disks already must stay readable: version 1 is these bytes."""
    assert (
        hashlib.sha256(small()).hexdigest()
        == "8ef2071f5c9fc5c58ae5a35f0ad852d581f59a3411680a25a9661a5236e89a46"
    )
    assert (
        hashlib.sha256(small(key=KEY)).hexdigest()
        == "91fa20d5c5b030d8942d5d619925b7ecd10e11bd64a586879209a48451766175"
    )


def test_compression_is_kept_only_where_it_pays() -> None:
    """Noise and what shrinks too far stay raw; the rest is a frame."""
    noise = Random(1).randbytes(4096)
    text = b"".join(struct.pack("<I", n // 3) for n in range(1024))
    zeros = bytes(1 << 20)
    found = verified(packed(noise + text, compress=True, chunk=4096))
    assert [part.method for part in found.parts[3:]] == ["raw", "zstd"]
    assert found.payload() == noise + text
    # A reader never needs more than 1024 times the memory of what it was given.
    bomb = packed(zeros, compress=True, chunk=1 << 20)
    assert [part.method for part in verified(bomb).parts[3:]] == ["raw"]


@given(st.binary(max_size=64))
def test_planes(data: bytes) -> None:
    """Every fourth byte is in the same plane, at any length."""
    planes = compression.split(data)
    assert planes == data[::4] + data[1::4] + data[2::4] + data[3::4]
    assert compression.join(planes) == data


def zstd_frame(data: bytes, level: int = 3) -> bytes:
    """A frame that we have not made: of the package, or from 3.14 on of the standard library."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.compress(data, level)
    import zstandard

    return bytes(zstandard.compress(data, level))


@pytest.mark.parametrize("form", ["e", "f"])
def test_planes_make_values_smaller(form: str) -> None:
    """Of f16 and f32 that are spread like a cache's, more is saved than by zstd alone."""
    random = Random(3)
    values = struct.pack(f"<400000{form}", *(random.gauss(0, 1) for _ in range(400_000)))
    stored = verified(packed(values, compress=True)).parts[3].stored
    assert stored < len(values) - 1.3 * (len(values) - len(zstd_frame(values, 1)))


def test_frames_without_planes_are_read() -> None:
    """Files that were compressed before there were planes."""
    from xxhash import xxh3_128_digest

    text = b"".join(struct.pack("<I", n // 3) for n in range(1024))
    frame = zstd_frame(text, 1)
    start = bytearray(packed(text, compress=True, chunk=4096)[:4096])
    start[10] &= ~container.PLANES
    heads = [start[:80], b"", start[80:]]
    entries = [(part, len(part), 0, 0) for part in heads] + [(frame, len(frame), 1, 0)]
    table = b"".join(struct.pack("<16sQII", xxh3_128_digest(p), *rest) for p, *rest in entries)
    at = -(-(4096 + len(frame)) // 8) * 8
    end = struct.pack("<QQQ", at, 4, at + len(table) + 48) + bytes(16) + b"\x1aLLSTend"
    found = verified(signed(bytearray(bytes(start + frame).ljust(at, b"\0") + table + end)))
    assert (found.compressed, found.planes) == (True, False)
    assert found.payload() == text


@given(frame=st.binary(max_size=200), size=st.integers(1, 300), planes=st.booleans())
def test_hostile_frames(frame: bytes, size: int, planes: bool) -> None:
    """Bytes that are no frame of the size that is said, alone and in a frame, are damage."""
    with pytest.raises(FormatError, match="zstd frame"):
        compression.decompress(frame, size, planes=planes)
    good = zstd_frame(frame)
    if size == len(frame):
        assert len(memoryview(compression.decompress(good, size, planes=planes))) == size
    else:
        with pytest.raises(FormatError, match="zstd frame"):
            compression.decompress(good, size, planes=planes)
    if frame:
        with pytest.raises(FormatError, match="zstd frame"):
            compression.decompress(good[:-1], len(frame), planes=planes)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "keyed"])
@pytest.mark.parametrize("compress", [False, True])
def test_every_flip_and_every_cut_is_refused(key: bytes | None, compress: bool) -> None:
    """Of a small container: all bits, all lengths, and bytes behind the end."""
    data = bytearray(small(key=key, compress=compress))
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises(FormatError):
                verified(data, key)
            data[at] ^= 1 << bit
    view = memoryview(data)
    for size in range(len(data)):
        with pytest.raises(FormatError):
            verified(view[:size], key)
    for more in (b"\0", b"\0" * 4096, bytes(data)):
        with pytest.raises(FormatError):
            verified(bytes(data) + more, key)
    verified(data, key)


def test_flips_and_cuts_of_a_large_one() -> None:
    """20,000 flips, as many in each region, and 2,000 cuts of one with several chunks."""
    random = Random(5)
    payload = random.randbytes(5 << 20)
    data = bytearray(packed(payload, tokens=array("i", range(2000)), logits=array("f", [1] * 999)))
    found = open_container(bytes(data))
    table = len(data) - 48 - 32 * len(found.parts)
    regions = [
        (0, 64),
        (64, 64 + len(METADATA)),
        *((part.offset, part.offset + part.stored) for part in found.parts),
        (table, len(data) - 48),
        (len(data) - 48, len(data) - 8),
        (len(data) - 8, len(data)),
    ]
    for i in range(20_000):
        start, end = regions[i % len(regions)]
        at, bit = random.randrange(start, end), 1 << random.randrange(8)
        data[at] ^= bit
        with pytest.raises(FormatError):
            verified(data)
        data[at] ^= bit
    view = memoryview(data)
    borders = {edge + step for region in regions for edge in region for step in (-1, 0, 1)}
    for size in [*borders, *(random.randrange(len(data)) for _ in range(2000))]:
        if 0 <= size < len(data):
            with pytest.raises(FormatError):
                verified(view[:size])
    verified(data)


def test_damage_is_located() -> None:
    """All damaged parts are named, and where they are; the others are sound."""
    data = bytearray(packed(bytes(40_000), chunk=4096, tokens=TOKENS))
    parts = open_container(bytes(data)).parts
    for part in (parts[1], parts[4], parts[-1]):
        data[part.offset] ^= 1
    found = open_container(data)
    assert list(found.damaged()) == [parts[1], parts[4], parts[-1]]
    assert [part.name for part in found.damaged()][:2] == ["tokens", "payload chunk 2 of 10"]
    with pytest.raises(ChecksumError, match="tokens is not what was written") as caught:
        found.verify()
    assert caught.value.offset == parts[1].offset


def test_many_chunks_are_verified_side_by_side() -> None:
    """Above some size threads share the work; the result is the same."""
    data = bytearray(packed(bytes(20 << 20), chunk=1 << 20))
    found = verified(data)
    assert len(data) > container.ONE_THREAD
    data[found.parts[7].offset + 5] ^= 1
    assert list(open_container(data).damaged()) == [found.parts[7]]


def test_a_wrong_or_missing_key_is_refused_first() -> None:
    """Even where everything behind the header is nonsense."""
    data = bytearray(small(key=KEY))
    data[64:80] = b"\xff" * 16
    for key, text in ((None, "pass key="), (bytes(16), "the key is not the one")):
        with pytest.raises(ChecksumError, match=text):
            open_container(data, key=key)
    # With the right key the table is sound, and the damaged part is found.
    with pytest.raises(ChecksumError, match="metadata"):
        verified(data, KEY)


def test_authentication_cannot_be_stripped() -> None:
    """With a key, a container that is not authenticated is refused."""
    with pytest.raises(ChecksumError, match="not authenticated"):
        open_container(small(), key=KEY)
    # A stranger who knows the format, but not the key.
    forged = bytearray(small(key=KEY))
    forged[10] &= ~container.KEYED
    with pytest.raises(ChecksumError):
        verified(forged, None)


def test_parts_of_two_keyed_containers_do_not_mix() -> None:
    """What was signed in one place does not pass in another."""
    one = bytearray(packed(b"a" * 9000, key=KEY, chunk=4096))
    two = packed(b"b" * 9000, key=KEY, chunk=4096)
    part = open_container(bytes(one), key=KEY).parts[3]
    one[part.offset : part.offset + part.stored] = two[part.offset : part.offset + part.stored]
    with pytest.raises(ChecksumError, match="chunk 1 of 3"):
        verified(one, KEY)
    entry = len(one) - 48 - 3 * 32
    one[entry : entry + 32] = two[entry : entry + 32]
    with pytest.raises(ChecksumError, match="the key is not the one"):
        verified(one, KEY)


def test_the_keyed_digest_is_what_the_docs_say() -> None:
    """Another program can check it with an HMAC-SHA256."""
    data = small(key=KEY)
    part = open_container(data, key=KEY).parts[-1]
    stored = data[part.offset : part.offset + part.stored]
    assert hmac.digest(KEY, b"part" + stored, hashlib.sha256)[:16] == part.digest
    table = struct.unpack_from("<Q", data, len(data) - 48)[0]
    signed = b"table" + data[:64] + data[table : len(data) - 24]
    assert hmac.digest(KEY, signed, hashlib.sha256)[:16] == data[-24:-8]


@pytest.mark.parametrize("key", [b"", b"short"])
def test_short_keys(key: bytes) -> None:
    """A key that can be guessed is none."""
    with pytest.raises(ValueError, match="16 bytes"):
        small(key=key)


def signed(data: bytearray) -> bytearray:
    """Return *data* with a correct table digest, as an attacker would."""
    from xxhash import xxh3_128_digest

    table = struct.unpack_from("<Q", data, len(data) - 48)[0]
    data[-24:-8] = xxh3_128_digest(bytes(data[:64]) + bytes(data[table : len(data) - 24]))
    return data


def field(data: bytes, at: int, form: str, value: object) -> bytearray:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    return signed(changed)


@pytest.mark.parametrize(
    ("at", "form", "value", "error"),
    [
        (0, "<8s", b"GGUF", FormatError),
        (8, "<H", 2, VersionError),
        (10, "<H", container.PLANES, FormatError),
        (10, "<H", 8, FormatError),
        (12, "<I", 0, FormatError),
        (12, "<I", 4097, FormatError),
        (12, "<I", 128 << 20, FormatError),
        (12, "<I", 8192, FormatError),
        (16, "<Q", 2**63, TruncatedError),
        (16, "<Q", 10_000, TruncatedError),
        (24, "<Q", 2**62, TruncatedError),
        (32, "<Q", 2**60, TruncatedError),
        (40, "<Q", 2**40, TruncatedError),
        (40, "<Q", 4096, FormatError),
        (48, "<B", 1, FormatError),
    ],
)
def test_impossible_headers(at: int, form: str, value: object, error: type[StateError]) -> None:
    """A digest vouches for nothing that a stranger wrote: lengths are those of the file."""
    with pytest.raises(error):
        verified(field(small(), at, form, value))


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        (-48, "<Q", 2**64 - 1),
        (-48, "<Q", 0),
        (-40, "<Q", 2**59),
        (-32, "<Q", 1),
        (-48 - 32 + 16, "<Q", 2**63),
        (-48 - 32 + 16, "<Q", 2),
        (-48 - 32 + 24, "<I", 1),
        (-48 - 32 + 24, "<I", 7),
        (-48 - 32 + 28, "<I", 1),
    ],
)
def test_impossible_tables(at: int, form: str, value: int) -> None:
    """Entries that lie about sizes or methods, with a digest that is right."""
    data = bytearray(small())
    struct.pack_into(form, data, len(data) + at, value)
    if at <= -48 - 16:
        signed(data)
    with pytest.raises(FormatError):
        verified(data)


def test_unknown_features_are_said_to_be_so() -> None:
    """What a later version writes is not called damaged."""
    with pytest.raises(FormatError, match=r"does not know \(flags 0x8\): update llama_state"):
        verified(field(small(), 10, "<H", 8))


def test_frames_that_lie() -> None:
    """A frame of another size than its chunk, and one that is none, are damage."""
    from xxhash import xxh3_128_digest

    text = b"".join(struct.pack("<I", n // 3) for n in range(1024))
    data = bytearray(packed(text, compress=True, chunk=4096))
    part = open_container(bytes(data)).parts[3]
    for raw in (text[:-1], text + b"x", None):  # as planes or as they are: the size is wrong
        frame = b"\0" * part.stored if raw is None else zstd_frame(raw)
        frame = frame.ljust(part.stored, b"\0")[: part.stored]
        data[part.offset : part.offset + part.stored] = frame
        entry = len(data) - 48 - 32
        data[entry : entry + 16] = xxh3_128_digest(frame)
        found = verified(signed(data))
        with pytest.raises(FormatError, match="zstd frame"):
            found.payload()


@pytest.mark.parametrize("data", [b"", b"\x89", b"GGUF" + bytes(100), b"nsgg" + bytes(8)])
def test_not_a_container(data: bytes) -> None:
    """Other files are said to be others."""
    with pytest.raises(FormatError):
        open_container(data)
    assert not container.is_container(data)
    assert container.is_container(small())


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install; a container that is not compressed needs none of it."""
    data = small()
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(UnsupportedError, match=r"zstandard: pip install -e '\.\[zstd\]'"):
        small(compress=True)
    assert verified(data).tokens.tolist() == TOKENS.tolist()


def test_regions_are_where_the_docs_say() -> None:
    """Read with struct alone, as another program would."""
    data = small()
    magic, version, flags, chunk, n_meta, n_tok, n_logit, n_payload, rest = struct.unpack_from(
        "<8sHHIQQQQ16s", data
    )
    assert (magic, version, flags, chunk, rest) == (b"\x89LLST\r\n\x1a", 1, 0, 4096, bytes(16))
    assert json.loads(data[64 : 64 + n_meta]) == {"meta": {}}
    tokens_at = -(-(64 + n_meta) // 8) * 8
    assert array("i", data[tokens_at : tokens_at + 4 * n_tok]) == TOKENS
    logits_at = -(-(tokens_at + 4 * n_tok) // 8) * 8
    assert array("f", data[logits_at : logits_at + 4 * n_logit]) == LOGITS
    assert n_payload == 4099
    assert data[4096 : 4096 + 256] == bytes(range(256))
    table, n_entry, size = struct.unpack_from("<QQQ", data, len(data) - 48)
    assert (n_entry, size, data[-8:]) == (5, len(data), b"\x1aLLSTend")
    ends = [part.offset for part in open_container(data).parts]
    assert ends == [0, tokens_at, logits_at, 4096, 8192]
    assert all(a < b for a, b in pairwise(ends))
    assert table % 8 == 0
