"""The commands that try a place of a prefix store: ``store doctor`` and ``store bench``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from .._io.progress import no_progress
from .output import print_json
from .parsers import Commands, add_command, add_key_file, byte_size, read_key
from .progress import shown
from .status import Status

if TYPE_CHECKING:
    from ..store.places.backend import Backend
    from ..store.throughput import Measured


def add_commands(commands: Commands) -> None:
    """Add ``store doctor`` and ``store bench``."""
    doctor = add_command(
        commands,
        "doctor",
        run_doctor,
        summary="tell whether a place is fit for a store",
        details="Look at a folder, a server or a bucket: whether objects can be written and read,"
        " whether its settings fit, what to do if not. A small object is written and removed.",
        example="llama-state store doctor redis://localhost",
        exits={0: "it can be used", 1: "it cannot", 2: "wrong use, or a missing package"},
    )
    bench = add_command(
        commands,
        "bench",
        run_bench,
        summary="measure how fast a place is",
        details="Write, read and remove objects of random bytes, of 64 KiB to 64 MiB, one after"
        " the other.",
        example="llama-state store bench redis://localhost --bytes 1GiB",
        exits={0: "done", 2: "wrong use, or a place that cannot be read or written"},
    )
    for parser in (doctor, bench):
        parser.add_argument(
            "place", metavar="PLACE", help="the folder of a store, or the URL of a server"
        )
        parser.add_argument("--json", action="store_true", help="print the same facts as JSON")
    add_key_file(doctor, "of the store")
    bench.add_argument(
        "--bytes",
        type=byte_size,
        default=256 << 20,
        metavar="SIZE",
        help="bytes of each size of object (default: 256MiB)",
    )


def run_doctor(options: argparse.Namespace) -> Status:
    """Say what there is to say of a place."""
    from ..store.advice import advise

    has_key = read_key(options) is not None
    found = list(advise(_opened(options.place), has_key=has_key))
    well = all(each.level != "error" for each in found)
    if options.json:
        print_json({"ok": well, "advice": [asdict(each) for each in found]})
    else:
        for each in found:
            print(f"{each.level + ':':8} {each.text}")
    return Status.OK if well else Status.NO


def run_bench(options: argparse.Namespace) -> Status:
    """Measure a place."""
    from ..store.throughput import measure

    with shown("measurement") as progress:
        found = measure(_opened(options.place), options.bytes, progress or no_progress)
    if options.json:
        print_json(asdict(found))
    else:
        print("\n".join(_table(found)))
    return Status.OK


def _opened(place: str) -> Backend:
    """Open a place, without the deadline that it has for a store: it may take its time here."""
    from ..store.places.guard import Guard
    from ..store.places.urls import open_existing

    backend = open_existing(place, readonly=False)
    return backend.backend if isinstance(backend, Guard) else backend


def _table(found: Measured) -> Iterator[str]:
    from ..inspection.words import size

    yield f"place    {found.location}"
    yield f"latency  {1e3 * found.latency:.2f} ms"
    yield f"{'object':>10}  {'number':>7}  {'written':>12}  {'read':>12}"
    for each in found.sizes:
        written, read = (f"{rate / (1 << 20):,.0f} MiB/s" for rate in (each.written, each.read))
        yield f"{size(each.nbytes):>10}  {each.n_objects:>7,}  {written:>12}  {read:>12}"
