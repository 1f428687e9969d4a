"""AES-256-GCM, and keys that are derived from others."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Any, Final

from .._install import pip_install
from ..errors import UnsupportedError

TAG: Final = 16


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """Return a key of 32 bytes that is derived from a secret: HKDF-SHA256 (RFC 5869)."""
    extracted = hmac.new(salt or bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\1", hashlib.sha256).digest()


class Aes:
    """AES-256-GCM of cryptography, out of buffers into buffers."""

    def __init__(self) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError:
            raise UnsupportedError(
                f"encrypt=True needs cryptography: {pip_install('encryption')}"
            ) from None
        self._invalid = InvalidTag
        self._cipher: Any = lambda key, *nonce: Cipher(algorithms.AES(key), modes.GCM(*nonce))

    def encrypt(
        self, key: bytes, nonce: bytes, about: bytes, pieces: Iterable[memoryview], out: memoryview
    ) -> None:
        """Encrypt pieces that follow one another to *out*, with the tag behind them."""
        encryptor = self._cipher(key, nonce).encryptor()
        encryptor.authenticate_additional_data(about)
        at = 0
        for piece in pieces:
            at += encryptor.update_into(piece, out[at:])
        encryptor.finalize()
        out[at:] = encryptor.tag

    def decrypt(
        self, key: bytes, nonce: bytes, about: bytes, data: memoryview, out: memoryview
    ) -> bool:
        """Decrypt what ends with its tag to *out*; False where it is not what was encrypted.

        *out* is as long as *data*, or longer: cryptography 42 asks for some room behind.
        """
        if len(data) < TAG:
            return False
        decryptor = self._cipher(key, nonce, bytes(data[-TAG:])).decryptor()
        decryptor.authenticate_additional_data(about)
        decryptor.update_into(data[:-TAG], out)
        try:
            decryptor.finalize()
        except self._invalid:
            return False
        return True
