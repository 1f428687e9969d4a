"""Matrices in memory: written by columns instead of by rows."""

from __future__ import annotations

from typing import Final

try:
    from ._pages import ffi, lib
except ImportError:
    lib = None  # type: ignore[assignment]

_CODES: Final = {2: "H", 4: "I"}


def transpose(source: memoryview, out: memoryview, n_rows: int, element: int) -> None:
    """Write a matrix by columns; in C (``include/matrix.h``), where the extension is built.

    Args:
        source: The matrix by rows, contiguous.
        out: As many bytes, which do not overlap it.
        n_rows: Its rows.
        element: Bytes of an element: 2 or 4.
    """
    if len(source) != len(out) or element not in _CODES or len(source) % max(n_rows * element, 1):
        raise ValueError(f"{len(source)} bytes are not {n_rows} rows, or do not fit {len(out)}")
    if not len(source):
        return
    n_columns = len(source) // element // n_rows
    if lib is None:
        _transpose(source.cast(_CODES[element]), out.cast(_CODES[element]), n_rows, n_columns)
        return
    start = ffi.from_buffer("uint8_t[]", source)
    lib.matrix_transpose(start, ffi.from_buffer("uint8_t[]", out), n_rows, n_columns, element)


def _transpose(source: memoryview, out: memoryview, n_rows: int, n_columns: int) -> None:
    for column in range(n_columns):
        out[column * n_rows : (column + 1) * n_rows] = source[column::n_columns]
