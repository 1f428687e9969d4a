"""Matrices written by columns: in C, with registers and at the edges, as in Python."""

from __future__ import annotations

from random import Random

import pytest

from llama_state._io.matrix import _CODES, _transpose, transpose

SIDES = (1, 3, 8, 63, 64, 65, 130, 192)


@pytest.mark.parametrize("element", _CODES)
@pytest.mark.parametrize("n_rows", SIDES)
@pytest.mark.parametrize("n_columns", SIDES)
def test_the_same_in_c(n_rows: int, n_columns: int, element: int) -> None:
    """Byte for byte at any alignment, and no byte beside it."""
    nbytes = n_rows * n_columns * element
    for offset in range(3):
        source = Random(offset).randbytes(nbytes + offset)[offset:]
        room = bytearray(nbytes + 2 * offset)
        transpose(memoryview(source), memoryview(room)[offset : offset + nbytes], n_rows, element)
        code, expected = _CODES[element], bytearray(nbytes)
        columns = memoryview(expected).cast(code)  # type: ignore[call-overload]
        rows = memoryview(source).cast(code)  # type: ignore[call-overload]
        _transpose(rows, columns, n_rows, n_columns)
        assert room == bytes(offset) + expected + bytes(offset)
