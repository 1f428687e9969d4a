"""The figures as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _ways
from _report import Report
from _states import CONFIGURATIONS
from _timing import MIB, Timing

from llama_state._install import pip_install
from llama_state.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FLASH, _PLAIN = map(str, CONFIGURATIONS[:2])
_GROUPS: Mapping[str, Sequence[str]] = {
    "to memory": (
        _ways.MEMCPY,
        _ways.GET_DATA,
        _ways.SNAPSHOT_OUT,
        _ways.SNAPSHOT,
        _ways.ION7_SNAPSHOT,
        _ways.LLAMA_SAVE,
    ),
    "from memory": (
        _ways.SET_DATA,
        _ways.RESTORE,
        _ways.RESTORE_MAPPED,
        _ways.ION7_RESTORE,
        _ways.LLAMA_LOAD,
    ),
    "to a file": (_ways.SAVE_FILE, _ways.SAVE, _ways.SAVE_FILE_OVER, _ways.SAVE_OVER),
    "from a file": (_ways.LOAD_FILE, _ways.LOAD, _ways.LOAD_AND_RESUME),
}
_COLOURS = {
    "memory": "#a3a8ae",
    _ways.C: "#5b6470",
    _ways.OURS: "#1f6fb4",
    _ways.ION7: "#d9822b",
    _ways.LLAMA_CPP_PYTHON: "#b5443c",
}
_TURNS = {
    _ways.SAVE_FILE: "#5b6470",
    _ways.SAVE: "#d9822b",
    _ways.LOAD: "#b5443c",
    _ways.RECALL: "#3a9d6e",
    _ways.REMEMBER: "#1f6fb4",
    _ways.SEQ_RANGE: "#a3a8ae",
}
_LINES = {
    _ways.MEMCPY: "#a3a8ae",
    _ways.SNAPSHOT_OUT: "#1f6fb4",
    _ways.RESTORE: "#3a9d6e",
    _ways.SNAPSHOT: "#7a5bb5",
    _ways.SAVE: "#d9822b",
    _ways.LOAD: "#b5443c",
}


def draw(report: Report, path: Path) -> None:
    """Draw the speeds at one size, and how times change with the size.

    Args:
        report: The figures; those of one size, of several, or both.
        path: The picture, .png or .svg.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(f"a chart needs {error.name}: {pip_install('plot')}") from error
    states = [one for one in report.timings if one.section == "states"]
    sizes = [
        one for one in report.timings if one.section == "sizes" and one.configuration == _FLASH
    ]
    growth = [one for one in report.timings if one.section == "growth"]
    panels: list[tuple[int, Callable[[Axes, Sequence[Timing]], None], Sequence[Timing]]]
    panels = [(6, _draw_speeds, states), (5, _draw_sizes, sizes)]
    panels += [
        (5, _draw_growth, [one for one in growth if one.configuration == configuration])
        for configuration in (_FLASH, _PLAIN)
    ]
    panels = [panel for panel in panels if panel[2]]
    widths = [width for width, _, _ in panels] or [6]
    figure = Figure(figsize=(1.25 * sum(widths), 7.5), layout="constrained")
    places = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)
    for axes, (_, panel, timings) in zip(places[0], panels, strict=False):
        panel(axes, timings)
    facts = report.facts
    figure.suptitle("llama_state: saving and restoring", x=0.01, ha="left", weight="bold")
    figure.supxlabel(
        f"{facts['processor']}; llama.cpp {facts['llama.cpp']}; {facts['date']}; "
        f"medians of {report.rounds} rounds",
        fontsize=8,
        color="#5b6470",
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=150)


def _draw_speeds(axes: Axes, timings: Sequence[Timing]) -> None:
    """One bar for each way with flash attention, a thin one without."""
    drawn = [name for names in _GROUPS.values() for name in names]
    at = {(one.way, one.configuration): one for one in timings if one.way in drawn}
    labels: list[tuple[float, str]] = []
    y = 0.0
    for title, names in _GROUPS.items():
        there = [name for name in names if (name, _FLASH) in at]
        if not there:
            continue
        axes.text(0.01, y, title, transform=axes.get_yaxis_transform(), weight="bold", va="center")
        for name in there:
            y += 1
            _draw_way(axes, y, at[name, _FLASH], at.get((name, _PLAIN)))
            labels.append((y, name))
        y += 1.4
    axes.set_yticks([place for place, _ in labels], [name for _, name in labels])
    axes.set_ylim(y - 0.6, -0.8)
    axes.set_xlim(0, 1.12 * max((one.speed for one in at.values()), default=1))
    axes.set_xlabel("GiB/s: thick with flash attention, thin without")
    if timings:
        axes.set_title(f"One state of {timings[0].nbytes / MIB:.0f} MiB, f16", loc="left")
    _name_parties(axes, {one.party for one in at.values()})
    _bare(axes)
    axes.tick_params(axis="y", length=0)


def _draw_way(axes: Axes, y: float, flash: Timing, plain: Timing | None) -> None:
    colour = _COLOURS[flash.party]
    axes.barh(y - 0.12, flash.speed, height=0.5, color=colour)
    if plain is not None:
        axes.barh(y + 0.26, plain.speed, height=0.2, color=colour, alpha=0.55)
    axes.annotate(
        f"{flash.speed:.2g}" if flash.speed < 10 else f"{flash.speed:.1f}",
        (flash.speed, y - 0.12),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
    )


def _name_parties(axes: Axes, parties: set[str]) -> None:
    from matplotlib.patches import Patch

    there = [(party, colour) for party, colour in _COLOURS.items() if party in parties]
    handles = [Patch(color=colour, label=party) for party, colour in there]
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=9)


def _draw_sizes(axes: Axes, timings: Sequence[Timing]) -> None:
    """Milliseconds for a GiB over the size; flat is what one wants."""
    _draw_lines(axes, timings, _LINES, lambda one: 1e3 / one.speed)
    axes.set_ylabel("ms for a GiB")
    axes.set_title("The time for a byte, f16, flash attention", loc="left")


def _draw_growth(axes: Axes, timings: Sequence[Timing]) -> None:
    """Milliseconds of a turn, and of a return, over the size of what was before."""
    _draw_lines(axes, timings, _TURNS, lambda one: 1e3 * one.median)
    axes.set_ylabel("ms")
    axes.set_title(f"A turn, and all of it back, {timings[0].configuration}", loc="left")


def _draw_lines(
    axes: Axes,
    timings: Sequence[Timing],
    colours: Mapping[str, str],
    figure: Callable[[Timing], float],
) -> None:
    for way, colour in colours.items():
        points = sorted((one.nbytes / MIB, figure(one)) for one in timings if one.way == way)
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4)
        axes.annotate(
            way, points[-1], xytext=(8, 0), textcoords="offset points", va="center", color=colour
        )
    ticks = sorted({round(one.nbytes / MIB) for one in timings})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 5)
    low, high = axes.get_ylim()
    round_ones = [
        one * ten
        for ten in (0.1, 1, 10, 100, 1000)
        for one in (1, 2, 5)
        if low <= one * ten <= high
    ]
    axes.set_yticks(round_ones, [f"{tick:g}" for tick in round_ones])
    axes.minorticks_off()
    axes.set_xlabel("MiB of state")
    axes.grid(axis="y", color="#e3e5e8")
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
