"""A state as a web page that needs nothing else: text, pictures to zoom into, digests.

All texts are those of the file, which can be anybody's: each is escaped, and the page allows no
script but its own, and no request at all.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from importlib.resources import files
from itertools import chain
from pathlib import Path
from string import Template
from typing import Any

from .._io.arguments import checked
from .._io.markup import LONGEST, element, escaped, table
from .magnitudes import MOST_ROWS
from .page_data import cells_data, heats_data
from .rows import Tensor, layers
from .statefile import StateFile
from .summary import Data, describe
from .text import facts
from .words import Fact, count, one_of, problem_text, size

SUFFIXES = (".html", ".htm")

_HINT = "Point at it, or use the arrow keys."
_HELP = (
    "Point at a picture to read what is there, or move in it with the arrow keys. Zoom with +"
    " and -, with the buttons, or with the wheel after a click; drag to move; 0 shows all again."
)
_BUTTONS = (("in", "+", "zoom in"), ("out", "-", "zoom out"), ("all", "all", "show all"))
_SHADES = (
    "The root mean square of the rows: each layer has a scale of its own, from dark to bright."
    " Red is far above the rest of the layer, cyan far below (1.5 times the middle half outside"
    " it), grey is without rows. The first column is the first position alone."
)
_CELLS = (
    "In the colours of the sequences, pale to full from the first position to the last. A shared"
    " cell has a band of each."
)


@checked
def render_html(file: StateFile) -> bytes:
    """Return a web page that shows a state.

    It holds what ``inspect`` says, pictures of cells, positions and magnitudes, and digests. It is
    one file that loads nothing, has at most 2 MiB whatever the state, and is the same each time. Of
    a damaged file it has what could be read. Values are shown where numpy is installed (for
    quantized ones also gguf), else the page says what is missing.

    Args:
        file: A state file; it need not be sound.
    """
    cells = cells_data(file)
    heats, notes = heats_data(file)
    style, script = _part("page.css"), _part("page.js")
    name = Path(file.path).name
    page = Template(_part("page.html")).substitute(
        title=escaped(name[:LONGEST]),
        summary=escaped(_summary(file)),
        problem=_problem(file),
        facts=fact_table(file),
        pictures="\n".join(_pictures(file, cells, heats, notes)),
        digests="\n".join(_digests(file)),
        data=_embedded({"cells": cells, "heats": heats}),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
    )
    return page.encode("utf-8", "backslashreplace")


def require_suffix(suffix: str) -> None:
    """Raise UnsupportedError unless it is that of a page: a state is not to be replaced."""
    one_of(suffix, SUFFIXES, "pages")


def fact_table(file: StateFile) -> str:
    """Return what ``inspect`` says of a file as a table."""
    return table(_joined(chain([Fact("path", file.path)], facts(describe(file)))))


def _joined(found: Iterable[Fact]) -> Iterator[tuple[str, str]]:
    """Yield name and text of each fact, with those that go on from it."""
    row: tuple[str, str] | None = None
    for key, text, indent in found:
        if row and not key:
            row = row[0], f"{row[1]}; {text}"
            continue
        if row:
            yield row
        row = f"- {key}" if indent else key, text
    if row:
        yield row


def _summary(file: StateFile) -> str:
    arch = f", {file.layout.arch}" if file.layout and file.layout.arch else ""
    return f"{file.kind}{arch}, {size(file.nbytes)}"[:LONGEST]


def _problem(file: StateFile) -> str:
    if file.problem is None:
        return ""
    text = f"This file is damaged: {problem_text(file.problem)}"[:LONGEST]
    return f'<p class="problem">{escaped(text)}</p>'


def _pictures(
    file: StateFile, cells: Sequence[Data], heats: Sequence[Data], notes: Sequence[str]
) -> Iterator[str]:
    """Yield the sections with pictures, which the script fills and shows."""
    yield "<noscript><p>The pictures need JavaScript; the text does not.</p></noscript>"
    yield '<div id="pictures" hidden>'
    if cells or heats:
        yield f'<p class="note">{escaped(_HELP)}</p>'
    for index, cache in enumerate(cells):
        yield from _section(f"cells-{index}", f"Cache {cache['name']}")
        yield _figure("positions", index, "Positions of each sequence", _holes_note(cache))
        yield _figure("cells", index, "Cells in their order", _cells_note(cache))
        yield "</section>"
    if heats or notes:
        yield from _section("heats", "Magnitudes by layer")
        yield from (f'<p class="note">{escaped(note)}</p>' for note in notes)
    if heats:
        sampled = f" Of at most {MOST_ROWS:,} rows a layer." if _sampled(file) else ""
        yield f'<p class="note">{escaped(_SHADES + sampled)}</p>'
    for index, heat in enumerate(heats):
        step = heat["step"]
        note = "" if step == 1 else f"One of {step} layers: there is no room for more."
        if not heat["of_model"]:
            note = f"Layers are counted within the cache. {note}".rstrip()
        title = f"{heat['cache']} {heat['name']}, by layer and {heat['axis']}"
        yield _figure("heat", index, title, note)
    if heats or notes:
        yield "</section>"
    yield "</div>"


def _section(name: str, title: str) -> Iterator[str]:
    yield f'<section aria-labelledby="{name}">'
    yield f'<h2 id="{name}">{escaped(title)}</h2>'


def _sampled(file: StateFile) -> bool:
    caches = file.layout.caches if file.layout else ()
    return any(sum(map(len, cache.cells)) > MOST_ROWS for cache in caches)


def _holes_note(cache: Data) -> str:
    holes = sum(held["holes"] for held in cache["sequences"])
    text = count(holes, "hole") if holes else "No holes"
    if cache["closed"]:
        text += (
            f", too many to draw: those of up to {count(cache['closed'], 'position')} are closed"
        )
    return f"{text}."


def _cells_note(cache: Data) -> str:
    text = _CELLS
    if cache["per"] > 1:
        text += f" A square is {cache['per']} cells."
    if not all(stream["exact"] for stream in cache["streams"]):
        text += " There are too many to list: a colour is that of a block of cells."
    return text


def _figure(kind: str, index: int, title: str, note: str) -> str:
    buttons = "".join(
        f'<button type="button" data-act="{act}" aria-label="{label}">{text}</button>'
        for act, text, label in _BUTTONS
    )
    label = escaped(f"{title}. Arrow keys move, plus and minus zoom, 0 shows all.")
    return (
        f'<figure data-kind="{kind}" data-index="{index}">'
        f"{element('figcaption', title)}"
        f'<p class="note">{escaped(note)}</p>'
        f'<canvas tabindex="0" role="application" aria-label="{label}"></canvas>'
        f'<div class="bar">{buttons}{element("output", _HINT)}</div></figure>'
    )


def _digests(file: StateFile) -> Iterator[str]:
    """Yield the digests that a checkpoint has, and those of the tensors as they are here."""
    if file.digests:
        damaged = set(file.digests.damaged)
        parts = (
            (
                part.name,
                f"{part.offset:,}",
                f"{part.stored:,}",
                "DAMAGED" if part in damaged else "sound",
                part.digest.hex(),
            )
            for part in file.digests.parts
        )
        head = ("part", "at byte", "bytes", "it is", "recorded digest")
        kind = "HMAC-SHA256" if file.digests.keyed else "XXH3-128"
        yield _details(
            f"{count(len(file.digests.parts), 'part')} of the checkpoint",
            table(parts, head=head, caption=f"{kind}, as the file has them, 16 bytes each"),
        )
    else:
        yield "<p>The file has none: native states have no checksums.</p>"
    if tensors := list(_tensors(file)):
        rows = ((*about, _tensor_digest(file.state, streams)) for *about, streams in tensors)
        columns = ("tensor", "type", "rows", "at byte of the state", "bytes", "SHA-256")
        caption = "The first 16 bytes of SHA-256 over the rows of a layer, stream after stream"
        yield _details(count(len(tensors), "tensor"), table(rows, head=columns, caption=caption))


def _details(summary: str, content: str) -> str:
    return f"<details>{element('summary', summary)}\n{content}</details>"


def _tensors(file: StateFile) -> Iterator[tuple[Any, ...]]:
    """Yield the cells of a row about each layer's tensor, and its parts."""
    for cache in file.layout.caches if file.layout else ():
        for layer in layers(cache):
            parts = [part for part in layer.streams if part and part.n_row * part.row]
            if not parts:
                continue
            yield (
                f"{cache.name} {layer.index} {layer.name}",
                parts[0].type.name,
                f"{sum(part.n_row for part in parts):,}",
                f"{parts[0].offset:,}",
                f"{sum(part.n_row * part.row for part in parts):,}",
                parts,
            )


def _tensor_digest(state: memoryview, parts: Sequence[Tensor]) -> str:
    digest = sha256()
    for part in parts:
        digest.update(state[part.offset : part.offset + part.n_row * part.row])
    return digest.hexdigest()[:32]


def _embedded(data: Any) -> str:
    """Return data as JSON that no text in it can end before its element does."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _part(name: str) -> str:
    return (files(__package__) / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return what a content security policy calls a script or a style by."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
