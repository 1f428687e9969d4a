"""A comparison as plain data for JSON and as text for a terminal of 80 columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from math import isfinite
from typing import Any

from .diff import Comparison, RowDifference
from .words import count, fact, ranges_text


def as_dict(found: Comparison) -> dict[str, Any]:
    """Return a comparison as plain data."""
    return {
        "equal": found.equal,
        "fields": [{"name": f.name, "a": f.saved, "b": f.current} for f in found.fields],
        "positions": [asdict(one) for one in found.positions],
        "rows": [
            {**asdict(row), "max_abs": _number(row.max_abs), "relative": _number(row.relative)}
            for row in found.rows
        ],
        "moved": found.moved,
        "computed": found.computed,
    }


def _number(value: float | None) -> float | str | None:
    """Return what JSON can hold: it has no infinity."""
    return value if value is None or isfinite(value) else str(value)


def text(found: Comparison) -> str:
    """Return a comparison for a terminal of 80 columns."""
    return "\n".join(chain.from_iterable(_paragraphs(found)))


def _paragraphs(found: Comparison) -> Iterator[Iterator[str]]:
    for field in found.fields:
        yield fact(field.name, f"{field.saved} | {field.current}")
    for one in found.positions:
        name = one.cache if one.seq_id is None else f"{one.cache}, seq. {one.seq_id}"
        only = (("first", one.only_a), ("second", one.only_b))
        told = [f"only in the {which}: {ranges_text(runs)}" for which, runs in only if runs]
        yield fact(name, "; ".join(told))
    if found.rows:
        yield _table(found)
    elif not found.equal:
        yield iter(["there are no rows of both that can be compared"])
    if found.moved:
        rows = count(found.moved, "row is", "rows are")
        yield iter([f"{rows} in other cells, which is no difference"])
    if not found.computed:
        yield iter(
            ["by how much rows differ needs numpy and gguf: pip install 'llama-state[plot]'"]
        )
    yield iter(["the states are equal" if found.equal else "the states differ"])


def _table(found: Comparison) -> Iterator[str]:
    """Yield a line for each layer that differs, and one for each cache that does not."""
    yield f"{'cache':<12}{'layer':>6}{'rows':>17}{'differ':>9}{'max abs':>12}{'relative':>12}"
    groups: dict[str, list[RowDifference]] = defaultdict(list)
    for row in found.rows:
        groups[row.cache].append(row)
    for cache, rows in groups.items():
        differing = [row for row in rows if row.n_differ]
        for row in differing:
            numbers = (
                f"{row.n_row:>9,}{row.n_differ:>9,}",
                *map(_told, (row.max_abs, row.relative)),
            )
            yield f"{cache:<12}{row.layer:>6}  {row.name:<6}" + "".join(numbers)
        if equal := len(rows) - len(differing):
            others = "other " * bool(differing)
            n_row = max(row.n_row for row in rows)
            yield f"{cache:<12}all rows of {count(equal, f'{others}tensor')} equal ({n_row:,} each)"


def _told(value: float | None) -> str:
    return f"{'-':>12}" if value is None else f"{value:>12.3g}"
