"""Objects that are encrypted before they come to a place, whichever that is.

AES-256-GCM in segments, each with a nonce that says which one it is and whether it is the last
(STREAM). ``docs/formats.md`` describes every byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from struct import Struct
from typing import TYPE_CHECKING, Final

from ..._io.buffers import POOL, flat
from ...errors import ChecksumError, FormatError, TruncatedError, VersionError
from ..ciphers import TAG, hkdf
from ..objects import Name, end_of
from ..trust import Trust
from .backend import Backend, Place, Stored, text_of
from .guard import Guard

if TYPE_CHECKING:
    from ..._io import Buffer

MAGIC: Final = b"\x89LLSE\r\n\x1a"
VERSION: Final = 1
_SALT: Final = 32
PROLOGUE = Struct(f"<8sH6x{_SALT}s")
_NONCE = Struct(">7xIB")
# The header of an object with 900 tokens is in the first one; with the prologue, and the byte
# behind it that shows that it is not the last, it is in the first 4096, which are read at once.
FIRST: Final = 4096 - PROLOGUE.size - TAG - 1
SEGMENT: Final = 1 << 20


def encrypted(place: Place, trust: Trust) -> Place:
    """Return a place whose objects are encrypted, within its deadline if it has one."""
    backend = place.backend
    if isinstance(backend, Guard):
        return replace(place, backend=backend.over(EncryptedBackend(backend.backend, trust)))
    return replace(place, backend=EncryptedBackend(backend, trust))


class EncryptedBackend:
    """A :class:`Backend` that keeps objects in another one, encrypted.

    Names and times are as they are there, and sizes those of the encrypted objects. What was
    written without it is damaged for it.

    Args:
        backend: The place.
        trust: The keys. What is under the shared key is encrypted with that.
    """

    def __init__(self, backend: Backend, trust: Trust) -> None:
        self._backend = backend
        if trust.aes is None:
            raise ValueError("these are the keys of a store that does not encrypt")
        self._trust = trust
        self._aes = trust.aes
        self.location: str = backend.location
        self.capacity_bytes: int = backend.capacity_bytes
        self.readonly: bool = backend.readonly
        self.remote: bool = backend.remote

    # -- reading

    def expect(self, parents: Sequence[bytes]) -> None:
        """See :class:`Backend`."""
        self._backend.expect(parents)

    def children(self, parent: bytes) -> Sequence[Name]:
        """See :class:`Backend`."""
        return self._backend.children(parent)

    def has(self, name: Name) -> bool:
        """See :class:`Backend`."""
        return self._backend.has(name)

    def head(self, name: Name, nbytes: int) -> bytes:
        """See :class:`Backend`: whole segments are read, and verified.

        Raises:
            FileNotFoundError: It is gone.
            FormatError: It is damaged, not encrypted, or with another key.
        """
        segments = -(-max(nbytes - FIRST, 0) // SEGMENT)
        need = sealed_size(FIRST + SEGMENT * segments)
        data = memoryview(self._backend.head(name, need + 1))
        plain = bytearray(max(len(data) - PROLOGUE.size, 0))
        size = self._opened(name, data[:need], memoryview(plain), whole=len(data) <= need)
        return bytes(plain[: min(size, nbytes)])

    @contextmanager
    def open(self, name: Name, nbytes: int) -> Iterator[memoryview]:
        """See :class:`Backend`.

        Raises:
            FileNotFoundError: It is gone.
            TruncatedError: It has not as many bytes.
            ChecksumError: It is damaged, not encrypted, or with another key.
        """
        with (
            POOL.lend(nbytes + TAG) as buffer,
            self._backend.open(name, sealed_size(nbytes)) as data,
        ):
            self._opened(name, data, buffer, whole=True)
            yield buffer[:nbytes]

    def entries(self) -> Iterator[Stored]:
        """See :class:`Backend`."""
        return self._backend.entries()

    def used_bytes(self) -> int:
        """See :class:`Backend`."""
        return self._backend.used_bytes()

    # -- writing

    def put(self, name: Name, parts: Iterable[Buffer]) -> bool:
        """See :class:`Backend`."""
        if self.readonly or self._backend.has(name):
            return False
        views = [flat(part) for part in parts]
        nbytes = sealed_size(sum(map(len, views)))
        if nbytes > self.capacity_bytes:
            return False
        with POOL.lend(nbytes) as buffer:
            self._seal(name, views, buffer)
            return self._backend.put(name, [buffer])

    def touch(self, names: Iterable[Name], when: float | None = None) -> None:
        """See :class:`Backend`."""
        self._backend.touch(names, when)

    def remove(self, name: Name) -> int:
        """See :class:`Backend`."""
        return self._backend.remove(name)

    def set_aside(self, name: Name) -> None:
        """See :class:`Backend`."""
        self._backend.set_aside(name)

    def evict(self, to_bytes: int) -> int:
        """See :class:`Backend`."""
        return self._backend.evict(to_bytes)

    # -- segments

    def _seal(self, name: Name, views: Sequence[memoryview], out: memoryview) -> None:
        """Encrypt buffers that follow one another."""
        end = end_of(views[0]) if views else None
        shared = end is not None and self._trust.is_shared(end)
        secret = self._trust.ciphers[-1 if shared else 0]
        prologue = PROLOGUE.pack(MAGIC, VERSION, salt := os.urandom(_SALT))
        key, about = _key(secret, salt, name), prologue + text_of(name).encode()
        out[: len(prologue)] = prologue
        at, nbytes = len(prologue), sum(map(len, views))
        rest = _Rest(views)
        for number, start, stop in _segments(nbytes):
            nonce = _NONCE.pack(number, stop == nbytes)
            pieces = rest.take(stop - start)
            self._aes.encrypt(key, nonce, about, pieces, out[at : at + stop - start + TAG])
            at += stop - start + TAG

    def _opened(self, name: Name, data: memoryview, out: memoryview, *, whole: bool) -> int:
        """Decrypt what an object begins with, whole segments; return the bytes.

        Raises:
            FormatError: It is damaged, not encrypted, or with another key.
        """
        if len(data) < PROLOGUE.size + TAG:
            raise TruncatedError("an encrypted object", need=PROLOGUE.size + TAG, have=len(data))
        magic, version, salt = PROLOGUE.unpack_from(data)
        if magic != MAGIC:
            raise FormatError("not an encrypted object of a prefix store", offset=0)
        if version != VERSION:
            raise VersionError("encrypted object", found=version, expected=VERSION, offset=8)
        about = bytes(data[: PROLOGUE.size]) + text_of(name).encode()
        for secret in self._trust.ciphers:
            key, at, size = _key(secret, salt, name), PROLOGUE.size, 0
            number, length = 0, FIRST
            while at < len(data):
                stop = min(at + length + TAG, len(data))
                nonce = _NONCE.pack(number, whole and stop == len(data))
                if not self._aes.decrypt(key, nonce, about, data[at:stop], out[size:]):
                    break
                size += stop - at - TAG
                at, number, length = stop, number + 1, SEGMENT
            else:
                return size
            if number:
                break  # it is the right key
        raise ChecksumError("an encrypted object is damaged, or of another key", offset=at)


class _Rest:
    """Buffers that follow one another, of which some is taken."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = list(views)

    def take(self, nbytes: int) -> Iterator[memoryview]:
        """Yield the next *nbytes* bytes."""
        while nbytes:
            view = self._views[0]
            yield view[:nbytes]
            if nbytes < len(view):
                self._views[0] = view[nbytes:]
                return
            nbytes -= len(view)
            self._views.pop(0)


def sealed_size(nbytes: int) -> int:
    """Return the bytes that an object of *nbytes* has when it is encrypted."""
    return PROLOGUE.size + nbytes + TAG * sum(1 for _ in _segments(nbytes))


def _segments(nbytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each segment, where it starts, and where it ends."""
    number, start, end = 0, 0, min(FIRST, nbytes)
    yield number, start, end
    while end < nbytes:
        number, start, end = number + 1, end, min(end + SEGMENT, nbytes)
        yield number, start, end


def _key(secret: bytes, salt: bytes, name: Name) -> bytes:
    """Return the key of one object."""
    return hkdf(secret, salt, text_of(name).encode())
