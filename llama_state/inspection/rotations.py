"""The rotation of rows before they were stored, and the rows without it.

llama.cpp multiplies each group of n values of a row, n a power of two, by the Hadamard matrix of
that size over the root of n. That spreads an outlier over its group, so quantizing costs less. The
matrix is its own inverse.

What a state says of it is a hint. Before session version 11 it says nothing. Since then it says
what a cache is prepared for, which not every architecture does (seen of 11549: the rows of MLA, of
lfm2 and of some indexers are not rotated where the state says that they are). The values of the
same rows in another state tell. numpy is imported only when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

SMALLEST = 64
"""Values of the smallest group that llama.cpp rotates."""
_NEAR = 0.5
"""A distance of rows over their norm: of the same rows in 4 bits it is 0.1, of unlike rows 1.4."""
_ROUNDING = 1.01
"""What the order of a sum makes of a distance."""
_SHARE = 0.25
"""The share of the rows that must be near; the others may be of another text."""


def fits(size: int | None, n_value: int) -> bool:
    """Return whether rows of *n_value* values are made of groups of *size*; 0 and None: of any."""
    return not size or n_value % size == 0


def sizes(n_value: int) -> Iterator[int]:
    """Yield the sizes of groups that rows of *n_value* values can have, 0 for no rotation first."""
    yield 0
    size = SMALLEST
    while fits(size, n_value):
        yield size
        size *= 2


def undone(rows: Floats, size: int | None) -> Floats:
    """Return rows as they were before each group of *size* values was rotated.

    Args:
        rows: (rows, values of a row).
        size: Values of a group; 0 or None returns *rows*.
    """
    import numpy as np

    if not size:
        return rows
    # The fast Walsh-Hadamard transform. Groups lie side by side: numpy is fast along long axes.
    out, half = np.ascontiguousarray(rows.reshape(-1, size).T), 1
    while half < size:
        pairs = out.reshape(size // (2 * half), 2, half, out.shape[1])
        first, second = pairs[:, 0], pairs[:, 1]
        out = np.stack((first + second, first - second), axis=1).reshape(out.shape)
        half *= 2
    return np.ascontiguousarray(out.T).reshape(rows.shape) * np.float32(size**-0.5)


def nearest(a: Floats, b: Floats, choices: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """Find the rotations with which a part of the rows of two states agree.

    Args:
        a: (rows, values of a row) as they are stored.
        b: The same rows of another state.
        choices: Sizes of the groups of *a* and of *b*. Of those that bring them equally near, as
            two of the same sizes do, the first counts.

    Returns:
        One of *choices*; None if the rows agree with none of them.
    """
    found = {pair: _distance(undone(a, pair[0]), undone(b, pair[1])) for pair in choices}
    limit = min(_NEAR, min(found.values()) * _ROUNDING)
    return next((pair for pair, distance in found.items() if distance <= limit), None)


def _distance(rows: Floats, others: Floats) -> float:
    """Return the distance of rows over their norm that a part of them do not exceed."""
    import numpy as np

    error, norm = (np.linalg.norm(one, axis=1) for one in (rows - others, rows))
    counted = np.isfinite(error) & (norm > 0)  # damaged rows and empty ones tell nothing
    if not counted.any():
        return np.inf
    return float(np.quantile(error[counted] / norm[counted], _SHARE))
