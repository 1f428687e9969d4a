"""The values of rows. numpy and gguf are imported here only, when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .._install import pip_install
from ..errors import UnsupportedError
from . import rotations
from .rows import Tensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]

PIECE = 1 << 18
"""Bytes of rows to process at a time: several times faster if they fit into a core's cache."""


def have_numpy() -> bool:
    """Return whether numpy is installed."""
    return find_spec("numpy") is not None


def can_decode(tensor: Tensor) -> bool:
    """Return whether the values of *tensor* can be decoded: quantized ones need gguf."""
    readable = tensor.type.elements == 1 or find_spec("gguf") is not None
    return have_numpy() and readable and rotations.fits(tensor.rotation, tensor.n_value)


def require(*packages: str) -> None:
    """Raise UnsupportedError unless all of *packages* are installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        names = " and ".join(missing)
        raise UnsupportedError(f"this needs {names}: {pip_install('plot')}")


def pieces(n_row: int, row: int) -> Iterator[slice]:
    """Yield the ranges of rows to process at a time."""
    step = max(1, PIECE // max(row, 1))
    for start in range(0, n_row, step):
        yield slice(start, min(start + step, n_row))


def rows_of(state: memoryview, tensor: Tensor, rows: Sequence[int] | npt.NDArray[np.intp]) -> Bytes:
    """Return the bytes of some rows of *tensor*: (rows, bytes of a row)."""
    import numpy as np

    nbytes = tensor.n_row * tensor.row
    raw = np.frombuffer(state, np.uint8, nbytes, tensor.offset)
    if not tensor.transposed:
        return raw.reshape(tensor.n_row, tensor.row)[rows]
    step = tensor.type.nbytes
    elements = raw.reshape(tensor.row // step, tensor.n_row, step)[:, rows]
    return elements.swapaxes(0, 1).reshape(len(rows), tensor.row)


def decode(raw: Bytes, tensor: Tensor) -> Floats:
    """Return the values of rows of *tensor*, before their rotation: (rows, values of a row).

    Raises:
        UnsupportedError: The rows are quantized, and gguf is not installed.
    """
    return rotations.undone(stored(raw, tensor), tensor.rotation)


def stored(raw: Bytes, tensor: Tensor) -> Floats:
    """Return the values of rows of *tensor* as they are stored; see :func:`decode`."""
    import numpy as np

    raw = np.ascontiguousarray(raw)
    if tensor.type.name == "f32":
        return raw.view("<f4")
    if tensor.type.name == "f16":
        return raw.view("<f2").astype(np.float32)
    if tensor.type.name == "bf16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    require("gguf")
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values: Floats = dequantize(raw, GGMLQuantizationType(tensor.type_id))
    return values
