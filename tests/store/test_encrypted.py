"""Encrypted objects: any back end passes its tests with them, and no other bytes come out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import example, given
from hypothesis import strategies as st

import llama_state as ls
from llama_state.store.ciphers import hkdf
from llama_state.store.objects import NO_PARENT, Name, head_size, pack
from llama_state.store.places.backend import Backend, Place, text_of
from llama_state.store.places.encrypted import (
    FIRST,
    SEGMENT,
    EncryptedBackend,
    encrypted,
    sealed_size,
)
from llama_state.store.places.folder import FolderBackend
from llama_state.store.places.guard import Guard
from llama_state.store.places.memory import MemoryBackend
from llama_state.store.places.remote import RemoteBackend
from llama_state.store.trust import Trust
from llama_state.testing.stores import BackendTests, name, payload

from .engines import LocalEngine

KEY, SHARED = bytes(range(32)), bytes(range(32, 64))
TRUST = Trust(KEY, SHARED, 8, encrypted=True)
OTHER = Trust(SHARED, encrypted=True)
A = name("a")
SIZES = (0, 1, FIRST - 1, FIRST, FIRST + 1, FIRST + SEGMENT, FIRST + SEGMENT + 1)


class EncryptedTests(BackendTests):
    """What every place does, and the sizes at which there is a segment more."""

    sizes: ClassVar = (*BackendTests.sizes, *SIZES[2:])
    added_bytes: ClassVar = 48 + 16


class TestMemory(EncryptedTests):
    """In the memory of this process."""

    @pytest.fixture
    def backend(self) -> Backend:
        return EncryptedBackend(MemoryBackend(1 << 26), TRUST)


class TestFolder(EncryptedTests):
    """In a folder."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return EncryptedBackend(FolderBackend(tmp_path / "store", 1 << 26), TRUST)


class TestServer(EncryptedTests):
    """On a server, within a deadline."""

    @pytest.fixture
    def backend(self) -> Backend:
        place = Place(Guard(RemoteBackend(LocalEngine(), 1 << 26), 60.0))
        return encrypted(place, TRUST).backend


def test_as_many_requests() -> None:
    """The header of an object is in what a server is asked for beforehand, encrypted or not."""
    for trust in (None, TRUST):
        engine = LocalEngine()
        plain = RemoteBackend(engine, 1 << 26)
        backend = plain if trust is None else EncryptedBackend(plain, trust)
        assert backend.put(A, [bytes(10_000)])
        backend.expect([A.parent])
        before = engine.n_requests
        assert backend.children(A.parent) == [A]
        assert backend.head(A, head_size(4 * 900)) == bytes(head_size(4 * 900))
        assert engine.n_requests == before
        with backend.open(A, 10_000) as view:
            assert view == bytes(10_000)
        assert engine.n_requests == before + 1


def test_damage_is_no_failure_of_a_server() -> None:
    """A place that has a damaged object answers: it is not left alone for a while."""
    engine = LocalEngine()
    guard = Guard(RemoteBackend(engine, 1 << 26), 60.0)
    backend = encrypted(Place(guard), TRUST).backend
    backend.put(A, [bytes(5000)])
    engine.objects[A] = engine.objects[A][:-1] + b"x"
    with pytest.raises(ls.ChecksumError), backend.open(A, 5000):
        pass
    with pytest.raises(ls.TruncatedError), backend.open(A, 5001):
        pass
    assert backend.has(A)


def sealed(data: bytes, trust: Trust = TRUST, each: Name = A) -> bytes:
    """An object as it lies in a place."""
    place = MemoryBackend(1 << 26)
    assert EncryptedBackend(place, trust).put(each, [data[:5], data[5:]])
    return place._get(each)


def read(stored: bytes, nbytes: int, trust: Trust = TRUST, each: Name = A) -> bytes:
    """What comes out of an object that lies in a place."""
    place = MemoryBackend(1 << 26)
    place.put(each, [stored])
    with EncryptedBackend(place, trust).open(each, nbytes) as view:
        return bytes(view)


def head(stored: bytes, nbytes: int, each: Name = A) -> bytes:
    """The first bytes of what comes out of an object."""
    place = MemoryBackend(1 << 26)
    place.put(each, [stored])
    return EncryptedBackend(place, TRUST).head(each, nbytes)


def refused(call: Callable[[], bytes], truth: bytes) -> None:
    """A call that gives what is true, or says that it cannot."""
    try:
        found = call()
    except ls.FormatError:
        return
    assert found == truth


def test_format() -> None:
    """The bytes are those that docs/formats.md describes, made with another implementation."""
    assert hkdf(KEY, b"", b"x") == HKDF(SHA256(), 32, None, b"x").derive(KEY)
    data = payload("a", FIRST + SEGMENT + 5)
    stored = sealed(data)
    assert stored[:16] == b"\x89LLSE\r\n\x1a" + b"\1\0" + bytes(6)
    about = stored[:48] + text_of(name("a")).encode()
    secret = HKDF(SHA256(), 32, None, b"llama_state objects").derive(KEY)
    key = HKDF(SHA256(), 32, stored[16:48], text_of(name("a")).encode()).derive(secret)
    ends = [4031, 4031 + (1 << 20), len(data)]
    at, start = 48, 0
    for number, end in enumerate(ends):
        nonce = bytes(7) + number.to_bytes(4, "big") + bytes([end == len(data)])
        segment = stored[at : at + end - start + 16]
        assert AESGCM(key).decrypt(nonce, segment, about) == data[start:end]
        at, start = at + len(segment), end
    assert at == len(stored) == sealed_size(len(data))


