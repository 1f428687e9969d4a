"""The figures as tables: plain, for a Markdown page, and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from _chats import Chats
from _small import TINY_ROUNDS
from _targets import Finding
from _targets import findings as find
from _timing import MIB, Timing, times_as_fast
from _ways import EVALUATE, LOAD, PARSE, SAVE_DURABLE

_T = TypeVar("_T")


@dataclass(frozen=True)
class Report:
    """All that was measured.

    Attributes:
        facts: Where and with what.
        rounds: Times that each way was measured.
        timings: The times.
        findings: What follows of them.
        chats: Chats that shared a system prompt.
    """

    facts: Mapping[str, str]
    rounds: int
    timings: Sequence[Timing]
    findings: Sequence[Finding]
    chats: Sequence[Chats] = ()


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column is words, the others figures.

    Attributes:
        title: What it shows.
        header: The names of the columns.
        rows: The cells.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def as_json(report: Report) -> dict[str, Any]:
    """Return what ``json.dump`` takes: facts, rounds, timings and findings all fields."""
    return {
        "facts": dict(report.facts),
        "rounds": report.rounds,
        "timings": [
            {**asdict(one), "median": one.median, "gib_per_second": one.speed}
            for one in report.timings
        ],
        "findings": [{**asdict(one), "met": one.met} for one in report.findings],
        "chats": [asdict(one) for one in report.chats],
    }


def from_json(data: Mapping[str, Any]) -> Report:
    """Return the report that :func:`as_json` was given; the findings are made anew."""
    names = [one.name for one in fields(Timing)]
    timings = [
        Timing(**{**{name: one[name] for name in names}, "seconds": tuple(one["seconds"])})
        for one in data["timings"]
    ]
    chats = [Chats(**{**one, "seconds": tuple(one["seconds"])}) for one in data.get("chats", ())]
    return Report(data["facts"], data["rounds"], timings, find(timings, chats), chats)


def as_text(report: Report) -> str:
    """Return the tables for a terminal."""
    facts = "\n".join(f"{name + ':':<13}{value}" for name, value in report.facts.items())
    return "\n\n".join([facts, *map(_plain, _tables(report)), _notes(report)])


def as_markdown(report: Report) -> str:
    """Return the same for a page."""
    facts = "\n".join(f"* {name}: {value}" for name, value in report.facts.items())
    return "\n\n".join([facts, *map(_markdown, _tables(report)), _notes(report)])


def _notes(report: Report) -> str:
    judged = [one.met for one in report.findings if one.met is not None]
    rounds = f"{report.rounds} rounds"
    if any(one.section == "tiny" for one in report.timings):
        rounds += f" ({TINY_ROUNDS * report.rounds} of the tiny state)"
    return f"""\
