"""Texts for people: numbers with units, ranges, paragraphs of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..errors import FormatError, TruncatedError, UnsupportedError

WIDTH = 80
KEY_WIDTH = 17

Ranges = Sequence["tuple[int, int]"]
"""(first, last) each, increasing."""


class Fact(NamedTuple):
    """A line of a description; the key is empty where it goes on from the line before."""

    key: str
    text: str
    indent: int = 0


def size(nbytes: int) -> str:
    """Return a number of bytes with a suitable unit."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):,.1f} {unit}"
    return f"{nbytes} B"


def count(number: int, what: str, plural: str = "") -> str:
    """Return *number* and its noun, singular or plural."""
    return f"{number:,} {what if number == 1 else plural or what + 's'}"


def problem_text(error: Exception) -> str:
    """Return the text of an error for people, with offset and sizes."""
    if isinstance(error, TruncatedError):
        where = "" if error.offset is None else f", at byte {error.offset:,}"
        return (
            f"cut off in {error.reason}{where}: {error.need:,} bytes needed, {error.have:,} there"
        )
    if isinstance(error, FormatError):
        return error.reason + ("" if error.offset is None else f", at byte {error.offset:,}")
    return str(error)


def one_of(suffix: str, suffixes: Sequence[str], what: str) -> None:
    """Raise UnsupportedError unless a suffix is one of *suffixes*, those of *what*."""
    if suffix.lower() not in suffixes:
        formats = " or ".join(suffixes)
        raise UnsupportedError(f"{what} are {formats}, not {suffix or 'without a suffix'}")


def ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the runs of consecutive numbers: (first, last) each."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def ranges_text(runs: Ranges, *, most: int = 4) -> str:
    """Return runs as "0-511, 520-611 (1 hole)"; of many, the first ones and the last."""
    if not runs:
        return "none"
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if len(texts) > most:
        texts[most - 1 : -1] = ["..."]
    holes = f" ({count(len(runs) - 1, 'hole')})" if len(runs) > 1 else ""
    return ", ".join(texts) + holes


def first_few(items: Sequence[object], *, most: int = 12) -> str:
    """Return the first items, separated by commas, with dots if there are more."""
    dots = ["..."] if len(items) > most else []
    return ", ".join([*map(str, items[:most]), *dots])


def paragraph(text: str) -> list[str]:
    """Return the lines of a wrapped text, all but the first indented."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def fact(key: str, text: str, *, indent: int = 0) -> Iterator[str]:
    """Yield the lines of a fact: its name, and its text in a second column."""
    head = " " * indent + key.ljust(KEY_WIDTH - indent)
    head = head if head.endswith("  ") else head.rstrip() + "  "
    yield from textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * max(KEY_WIDTH, len(head)),
        break_on_hyphens=False,
    ) or [head.rstrip()]
