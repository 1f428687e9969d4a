"""Zstandard frames of bounded size, with the standard library or the package ``zstandard``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from .._io import Buffer

LEVEL = 1  # cache rows are close to noise: higher levels take longer and save nothing


def require() -> None:
    """Raise UnsupportedError if no zstd is installed."""
    _module()


def compress(data: Buffer) -> bytes:
    """Compress *data* into one frame."""
    module, is_stdlib = _module()
    if is_stdlib:
        return bytes(module.compress(data, level=LEVEL))
    return bytes(module.ZstdCompressor(level=LEVEL).compress(data))


def decompress(frame: Buffer, size: int) -> bytes:
    """Decompress a frame of *size* bytes.

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
    return data


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
            "compressed checkpoints need zstandard: pip install 'llama-state[zstd]'"
        ) from None
    return zstandard, False
