"""Zstandard frames of bounded size, with the standard library or the package ``zstandard``.

The values of a cache are close to noise, but the bytes that hold their exponents are not. So bytes
are sorted into planes first: those at 0, 4, 8, ..., then those at 1, 5, 9, ..., and so on. Four
planes are right for f32, and as good as two for f16 and bf16; quantized rows do not mind them.
Slices of ``bytes`` with a step are faster than zstd, so none of this needs C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._install import pip_install
from ..errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from .._io import Buffer

N_PLANES = 4
LEVEL = 1  # cache rows are close to noise: higher levels take longer and save nothing


def require() -> None:
    """Raise UnsupportedError if no zstd is installed."""
    _module()


def compress(data: Buffer) -> bytes:
    """Compress the planes of *data* into one frame."""
    module, is_stdlib = _module()
    planes = split(bytes(data))
    if is_stdlib:
        return bytes(module.compress(planes, level=LEVEL))
    return bytes(module.ZstdCompressor(level=LEVEL).compress(planes))


def split(data: bytes) -> bytes:
    """Return the planes of *data*, one after the other."""
    return b"".join(data[first::N_PLANES] for first in range(N_PLANES))


def join(planes: bytes) -> bytearray:
    """Return the bytes whose planes these are."""
    data, start = bytearray(len(planes)), 0
    for first in range(N_PLANES):
        end = start + len(range(first, len(data), N_PLANES))
        data[first::N_PLANES] = planes[start:end]
        start = end
    return data


def decompress(frame: Buffer, size: int, *, planes: bool) -> Buffer:
    """Decompress a frame of *size* bytes.

    Args:
        planes: Whether it is of planes, or of the bytes as they were, as in earlier files.

    Raises:
        FormatError: It is damaged, or of another size.
    """
    module, is_stdlib = _module()
    try:
        if is_stdlib:
            data = bytes(module.ZstdDecompressor().decompress(frame, max_length=size + 1))
        else:
            with module.ZstdDecompressor().stream_reader(frame) as reader:
                data = bytes(reader.read(size + 1))
    except module.ZstdError as error:
        raise FormatError(f"a damaged zstd frame: {error}") from None
    if len(data) != size:
        raise FormatError(f"a zstd frame of {len(data)} bytes, not {size}")
    return join(data) if planes else data


def _module() -> tuple[Any, bool]:
    """Return the module, and whether it is the one of the standard library."""
    try:
        from compression import zstd
    except ImportError:
        pass
    else:
        return zstd, True
    try:
        import zstandard
    except ImportError:
        raise UnsupportedError(
            f"compressed checkpoints need zstandard: {pip_install('zstd')}"
        ) from None
    return zstandard, False
