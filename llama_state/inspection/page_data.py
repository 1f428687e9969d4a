"""What the script of a page draws: numbers that stay small whatever the state.

Cells are runs of neighbours with neighbouring positions and the same owners: few in most states. Of
more than a page has room for, blocks of cells stand for them, and the page says so.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, isfinite, isnan

from ..errors import UnsupportedError
from ..layout import UNKNOWN_ID, Cells
from .layer_numbers import layer_numbers
from .magnitudes import Magnitudes, magnitudes, shades
from .rows import positions_by_sequence
from .statefile import StateFile
from .summary import Data
from .words import Ranges, ranges

MOST_RUNS = 12_000
"""The most runs or blocks of cells of a page."""
MOST_POSITIONS = 10_000
"""The most runs of positions of a page."""
MOST_VALUES = 40_000
"""The most squares of heat maps of a page."""
MOST_SQUARES = 16_384
"""The most squares of a picture of cells; of more cells, a square stands for several."""
_MOST_NAMED = 8
"""Owners of a cell that are named; of more, the number."""
_UNDER, _OVER = -1, 101


@dataclass(slots=True)
class _Owners:
    """The different sets of owners that cells have, each once."""

    sets: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    numbers: dict[tuple[int, ...], int] = field(default_factory=lambda: {(): 0})

    def number(self, owners: tuple[int, ...]) -> int:
        """Return the number of a set."""
        if owners not in self.numbers:
            self.numbers[owners] = len(self.sets)
            self.sets.append(owners)
        return self.numbers[owners]

    def of(self, cells: Cells) -> array[int]:
        """Return the number of the set of each cell."""
        found = array("i", [0]) * len(cells)
        more: dict[tuple[int, int], int] = {}
        for seq_id in sorted(cells.owners):
            for index in cells.owners[seq_id]:
                step = found[index], seq_id
                if step not in more:
                    more[step] = self.number((*self.sets[step[0]], seq_id))
                found[index] = more[step]
        return found

    def listed(self, used: Sequence[int]) -> tuple[dict[int, int], list[list[int]]]:
        """Return the place in a list of each of the sets that are used, and that list."""
        places = {number: place for place, number in enumerate(dict.fromkeys(used))}
        sets = [self.sets[number] for number in places]
        return places, [[len(owners), *owners[:_MOST_NAMED]] for owners in sets]


def cells_data(file: StateFile) -> list[Data]:
    """Return for each cache that has cells its streams and the positions of its sequences.

    Of a damaged state, what could be read of its cells is one cache.
    """
    caches = [(cache.name, cache.cells) for cache in file.layout.caches] if file.layout else []
    caches = caches or [("damaged", file.leading_cells)]
    shown = [(name, streams) for name, streams in caches if any(map(len, streams))]
    n_stream = sum(1 for _, streams in shown for cells in streams if len(cells))
    n_owner = sum(len(positions_by_sequence(streams)) for _, streams in shown)
    return [
        {
            "name": name,
            **_positions(streams, MOST_POSITIONS // max(n_owner, 1)),
            **_streams(streams, MOST_RUNS // n_stream),
        }
        for name, streams in shown
    ]


def _positions(streams: Sequence[Cells], most: int) -> Data:
    """Return the runs of positions of each sequence, of which there are at most *most*."""
    held = positions_by_sequence(streams)
    closed, sequences = 0, []
    for seq_id, positions in held.items():
        runs = ranges(positions)
        holes = len(runs) - 1
        if len(runs) > most:
            runs, gap = _merged(runs, most)
            closed = max(closed, gap)
        flat = [number for run in runs for number in run]
        sequences.append({"id": _id(seq_id), "cells": len(positions), "holes": holes, "runs": flat})
    return {"sequences": sequences, "closed": closed}


def _merged(runs: Ranges, most: int) -> tuple[list[tuple[int, int]], int]:
    """Close the smallest holes between runs; return at most *most* runs, and the largest hole."""
    gaps = sorted(range(1, len(runs)), key=lambda i: runs[i][0] - runs[i - 1][1])
    close = set(gaps[: len(runs) - most])
    merged: list[tuple[int, int]] = []
    for index, (first, last) in enumerate(runs):
        if index in close:
            merged[-1] = merged[-1][0], last
        else:
            merged.append((first, last))
    return merged, max(runs[i][0] - runs[i - 1][1] - 1 for i in close)


def _streams(streams: Sequence[Cells], most: int) -> Data:
    owners = _Owners()
    shown: list[tuple[int, int, bool, list[list[int]]]] = []
    for index, cells in enumerate(streams):
        if len(cells):
            own = owners.of(cells)
            runs = list(_first(_runs(cells, own), most + 1))
            exact = len(runs) <= most
            if not exact:
                runs = list(_blocks(cells, own, owners, -(-len(cells) // most)))
            shown.append((index, len(cells), exact, runs))
    places, sets = owners.listed([run[4] for *_, runs in shown for run in runs])
    return {
        "owners": [[n, *map(_id, ids)] for n, *ids in sets],
        "n_stream": len(streams),
        "per": ceil(sum(n_cell for _, n_cell, *_ in shown) / MOST_SQUARES),
        "streams": [
            {
                "index": index,
                "cells": n_cell,
                "exact": exact,
                # Five numbers each: first cell, cells, lowest position, highest, owners.
                "runs": [number for run in runs for number in (*run[:4], places[run[4]])],
            }
            for index, n_cell, exact, runs in shown
        ],
    }


def _runs(cells: Cells, own: Sequence[int]) -> Iterator[list[int]]:
    """Yield the runs of cells whose positions follow each other: see :func:`_streams`."""
    run: list[int] = []
    for index, (position, owners) in enumerate(zip(cells.positions, own, strict=True)):
        if run and position == run[3] + 1 and owners == run[4]:
            run[1] += 1
            run[3] = position
            continue
        if run:
            yield run
        run = [index, 1, position, position, owners]
    if run:
        yield run


def _blocks(cells: Cells, own: Sequence[int], owners: _Owners, step: int) -> Iterator[list[int]]:
    """Yield blocks of *step* cells, each with all the owners that there are in it."""
    for start in range(0, len(cells), step):
        positions = cells.positions[start : start + step]
        together = {seq_id for n in set(own[start : start + step]) for seq_id in owners.sets[n]}
        number = owners.number(tuple(sorted(together)))
        yield [start, len(positions), min(positions), max(positions), number]


def _first(runs: Iterator[list[int]], most: int) -> Iterator[list[int]]:
    """Yield at most *most* of the runs."""
    for _, run in zip(range(most), runs, strict=False):
        yield run


def heats_data(file: StateFile) -> tuple[list[Data], list[str]]:
    """Return the heat maps of all caches, and what is to be said of those that cannot be drawn."""
    layout = file.layout
    if layout is None or file.problem is not None:
        return [], []
    found: list[tuple[str, Magnitudes]] = []
    notes: dict[str, None] = {}
    for cache in layout.caches:
        try:
            found += [(cache.name, heat) for heat in magnitudes(file.state, cache)]
        except UnsupportedError as error:
            notes[f"no magnitudes of {cache.name}: {error}"] = None
    numbers = layer_numbers(layout)
    columns = sum(heat.rms.shape[1] for _, heat in found)
    most = max(1, MOST_VALUES // max(columns, 1))
    return [_heat(name, heat, numbers.get(name), most) for name, heat in found], list(notes)


def _heat(cache: str, heat: Magnitudes, numbers: Sequence[int] | None, most: int) -> Data:
    """Return a heat map of at most *most* layers, evenly spaced."""
    n_layer = len(heat.layers)
    lines = range(0, n_layer, -(-n_layer // most))
    shade = shades(heat)
    return {
        "cache": cache,
        "name": heat.name,
        "axis": heat.axis,
        "edges": [ceil(edge) for edge in heat.edges.tolist()],
        "layers": [numbers[heat.layers[i]] if numbers else heat.layers[i] for i in lines],
        "of_model": numbers is not None,
        "step": lines.step,
        "rms": [[_rounded(value) for value in heat.rms[i].tolist()] for i in lines],
        "shade": [[_percent(value) for value in shade[i].tolist()] for i in lines],
    }


def _rounded(value: float) -> float | str | None:
    """Return a number of three digits; None for NaN, and a text for what JSON cannot hold."""
    if isnan(value):
        return None
    return float(f"{value:.3g}") if isfinite(value) else "infinite"


def _percent(shade: float) -> int | None:
    """Return a shade in percent, with marks for what is far below and far above."""
    if isnan(shade):
        return None
    if -1e-9 <= shade <= 1 + 1e-9:  # rounding is not far outside
        return round(100 * shade)
    return _UNDER if shade < 0 else _OVER


def _id(seq_id: int) -> int | None:
    return None if seq_id == UNKNOWN_ID else seq_id
