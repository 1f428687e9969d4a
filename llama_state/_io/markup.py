"""HTML made of text that nobody has checked: names of files, metadata of others."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["LONGEST", "MOST_CHARACTERS", "element", "escaped", "plain", "table"]

MOST_CHARACTERS = 120_000
"""The most characters of the rows of a table."""
LONGEST = 2_000
"""The most characters of a text in a table, before they are escaped."""
_HIDDEN = frozenset({"Cc", "Cf", "Cs"})
"""Control characters, those that turn the direction of text, and halves of characters."""


def plain(text: str) -> str:
    """Return *text* with characters that do not show as an escape: they can make it look false."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _HIDDEN else char
        for char in text
    )


def escaped(text: object) -> str:
    """Return a text for HTML, inside an element or an attribute in quotes."""
    return escape(plain(str(text)))


def element(tag: str, text: object) -> str:
    """Return an element that holds a text."""
    return f"<{tag}>{escaped(text)}</{tag}>"


def table(rows: Iterable[Sequence[object]], *, head: Sequence[str] = (), caption: str = "") -> str:
    """Return a table, of which the first cell of each row is its name.

    However much there is to tell, it is small: long texts are cut, and the rows for which there is
    no room are counted.

    Args:
        rows: The cells of each row.
        head: The names of the columns.
        caption: What the table shows.
    """
    shown: list[str] = []
    room, more, width = MOST_CHARACTERS, 0, len(head)
    for name, *cells in rows:
        width = max(width, 1 + len(cells))
        first = f'<th scope="row">{_cut(name)}</th>'
        row = f"<tr>{first}{''.join(f'<td>{_cut(cell)}</td>' for cell in cells)}</tr>"
        room -= len(row)
        if room < 0:
            more += 1
        else:
            shown.append(row)
    if more:
        rest = f"rows for which there is no room: {more:,}"
        shown.append(f'<tr><td colspan="{width}">{rest}</td></tr>')
    names = "".join(f'<th scope="col">{escaped(name)}</th>' for name in head)
    parts = [
        "<table>",
        *([f"<caption>{_cut(caption)}</caption>"] if caption else []),
        *([f"<thead><tr>{names}</tr></thead>"] if head else []),
        "<tbody>",
        *shown,
        "</tbody>",
        "</table>",
    ]
    return "\n".join(parts)


def _cut(text: object) -> str:
    full = str(text)
    return escaped(full if len(full) <= LONGEST else full[:LONGEST] + "...")
