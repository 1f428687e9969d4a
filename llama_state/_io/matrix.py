"""Matrices in memory: written by columns instead of by rows, or cut out and joined."""

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


def copy_lines(
    source: memoryview,
    source_stride: int,
    out: memoryview,
    out_stride: int,
    n_line: int,
    width: int,
) -> None:
    """Copy a part of each line of a matrix; in C, where the extension is built.

    Args:
        source: From the first byte that is copied on, contiguous.
        source_stride: Bytes from a line to the next.
        out: Where it goes: from the first byte that is written on.
        out_stride: The same for *out*.
        n_line: Lines.
        width: Bytes of each that are copied.
    """
    if not n_line or not width:
        return
    last = n_line - 1
    if (
        last * source_stride + width > len(source)
        or last * out_stride + width > len(out)
        or width > min(source_stride, out_stride)
    ):
        raise ValueError(f"{n_line} lines of {width} bytes are not there")
    if lib is None:
        for line in range(n_line):
            part = source[line * source_stride : line * source_stride + width]
            out[line * out_stride : line * out_stride + width] = part
        return
    start = ffi.from_buffer("uint8_t[]", source)
    target = ffi.from_buffer("uint8_t[]", out, require_writable=True)
    lib.matrix_copy_lines(start, source_stride, target, out_stride, n_line, width)


def _transpose(source: memoryview, out: memoryview, n_rows: int, n_columns: int) -> None:
    for column in range(n_columns):
        out[column * n_rows : (column + 1) * n_rows] = source[column::n_columns]
