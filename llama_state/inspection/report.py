"""A comparison as plain data for JSON, and as text for a terminal of 80 columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from math import isfinite
from typing import Any

from .diff import Comparison, RowDifference
from .words import count, fact, ranges_text


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
    for field in comparison.fields:
        yield fact(field.name, f"{field.saved} | {field.current}")
    for positions in comparison.positions:
        cache, seq_id = positions.cache, positions.seq_id
        name = cache if seq_id is None else f"{cache}, seq. {seq_id}"
        only = (("first", positions.only_a), ("second", positions.only_b))
        texts = [f"only in the {which}: {ranges_text(runs)}" for which, runs in only if runs]
        yield fact(name, "; ".join(texts))
    if comparison.rows:
        yield _table(comparison)
    elif not comparison.equal:
        yield iter(["the states have no rows in common that can be compared"])
    yield _rotated(comparison)
    if comparison.moved:
        rows = count(comparison.moved, "row is", "rows are")
        yield iter([f"{rows} in other cells, which is not a difference"])
    if not comparison.computed:
        yield iter(["to compare values, install numpy and gguf: pip install 'llama-state[plot]'"])
    yield iter(["the states are equal" if comparison.equal else "the states differ"])


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


def _rotated(comparison: Comparison) -> Iterator[str]:
    """Yield for each cache what was rotated in one of the two states only."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for row in comparison.rows:
        if row.rotation:
            found[row.cache][f"{row.name} by {row.rotation}"] = None
    for cache, texts in found.items():
        yield from fact(cache, f"rotated in one of the two, which was undone: {', '.join(texts)}")


def _column(value: float | None) -> str:
    return f"{'-':>12}" if value is None else f"{value:>12.3g}"
