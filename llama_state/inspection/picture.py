"""Draw a state: the owners of its cells, its positions, and the magnitude of its values."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .._io.arguments import checked
from ..layout import UNKNOWN_ID, Cache, Cells, Layout, RecurrentCache
from . import values
from .layer_numbers import layer_numbers
from .magnitudes import MOST_ROWS, Magnitudes, magnitudes, shades
from .rows import positions_by_sequence
from .statefile import StateFile, sound_layout
from .summary import traits_text
from .words import count, one_of, ranges, size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Image: TypeAlias = "npt.NDArray[np.float32]"

SUFFIXES = (".png", ".svg")


def require_suffix(suffix: str) -> None:
    """Raise UnsupportedError unless pictures can be of the format that *suffix* names."""
    one_of(suffix, SUFFIXES, "pictures")


_SQUARE = 6
"""Width and height of a cell in pixels: enough for stripes."""
_MOST_CELLS = 16_384
"""The most cells of a stream that are drawn one by one; of more, a square stands for several."""
_IN_LEGEND = 16
_PALE = 0.3
_ABOVE, _BELOW = "red", "cyan"
_GOLDEN = 0.618034
_LETTER_TITLES = {"K": "K", "V": "V", "R": "R (convolution)", "S": "S (state)", "P": "n-grams"}


@checked
def render(file: StateFile, suffix: str) -> bytes:
    """Draw a state.

    Args:
        file: A sound state file.
        suffix: The format of the result: ".png" or ".svg".

    Raises:
        FormatError: The state is damaged.
        UnsupportedError: Another suffix, or matplotlib, numpy or gguf is not installed.
    """
    require_suffix(suffix)
    values.require("matplotlib", "numpy")
    layout = sound_layout(file)
    import matplotlib

    figure = _draw(file, layout)
    out = BytesIO()
    # Without dates and random ids: the same state gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "llama_state"}):
        about = {"Date": None} if suffix.lower() == ".svg" else {"Software": None}
        figure.savefig(out, format=suffix.lower()[1:], dpi=110, metadata=about)
    return out.getvalue()


def _draw(file: StateFile, layout: Layout) -> Any:
    from matplotlib.figure import Figure

    drawn = [(cache, magnitudes(file.state, cache)) for cache in layout.caches]
    rows = list(_rows_of_panels(drawn, layer_numbers(layout)))
    heights = [max(panel.height for panel in row) for row in rows] or [1.0]
    columns = max(map(len, rows), default=1)
    figure = Figure(figsize=(3.6 * max(columns, 2), 1.7 + sum(heights)), layout="constrained")
    figure.suptitle(_title(file, layout), fontsize=11)
    if not rows:
        figure.text(0.5, 0.45, "the state is empty", ha="center", color="0.4")
        return figure
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    for line, row in enumerate(rows):
        for column, panel in enumerate(row):
            panel.draw(figure.add_subplot(grid[line, column]), height=heights[line])
    _add_legend(figure, layout)
    return figure


@dataclass(frozen=True, slots=True)
class _Panel:
    """One drawing of the picture, and its height in inches."""

    draw: Callable[..., None]
    height: float


def _rows_of_panels(
    drawn: Sequence[tuple[Cache, Sequence[Magnitudes]]], numbers: Mapping[str, Sequence[int]]
) -> Iterator[list[_Panel]]:
    """Yield the lines of the picture: one for each cache with cells, then all other panels."""
    rest: list[_Panel] = []
    most = 1
    for cache, heats in drawn:
        panels = [
            _Panel(
                partial(_draw_heat, cache=cache, heat=heat, numbers=numbers.get(cache.name)),
                _heat_height(heat),
            )
            for heat in heats
        ]
        if any(map(len, cache.cells)):
            height = _cells_height(cache)
            cells = [_Panel(partial(draw, cache=cache), height) for draw in _OF_CELLS]
            most = max(most, len(cells) + len(panels))
            yield [*cells, *panels]
        else:
            rest += panels
    for start in range(0, len(rest), most):
        yield rest[start : start + most]


def _cells_height(cache: Cache) -> float:
    n_stream = sum(1 for cells in cache.cells if len(cells))
    return min(max(2.4, 0.55 * n_stream + 1), 9.0)


def _heat_height(heat: Magnitudes) -> float:
    return min(max(2.4, 0.12 * len(heat.layers) + 1), 9.0)


def _title(file: StateFile, layout: Layout) -> str:
    name = Path(file.path).name
    arch = f"{layout.arch}, " if layout.arch else ""
    return f"{name}: {file.kind}, {arch}{traits_text(layout.traits)}, {size(file.nbytes)}"


def _draw_cells(axes: Any, *, cache: Cache, height: float) -> None:
    """Draw the cells of all streams in the order of the cache, line by line."""
    import numpy as np

    streams = [(index, cells) for index, cells in enumerate(cache.cells) if len(cells)]
    most = max(len(cells) for _, cells in streams)
    step = math.ceil(most / _MOST_CELLS)
    wide = math.ceil(math.sqrt(2.2 * sum(len(cells) for _, cells in streams) / step))
    columns = min(max(8, wide), most)
    high = max(max(cells.positions) for _, cells in streams)
    pictures: list[Image] = []
    starts, line = [], 0
    for _, cells in streams:
        if pictures:
            pictures.append(np.ones((_SQUARE // 2, columns * _SQUARE, 3), np.float32))
            line += _SQUARE // 2
        starts.append(line)
        pictures.append(_cells_image(cells, step, columns, high))
        line += len(pictures[-1])
    axes.imshow(np.concatenate(pictures), interpolation="nearest", aspect="auto")
    n_cell = sum(len(cells) for _, cells in streams)
    square = "" if step == 1 else f", a square is {step} of them"
    axes.set_title(f"{cache.name}: {count(n_cell, 'cell')}{square}", fontsize=9)
    axes.set_xticks([])
    if len(cache.cells) > 1:
        axes.set_yticks([s + _SQUARE / 2 for s in starts], [f"stream {i}" for i, _ in streams])
    else:
        lines = range(0, line, max(1, line // _SQUARE // 4) * _SQUARE)
        first = [f"{at // _SQUARE * columns * step:,}" for at in lines]
        axes.set_yticks([at + _SQUARE / 2 for at in lines], first)
        axes.set_ylabel("first cell of the line", fontsize=8)
    axes.tick_params(labelsize=7, length=2)


def _cells_image(cells: Cells, step: int, columns: int, high: int) -> Image:
    """Return every *step*-th cell as a square; a shared one is striped."""
    import numpy as np

    shown = range(0, len(cells), step)
    lines = math.ceil(len(shown) / columns)
    image = np.ones((lines, columns, _SQUARE, _SQUARE, 3), np.float32)
    x, y = np.meshgrid(range(_SQUARE), range(_SQUARE))
    before: dict[int, int] = {}
    for index, owners in zip(shown, _owners_of(cells, shown), strict=True):
        shade = _PALE + (1 - _PALE) * (cells.positions[index] / max(high, 1))
        colours = np.array([_colour(owner) for owner in owners], np.float32)
        stripe = (x + y) * len(owners) // _SQUARE % len(owners)
        line, column = divmod(index // step, columns)
        image[line, column] = 1 - shade * (1 - colours[stripe])
        position = cells.positions[index]
        if step == 1 and any(before.get(i, position) < position - 1 for i in owners):
            image[line, column, :, 0] = 0
        before |= dict.fromkeys(owners, position)
    image = image.swapaxes(1, 2)
    return image.reshape(lines * _SQUARE, columns * _SQUARE, 3)


def _owners_of(cells: Cells, shown: range) -> Iterator[list[int]]:
    owners: list[list[int]] = [[] for _ in shown]
    for seq_id in sorted(cells.owners):
        for index in cells.owners[seq_id]:
            if index % shown.step == 0:
                owners[index // shown.step].append(seq_id)
    yield from owners


def _draw_positions(axes: Any, *, cache: Cache, height: float) -> None:
    """Draw the positions that each sequence holds, with gaps for the missing ones."""
    held = positions_by_sequence(cache.cells)
    low, high = min(map(min, held.values())), max(map(max, held.values()))
    low = 0 if isinstance(cache, RecurrentCache) else low
    for line, (seq_id, positions) in enumerate(held.items()):
        runs = [(first - 0.5, last - first + 1) for first, last in ranges(positions)]
        least = (high - low + 1) / 100  # a single position must be visible
        bars = [(start, max(width, least)) for start, width in runs]
        axes.broken_barh(bars, (line - 0.4, 0.8), facecolors=_colour(seq_id), linewidth=0)
    margin = (high - low) / 100 + 0.5
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(len(held) - 0.5, -0.5)
    every = range(0, len(held), max(1, len(held) // 16))
    names = [*held]
    axes.set_yticks([*every], [_name(names[line]) for line in every])
    axes.set_ylabel("sequence", fontsize=8)
    axes.set_xlabel("position", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    holes = sum(len(ranges(positions)) - 1 for positions in held.values())
    axes.set_title(f"positions ({count(holes, 'hole')})" if holes else "positions", fontsize=9)
    axes.tick_params(labelsize=7)


def _draw_heat(
    axes: Any, *, cache: Cache, heat: Magnitudes, numbers: Sequence[int] | None, height: float
) -> None:
    """Draw the magnitudes of one kind of rows: layers down, buckets to the right.

    Args:
        numbers: The number of each layer in the model; None: not known.
    """
    import matplotlib
    import numpy as np

    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.9", under=_BELOW, over=_ABOVE)
    lines, columns = heat.rms.shape
    axes.imshow(
        np.ma.masked_invalid(shades(heat)),
        cmap=colours,
        vmin=-1e-9,  # rounding is not far outside
        vmax=1 + 1e-9,
        interpolation="nearest",
        aspect="auto",
    )
    title = _LETTER_TITLES.get(heat.name, heat.name)
    axes.set_title(f"{cache.name} {title}: RMS", fontsize=9)
    every = range(0, lines, max(1, lines // 12))
    axes.set_yticks([*every], [str((numbers or heat.layers)[heat.layers[i]]) for i in every])
    axes.set_ylabel("layer" if numbers else "layer of the cache", fontsize=8)
    loud = axes.secondary_yaxis("right")
    loud.set_yticks([*every], [_median(heat.rms[line]) for line in every])
    loud.tick_params(labelsize=6, length=2)
    shown = range(0, columns, max(1, columns // 5))
    axes.set_xticks([*shown], [f"{heat.edges[column]:.0f}" for column in shown])
    axes.set_xlabel(heat.axis, fontsize=8)
    axes.tick_params(labelsize=7)


def _median(rms: Any) -> str:
    import numpy as np

    finite = rms[np.isfinite(rms)]
    return f"{np.median(finite):.2g}" if len(finite) else ""


def _add_legend(figure: Any, layout: Layout) -> None:
    from matplotlib.patches import Patch

    shown = layout.sequences[:_IN_LEGEND]
    patches = [Patch(color=_colour(i), label=f"sequence {_name(i)}") for i in shown]
    if more := len(layout.sequences) - len(shown):
        patches.append(Patch(color="none", label=f"and {more} more"))
    note = "cells: pale to full is first to last position, striped is shared, black is a hole; "
    note += "RMS: dark to bright is low to high within each layer, whose median is at the right;\n"
    note += f"{_ABOVE} is far above and {_BELOW} far below (1.5 times the middle half outside it), "
    note += "grey is without rows; the first column is the first position alone"
    if any(sum(map(len, cache.cells)) > MOST_ROWS for cache in layout.caches):
        note += f", of at most {MOST_ROWS:,} rows a layer"
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=min(max(len(patches), 1), 8),
        fontsize=8,
        title=note,
        title_fontsize=8,
    )


_OF_CELLS = (_draw_cells, _draw_positions)


def _name(seq_id: int) -> str:
    return "?" if seq_id == UNKNOWN_ID else str(seq_id)


def _colour(seq_id: int) -> tuple[float, float, float]:
    """Return the colour of a sequence: neighbouring ids get very different ones."""
    return colorsys.hsv_to_rgb((0.58 + seq_id * _GOLDEN) % 1.0, 0.75, 0.75)