def test_no_two_are_alike() -> None:
    """The same bytes under the same name are others each time, and none of them is plain."""
    data = bytes(5000)
    one, two = sealed(data), sealed(data)
    assert one[:16] == two[:16]
    assert not any(one[n : n + 8] == two[n : n + 8] for n in range(16, len(one) - 8, 8))
    assert bytes(8) not in one[16:]


@given(st.sampled_from(SIZES[:5]), st.integers(0, 1 << 20), st.integers(1, 255))
@example(FIRST + 1, 8, 3)
def test_any_flip(size: int, at: int, change: int) -> None:
    """A byte that is another one: nothing comes out."""
    data = payload("flip", size)
    stored = bytearray(sealed(data))
    stored[at % len(stored)] ^= change
    with pytest.raises(ls.FormatError):
        read(bytes(stored), size)
    refused(lambda: head(bytes(stored), 2000), data[:2000])


@given(st.sampled_from(SIZES), st.integers(0, 1 << 21))
@example(FIRST + SEGMENT, 48 + 16 + FIRST)  # the last segment is gone, whole
@example(FIRST + 1, 48 + 16 + FIRST)
def test_any_truncation(size: int, at: int) -> None:
    """Fewer bytes: nothing comes out, of whatever length is asked for."""
    data = payload("cut", size)
    stored = sealed(data)
    cut = stored[: at % len(stored)]
    for nbytes in {size, *(n for n in (*SIZES, len(cut) - 64) if n >= 0)}:
        with pytest.raises(ls.FormatError):
            read(cut, nbytes)
    refused(lambda: head(cut, 2000), data[:2000])
    refused(lambda: head(cut, size), data)


@given(st.permutations(range(4)), st.lists(st.integers(0, 3), max_size=5))
def test_segments_of_one(order: list[int], picked: list[int]) -> None:
    """Segments in another order, twice, or not at all: nothing comes out."""
    data = payload("segments", FIRST + 2 * SEGMENT + SEGMENT)
    stored = sealed(data)
    whole = SEGMENT + 16
    ends = [48 + FIRST + 16 + n * whole for n in range(4)]
    parts = [stored[48 : ends[0]], *(stored[end : end + whole] for end in ends[:3])]
    for chosen in (order, picked):
        if list(chosen) == list(range(4)):
            assert read(stored, len(data)) == data
            continue
        mixed = stored[:48] + b"".join(parts[n] for n in chosen)
        sizes = {len(data), max(len(mixed) - 48 - 16 * len(chosen), 0)}
        for nbytes in sizes:
            with pytest.raises(ls.FormatError):
                read(mixed, nbytes)


@given(st.integers(0, 3), st.integers(0, 3))
def test_swaps(one: int, two: int) -> None:
    """An object under another name, or the segments of another one: nothing comes out."""
    names = [name("a"), name("b"), name("a", "b"), name("a", kind="S")]
    data = [payload(str(n), FIRST + 50) for n in range(4)]
    stored = [sealed(data[n], each=names[n]) for n in range(4)]
    if one == two:
        assert read(stored[one], len(data[one]), each=names[two]) == data[one]
        return
    with pytest.raises(ls.ChecksumError):
        read(stored[one], len(data[one]), each=names[two])
    cut = 48 + 16 + FIRST
    for mixed in (stored[one][:48] + stored[two][48:], stored[one][:cut] + stored[two][cut:]):
        with pytest.raises(ls.ChecksumError):
            read(mixed, len(data[one]), each=names[one])


def test_an_older_one_of_the_same_name() -> None:
    """Segments of two objects of one name cannot be put together: each has a key of its own."""
    one, two = (sealed(payload(text, FIRST + 50)) for text in "xy")
    cut = 48 + 16 + FIRST
    for mixed in (one[:cut] + two[cut:], one[:48] + two[48:]):
        with pytest.raises(ls.ChecksumError):
            read(mixed, FIRST + 50)


def test_another_key() -> None:
    """With another key nothing comes out; nor of what is not encrypted."""
    stored = sealed(bytes(5000))
    for trust in (OTHER, Trust(bytes(32), SHARED, 8, encrypted=True)):
        with pytest.raises(ls.ChecksumError):
            read(stored, 5000, trust)
    with pytest.raises(ls.FormatError, match="not an encrypted object"):
        read(bytes(sealed_size(5000)), 5000)


def test_shared_part() -> None:
    """What ends in the shared part is encrypted for all who have the shared key."""
    for end, expected in ((8, True), (9, False)):
        each = Name(NO_PARENT, bytes(32), 4, "R")
        seal = TRUST.at(end).seal
        options = {"first": end, "end": end, "session_version": 11, "keyed": True}
        parts = pack(each, bytes(32), bytes(16), [b"payload"], seal, **options)  # type: ignore[arg-type]
        data = b"".join(map(bytes, parts))
        place = MemoryBackend(1 << 26)
        EncryptedBackend(place, TRUST).put(each, parts)
        stored = place._get(each)
        assert read(stored, len(data), TRUST, each) == data
        if expected:
            assert read(stored, len(data), OTHER, each) == data
            continue
        with pytest.raises(ls.ChecksumError):
            read(stored, len(data), OTHER, each)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is not installed the error says what to install."""
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(ls.UnsupportedError, match=r"pip install -e '\.\[encryption\]'"):
        ls.PrefixStore(tmp_path / "kv", capacity_bytes=1 << 20, key=KEY, encrypt=True)
    assert not (tmp_path / "kv").exists()
