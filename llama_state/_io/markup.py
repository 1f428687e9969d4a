"""HTML made of text that nobody has checked: names of files, metadata of others."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["element", "escaped", "plain", "table"]

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


def table(
    rows: Iterable[Sequence[object]], *, head: Sequence[str] = (), caption: str = "", rest: str = ""
) -> str:
    """Return a table, of which the first cell of each row is its name.

    Args:
        rows: The cells of each row.
        head: The names of the columns.
        caption: What the table shows.
        rest: What to say below the rows, of those that are not there.
    """
    parts = ["<table>"]
    if caption:
        parts.append(element("caption", caption))
    if head:
        names = "".join(f'<th scope="col">{escaped(name)}</th>' for name in head)
        parts.append(f"<thead><tr>{names}</tr></thead>")
    parts.append("<tbody>")
    width = len(head)
    for name, *cells in rows:
        width = max(width, 1 + len(cells))
        first = f'<th scope="row">{escaped(name)}</th>'
        parts.append(f"<tr>{first}{''.join(element('td', cell) for cell in cells)}</tr>")
    if rest:
        parts.append(f'<tr><td colspan="{width}">{escaped(rest)}</td></tr>')
    return "\n".join([*parts, "</tbody>", "</table>"])
