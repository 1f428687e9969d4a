"""What a prefix store holds, as text for people."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from ..inspection.words import KEY_WIDTH, count, fact, size

if TYPE_CHECKING:
    from ..store.results import Contents, Copied, Entry, Match, StoredChunk, Verified

_DIGITS: Final = 16  # of a key, in tables
_FOR_EVER: Final = float(1 << 32)
_KINDS: Final[Mapping[str, str]] = {
    "R": "rows",
    "W": "rows of windows",
    "S": "states at points",
    "L": "logits",
    "N": "namespaces",
    "P": "pins",
}


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the lines of a table of stored prompts."""
    if not entries:
        yield "nothing is stored"
        return
    rows = [("namespace", "model", "tokens", "bytes", "own", "last used", "pinned", "key")]
    rows += [
        (
            entry.namespace or "-",
            entry.model or "?",
            f"{entry.n_tokens:,}",
            size(entry.nbytes),
            size(entry.own_bytes),
            _time(entry.used),
            _pinned(entry.pinned_until),
            entry.key[:_DIGITS],
        )
        for entry in entries
    ]
    yield from _aligned(rows, numbers={2, 3, 4})


def prompt(entry: Entry, facts: Mapping[str, Any], chunks: Sequence[StoredChunk]) -> Iterator[str]:
    """Yield the lines of one stored prompt."""
    yield "key".ljust(KEY_WIDTH) + entry.key  # never in two lines
    yield from fact("namespace", entry.namespace or "-")
    yield from fact("tokens", f"{entry.n_tokens:,}")
    yield from fact("positions", f"{entry.n_positions:,}")
    yield from fact("bytes", f"{size(entry.nbytes)}, {size(entry.own_bytes)} of them its own")
    yield from fact("last used", _time(entry.used))
    yield from fact("pinned", _pinned(entry.pinned_until))
    yield from fact("restore points", ", ".join(map(str, entry.restore_points)) or "none")
    yield ""
    yield "computed with"
    for name, text in facts["identity"].items():
        if name != "namespace":
            yield from fact(name, text, indent=2)
    yield ""
    rows = [("positions", "tokens", "bytes", "stored", "goes on", "key")]
    rows += [
        (
            f"{chunk.start}-{chunk.end - 1}",
            f"{chunk.n_tokens:,}",
            size(sum(chunk.kinds.values())),
            " ".join(sorted(chunk.kinds)),
            str(chunk.n_next),
            chunk.key[:_DIGITS],
        )
        for chunk in chunks
    ]
    yield from _aligned(rows, numbers={1, 2, 4})
    if "text" in facts:
        yield from ("", facts["text"])
    elif "tokens" in facts:
        ids = ("media" if token is None else str(token) for token in facts["tokens"])
        yield from ("", " ".join(ids))


def figures(contents: Contents) -> Iterator[str]:
    """Yield the lines of what is in a store."""
    yield from fact("store", contents.location)
    yield from fact("bytes", size(contents.used_bytes))
    yield from fact("prompts", f"{contents.n_prompts:,}, {contents.pinned:,} of them pinned")
    yield from fact("objects", f"{contents.n_objects:,}, {size(contents.object_bytes)}")
    for kind, (number, nbytes) in contents.kinds.items():
        yield from fact(_KINDS[kind], f"{number:,}, {size(nbytes)}", indent=2)
    yield from fact("models", _counted(contents.models))
    yield from fact("namespaces", _counted(contents.namespaces))


def found(match: Match, n_tokens: int) -> Iterator[str]:
    """Yield the lines of what is stored of a prompt."""
    yield from fact("tokens", f"{match.n_tokens:,} of {n_tokens:,}")
    yield from fact("bytes", size(match.nbytes))
    yield from fact("why", str(match.why))


def warmed(facts: Mapping[str, int]) -> Iterator[str]:
    """Yield the lines of what was stored of a prompt."""
    yield from fact("tokens", f"{facts['n_tokens']:,}, {facts['recalled']:,} were stored before")
    yield from fact("written", size(facts["nbytes"]))


def verdict(verified: Verified) -> Iterator[str]:
    """Yield the lines of a verification."""
    yield f"{count(verified.n_objects, 'object')}, {size(verified.nbytes)}"
    for name in verified.damaged:
        yield f"damaged, {'set aside' if verified.repaired else 'not used'}: {name}"
    for name in verified.orphans:
        yield f"of no use, {'removed' if verified.repaired else 'its beginning is gone'}: {name}"
    if verified.foreign:
        yield f"cannot be read, left alone: {count(verified.foreign, 'object')}, of another key"
    if verified.ok:
        yield "all sound"


def copied(result: Copied) -> Iterator[str]:
    """Yield the lines of a copy."""
    yield f"{count(result.n_objects, 'object')} copied, {size(result.nbytes)}"
    yield f"{result.present:,} were there"
    for name in result.damaged:
        yield f"damaged, not copied: {name}"
    if result.left_out:
        yield f"{result.left_out:,} not copied: no room, or what they go on from is missing"


def _aligned(rows: Sequence[tuple[str, ...]], *, numbers: set[int]) -> Iterator[str]:
    """Yield rows in columns, those of *numbers* to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            text.rjust(width) if column in numbers else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _pinned(until: float | None) -> str:
    if until is None or until <= time.time():
        return "no"
    return "yes" if until >= _FOR_EVER else f"to {_time(until)}"


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name or '-'} ({number:,})" for name, number in numbers.items()) or "none"
