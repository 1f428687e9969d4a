"""A comparison as plain data for JSON, and as text for a terminal of 80 columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from math import isfinite
from typing import Any

from .._install import pip_install
from .._io.markup import element, table
from .diff import Comparison, RowDifference
from .words import Fact, count, fact, ranges_text


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain data."""
    return {
        "equal": comparison.equal,
        "fields": [{"name": f.name, "a": f.saved, "b": f.current} for f in comparison.fields],
        "positions": [asdict(difference) for difference in comparison.positions],
        "rows": [
            {**asdict(row), "max_abs": _number(row.max_abs), "relative": _number(row.relative)}
            for row in comparison.rows
        ],
        "moved": comparison.moved,
        "computed": comparison.computed,
    }


def _number(value: float | None) -> float | str | None:
    """Return a number, or its text if JSON cannot hold it (infinity, NaN)."""
    return value if value is None or isfinite(value) else str(value)


def text(comparison: Comparison) -> str:
    """Return a comparison for a terminal of 80 columns."""
    return "\n".join(chain.from_iterable(_paragraphs(comparison)))


def _paragraphs(comparison: Comparison) -> Iterator[Iterator[str]]:
    for key, told, _ in _heads(comparison):
        yield fact(key, told)
    if comparison.rows:
        yield _table(comparison)
    for key, told, _ in _rotated(comparison):
        yield fact(key, told)
    yield _notes(comparison)


def tables(comparison: Comparison) -> str:
    """Return a comparison as HTML: tables, and a line below each other for the rest."""
    parts = []
    if found := [(key, told) for key, told, _ in (*_heads(comparison), *_rotated(comparison))]:
        parts.append(table(found, head=("what differs", "first | second")))
    head = ("cache", "layer", "rows", "of them differ", "max abs", "relative")
    rows = [
        (
            row.cache,
            f"{row.layer} {row.name}",
            f"{row.n_row:,}",
            f"{row.n_differ:,}",
            *map(str.strip, map(_column, (row.max_abs, row.relative))),
        )
        for row in comparison.rows
        if row.n_differ
    ]
    if rows:
        parts.append(table(rows, head=head))
    return "\n".join([*parts, *(element("p", note) for note in _notes(comparison))])


def _heads(comparison: Comparison) -> Iterator[Fact]:
    """Yield the fields and the positions that differ."""
    for field in comparison.fields:
        yield Fact(field.name, f"{field.saved} | {field.current}")
    for positions in comparison.positions:
        cache, seq_id = positions.cache, positions.seq_id
        name = cache if seq_id is None else f"{cache}, seq. {seq_id}"
        only = (("first", positions.only_a), ("second", positions.only_b))
        texts = [f"only in the {which}: {ranges_text(runs)}" for which, runs in only if runs]
        yield Fact(name, "; ".join(texts))


def _notes(comparison: Comparison) -> Iterator[str]:
    if not comparison.rows and not comparison.equal:
        yield "the states have no rows in common that can be compared"
    if comparison.moved:
        rows = count(comparison.moved, "row is", "rows are")
        yield f"{rows} in other cells, which is not a difference"
    if not comparison.computed:
        yield f"values need numpy, gguf: {pip_install('plot')}"
    yield "the states are equal" if comparison.equal else "the states differ"


def _table(comparison: Comparison) -> Iterator[str]:
    """Yield a line for each layer that differs, and one for all others of a cache."""
    yield f"{'cache':<12}{'layer':>6}{'rows':>17}{'differ':>9}{'max abs':>12}{'relative':>12}"
    groups: dict[str, list[RowDifference]] = defaultdict(list)
    for row in comparison.rows:
        groups[row.cache].append(row)
    for cache, rows in groups.items():
        differing = [row for row in rows if row.n_differ]
        for row in differing:
            counts = f"{row.n_row:>9,}{row.n_differ:>9,}"
            sizes = _column(row.max_abs) + _column(row.relative)
            yield f"{cache:<12}{row.layer:>6}  {row.name:<6}{counts}{sizes}"
        if n_equal := len(rows) - len(differing):
            tensors = count(n_equal, "other tensor" if differing else "tensor")
            n_row = max(row.n_row for row in rows)
            yield f"{cache:<12}all rows of {tensors} equal ({n_row:,} each)"


def _rotated(comparison: Comparison) -> Iterator[Fact]:
    """Yield for each cache what was rotated in one of the two states only."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for row in comparison.rows:
        if row.rotation:
            found[row.cache][f"{row.name} by {row.rotation}"] = None
    for cache, texts in found.items():
        yield Fact(cache, f"rotated in one of the two, which was undone: {', '.join(texts)}")


def _column(value: float | None) -> str:
    return f"{'-':>12}" if value is None else f"{value:>12.3g}"
