"""The builds of libllama that are there, and the command that lists them: ``doctor``."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .. import __version__
from .output import print_json
from .parsers import Commands, add_command
from .status import Status

if TYPE_CHECKING:
    from .._llama.library import Library

PlaceStatus: TypeAlias = Literal["used", "not used", "not usable", "absent"]


@dataclass(frozen=True, slots=True)
class Place:
    """A place where a libllama is looked for.

    Attributes:
        place: Its description.
        path: The file that was found there, or None.
        status: "used"; "not used": a place above comes first; "not usable": the file there does
            not work; "absent": there is no file.
        reason: Why it is not usable or absent.
    """

    place: str
    path: str | None
    status: PlaceStatus
    reason: str | None


def add_commands(commands: Commands) -> None:
    """Add ``doctor``."""
    doctor = add_command(
        commands,
        "doctor",
        run_doctor,
        summary="show which libllama is used, and why",
        details="Find and load a libllama as llama_state does. Print its file, its versions, what"
        " it can do, and every place that was looked at, in order.",
        example="llama-state doctor --json",
        exits={
            0: "there is a usable libllama",
            1: "there is none",
            2: "wrong use, or the extension of llama_state is not built",
        },
    )
    doctor.add_argument(
        "--library",
        metavar="PATH",
        help="look at this libllama, a shared library or a folder that holds one, and at no other",
    )
    doctor.add_argument("--json", action="store_true", help="print the same facts as JSON")


def run_doctor(options: argparse.Namespace) -> Status:
    """Show which libllama is used, what it can do, and which others are there."""
    from .._llama.discovery import advice

    library, places = _examined(options.library)
    if options.json:
        print_json(_as_dict(library, places))
    else:
        print("\n".join(_lines(library, places)))
    if library is None:
        tried = [(place.place, place.reason or "") for place in places]
        print(advice(options.library, tried), file=sys.stderr)
        return Status.NO
    return Status.OK


def _examined(path: str | None) -> tuple[Library | None, list[Place]]:
    """Return the library that is used and all places; load no library after the used one."""
    from .._llama.discovery import candidates, examine

    remaining = list(candidates(path))  # before the process holds the one that is used
    library, places = None, []
    for verdict in examine(path):
        library, found = verdict.library, verdict.candidate.path
        if library:
            status: PlaceStatus = "used"
        else:
            status = "not usable" if found else "absent"
        places.append(_place(verdict.candidate.place, found, status, verdict.why))
        if library:
            break
    for candidate in remaining[len(places) :]:
        status = "not used" if candidate.path else "absent"
        places.append(_place(candidate.place, candidate.path, status, candidate.why))
    return library, places


def _place(place: str, path: object, status: PlaceStatus, reason: str) -> Place:
    return Place(place, str(path) if path else None, status, reason or None)


def _capabilities(library: Library) -> dict[str, bool]:
    from .._llama.library import CAPABILITIES

    return {name: name in library.capabilities for name in CAPABILITIES}


def _as_dict(library: Library | None, places: list[Place]) -> dict[str, Any]:
    """Return the facts as JSON takes them; docs/guide.md lists the keys."""
    facts = library and {
        "path": str(library.path),
        "source": library.source,
        "build": library.build or None,
        "session_version": library.session_version,
        "sequence_version": library.sequence_version,
        "sequence_head": library.sequence_head,
        "capabilities": _capabilities(library),
    }
    return {"llama_state": __version__, "library": facts, "places": [*map(asdict, places)]}


def _lines(library: Library | None, places: list[Place]) -> Iterator[str]:
    """Yield the facts as text."""
    yield _fact("llama_state", __version__)
    if library is None:
        yield _fact("libllama", "none that can be used")
    else:
        yield from _library_lines(library)
    yield "\nplaces, in the order in which they are looked at"
    for place in places:
        yield from _place_lines(place)


def _library_lines(library: Library) -> Iterator[str]:
    yield _fact("libllama", library.path)
    yield _fact("found by", library.source)
    yield _fact("build", library.build or "does not say")
    yield _fact("session files", f"version {library.session_version}")
    yield _fact("sequence files", f"version {library.sequence_version}")
    head = "with" if library.sequence_head else "without"
    yield _fact("sequence blobs", f"{head} the 8-byte head")
    for name, present in _capabilities(library).items():
        yield _fact(name, "yes" if present else "no")


def _place_lines(place: Place) -> Iterator[str]:
    if place.status == "absent":
        yield f"  {place.place:<34} {place.reason}"
        return
    yield f"  {place.place:<34} {place.status}: {place.path}"
    if place.reason:
        yield textwrap.indent(place.reason, " " * 6)


def _fact(name: str, text: object) -> str:
    return f"{name:<20} {text}"