Medians of {rounds} in one process, the ways in another order
each round. A ratio is the median of the ratios of the rounds, with the smallest and the largest;
over sizes, of the medians. What a way returns is freed after its time. Files are new and written
with durable=False, unless it says "over" or "durable".
Targets met: {sum(judged)} of {len(judged)}."""


# -- the tables


def _tables(report: Report) -> Iterator[Table]:
    sections = {one.section for one in report.timings}
    if "states" in sections:
        yield _states(_of(report.timings, "states"))
    for section in ("conversions", "large", "servers"):
        if section in sections:
            yield _states(_of(report.timings, section))
    if "sizes" in sections:
        yield _sizes(_of(report.timings, "sizes"))
    if "growth" in sections:
        yield _growth(_of(report.timings, "growth"))
    if report.chats:
        yield _chats(report.chats)
    if "tiny" in sections:
        yield _tiny(_of(report.timings, "tiny"))
    if "real" in sections:
        yield _real(_of(report.timings, "real"))
    if "threads" in sections:
        yield _threads(_of(report.timings, "threads"))
    for table in (_targets(report.findings), _others(report.findings)):
        if table.rows:
            yield table


def _of(timings: Iterable[Timing], section: str) -> list[Timing]:
    return [one for one in timings if one.section == section]


def _states(timings: Sequence[Timing]) -> Table:
    configurations = _unique(one.configuration for one in timings)
    sizes = " or ".join(_unique(map(_size, timings)))
    at = {(one.way, one.configuration): one for one in timings}
    cells = {where: _milliseconds(one) for where, one in at.items()}
    rows = [
        [way, *(cells.get((way, name), "") for name in configurations)]
        for way in _unique(one.way for one in timings)
    ]
    return Table(f"One state of {sizes}: ms (GiB/s)", ["way", *configurations], rows)


def _milliseconds(one: Timing) -> str:
    figure = f"{1e3 * one.median:.1f}"
    # Parsing looks at few of the bytes: a speed would say nothing.
    return figure if one.way == PARSE else f"{figure} ({one.speed:.2f})"


def _sizes(timings: Sequence[Timing]) -> Table:
    title = "States of several sizes: ms for a GiB"
    return _over_sizes(title, timings, lambda one: f"{1e3 / one.speed:.0f}")


def _growth(timings: Sequence[Timing]) -> Table:
    title = "A turn of 64 tokens after states of several sizes, and all of it back: ms"
    return _over_sizes(title, timings, lambda one: f"{1e3 * one.median:.1f}")


def _over_sizes(title: str, timings: Sequence[Timing], figure: Callable[[Timing], str]) -> Table:
    sizes = _unique(map(_size, timings))
    at = {(one.way, one.configuration, _size(one)): figure(one) for one in timings}
    rows = [
        [f"{way} ({name})", *(at[way, name, size] for size in sizes)]
        for way, name in _unique((one.way, one.configuration) for one in timings)
    ]
    return Table(title, ["way", *sizes], rows)


def _chats(chats: Sequence[Chats]) -> Table:
    rows = [
        [
            f"{one.way} ({one.model})",
            f"{statistics.median(one.seconds):.3f}",
            f"{max(one.seconds):.3f}",
            f"{sum(one.seconds):.2f}",
            f"{one.evaluated:,}",
            f"{one.nbytes / MIB:.1f}",
        ]
        for one in chats
    ]
    header = ("where", "first token, s", "the slowest", "all", "tokens evaluated", "MiB kept")
    return Table(f"{len(chats[0].seconds)} chats on one system prompt", header, rows)


def _tiny(timings: Sequence[Timing]) -> Table:
    rows = [[one.way, f"{1e6 * one.median:.1f}"] for one in timings]
    title = f"A tiny sequence: {timings[0].nbytes:,} bytes, {timings[0].configuration}"
    return Table(title, ["way", "us"], rows)


def _threads(timings: Sequence[Timing]) -> Table:
    rows = [[one.way, f"{1e3 * one.median:.0f}"] for one in timings]
    title = f"Another thread in pure Python, beside a state of {_size(timings[0])}"
    return Table(title, ["way", "ms"], rows)


def _real(timings: Sequence[Timing]) -> Table:
    at = {(one.configuration, one.way): one for one in timings}
    rows = []
    for name in _unique(one.configuration for one in timings):
        took = [at[name, way] for way in (EVALUATE, SAVE_DURABLE, LOAD)]
        gain = f"{statistics.median(times_as_fast(took[2], took[0])):.0f}"
        seconds = [f"{one.median:.4f}" for one in took]
        rows.append([name, *seconds, gain, f"{took[0].nbytes:,}"])
    header = ("text", "evaluate, s", f"{SAVE_DURABLE}, s", f"{LOAD}, s", "times", "bytes")
    return Table("Texts of real models: evaluated, saved, loaded", header, rows)


def _targets(findings: Iterable[Finding]) -> Table:
    rows = [
        [one.label, one.configuration, _figure(one), one.wanted, "yes" if one.met else "NO"]
        for one in findings
        if one.met is not None
    ]
    return Table("Targets", ["times as fast", "context", "ratio", "wanted", "met"], rows)


def _others(findings: Iterable[Finding]) -> Table:
    others = [one for one in findings if one.met is None]
    configurations = _unique(one.configuration for one in others)
    at = {(one.label, one.configuration): f"{one.value:.2f}" for one in others}
    rows = [
        [label, *(at.get((label, name), "") for name in configurations)]
        for label in _unique(one.label for one in others)
    ]
    return Table("For comparison", ["times as fast", *configurations], rows)


def _figure(one: Finding) -> str:
    digits = 0 if one.value >= 100 else 1 if one.value >= 10 else 2
    return f"{one.value:.{digits}f} ({one.low:.{digits}f}-{one.high:.{digits}f})"


def _size(timing: Timing) -> str:
    return f"{timing.nbytes / MIB:.0f} MiB"


def _unique(values: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(values))


# -- the two forms


def _plain(table: Table) -> str:
    lines = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, "-" * max(map(len, drawn)), *drawn])


def _markdown(table: Table) -> str:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    drawn = (f"| {' | '.join(line)} |" for line in lines)
    return f"### {table.title}\n\n" + "\n".join(drawn)
