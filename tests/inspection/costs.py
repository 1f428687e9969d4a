"""Files that cost much more than their size, if anything trusts them, and what they cost.

As a program it is the worker: it takes a folder of hostile files, gives each to every function
that reads files of strangers, within a limit on memory, and prints a line of JSON for each.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

from llama_state import Checkpoint, inspect_file
from llama_state.errors import StateError
from llama_state.inspection import compare, report, summary, text, verification
from llama_state.inspection.conversion import convert_file
from tests.fuzz.damage import KINDS
from tests.layout.blobs import State, u32
from tests.layout.blobs import text as cells
from tests.layout.statefiles import native

SECONDS, SECONDS_A_BYTE = 2.0, 40e-6
BYTES, BYTES_A_BYTE = 24 << 20, 200
"""A file may cost this much, and this much for each of its bytes."""

HEAD = struct.pack("<Ii", 0xAF143CD8, 0)
"""The head of the blob of sequence 0."""
EMPTY_ROW = struct.pack("<iQ", 0, 0)
"""The head of a block whose rows have no bytes."""


def dsv4(compressed: bytes, compressor: bytes) -> bytes:
    """Return a blob of deepseek4 whose attention caches are empty."""
    empty = u32(1, 0)
    return HEAD + u32(0x34565344, 1, 0) + 2 * empty + 3 * compressed + 3 * compressor


def no_layers() -> bytes:
    """188 bytes: four billion rows of no layers."""
    return dsv4(u32(2, 2**32 - 1, 1, 0), u32(1, 4, 2**32 - 1, 1, 1, 0))


def rows_of_nothing() -> bytes:
    """Four billion rows without bytes."""
    tensor = struct.pack("<iQQQ", 0, 0, 2**32 - 1, 0)
    return dsv4(u32(2, 2**32 - 1, 1, 1, 0) + tensor, u32(1, 4, 2**32 - 1, 1, 1, 1, 0) + 2 * tensor)


def streams_of_nothing(n: int) -> bytes:
    """*n* layers without rows, of 256 streams."""
    tensor = struct.pack("<iQQQ", 0, 0, 0, 0)
    compressed = u32(2, 0, 256, n) + n * (u32(0) + tensor)
    compressor = u32(1, 4, 0, 1, 256, n) + n * (u32(0) + 2 * tensor)
    empty = u32(256) + 256 * u32(0)
    head = u32(9) + b"deepseek4"
    return head + u32(0x34565344, 1, 0) + 2 * empty + 3 * compressed + 3 * compressor


def empty_recurrent(n: int = 1000, *, kv: bytes = b"") -> bytes:
    """12 kB: *n* blocks of no cells, which can be any number of layers."""
    return HEAD + kv + u32(0, 0, 10_000) + n * EMPTY_ROW


def many_layers(n_layer: int, n_cell: int) -> bytes:
    """Layers whose rows have no bytes: the cells of each could be gone through."""
    listed = b"".join(struct.pack("<iIi", i, 1, 0) for i in range(n_cell))
    settings = u32(n_cell) + listed + u32(0, n_layer, 0, 0)
    return HEAD + u32(1) + settings + 2 * n_layer * EMPTY_ROW


def shared_cells(n_cell: int) -> bytes:
    """Cells that all sequences share."""
    owners = tuple((i, tuple(range(256))) for i in range(n_cell))
    return State("kv", cells=owners, arch="llama").blob()


BOMBS: Mapping[str, Callable[[], bytes]] = {
    "no layers": no_layers,
    "rows of nothing": rows_of_nothing,
    "streams of nothing": lambda: streams_of_nothing(512),
    "more streams of nothing": lambda: streams_of_nothing(10_000),
    "empty recurrent blocks": empty_recurrent,
    "empty hybrid blocks": lambda: empty_recurrent(kv=u32(1, 0)),
    "more empty hybrid blocks": lambda: empty_recurrent(20_000, kv=u32(1, 0)),
    "empty hybrid blocks with windows": lambda: empty_recurrent(kv=2 * u32(1, 0)),
    "layers of nothing": lambda: many_layers(512, 20_000),
    "more layers of nothing": lambda: many_layers(5_000, 5_000),
    "shared cells": lambda: shared_cells(300),
    "one position": lambda: State("kv", cells=((7, (0,)),) * 3_000, arch="llama").blob(),
    "zeros": lambda: HEAD + bytes(100_000),
    "ones": lambda: HEAD + u32(*[1] * 25_000),
    "streams": lambda: u32(5) + b"llama" + u32(256) + 256 * u32(0),
    "a packed list": lambda: struct.pack("<4sIIiII", b"qsgg", 4, 50_000, -1, 1, 0) + bytes(200_000),
    "a nested checkpoint": lambda: Checkpoint(
        State("kv", cells=cells(2), seq=0).blob(),
        kind="sequence",
        session_version=11,
        source=0,
        meta={"a": [[[]] * 1000] * 50},
    ).to_bytes(),
    "chunks": lambda: Checkpoint(
        State("kv", cells=cells(500), seq=0, row_k=4096).blob(),
        kind="sequence",
        session_version=11,
        source=0,
    ).to_bytes(compress=True),
}

SOUND: tuple[State, ...] = (
    State("kv", cells=cells(40) + cells(30, 1), arch="llama"),
    State("kv", cells=cells(40, 0, 1), v_trans=True, arch="llama"),
    State("iswa", cells=cells(40), window=4, arch="gemma3"),
    State("recurrent", cells=cells(4) + cells(3, 1), arch="mamba2"),
    State("hybrid", cells=cells(9) + cells(3, 1), arch="jamba"),
    State("hybrid-idx", cells=cells(9), arch="qwen4exp", ple=True, ngrams=(0, 2)),
    State("dsa", cells=cells(9), arch="deepseek32"),
    State("dsv4", cells=cells(40), arch="deepseek4"),
)


def damaged(seed: int) -> bytes:
    """Return a sound state with one or several kinds of damage, as a blob or a file."""
    rng = Random(f"costs {seed}")
    state = rng.choice(SOUND)
    one = rng.choice((state, state.only(0)))
    data = rng.choice((one.blob, lambda: native(one)))()
    others = [replace(one, cells=cells(5)).blob() for one in SOUND]
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(list(KINDS.values()))(rng, data, others)
    return data


def use(path: Path) -> None:
    """Give a file to all that reads files of strangers."""
    with suppress(StateError, OSError):
        found = inspect_file(path)
        json.dumps(summary.describe(found))
        text.text(found)
        if found.problem is None:
            result = compare(found, found)
            report.text(result)
    verification.text(verification.verify_file(path))
    for read in (Checkpoint.load, Checkpoint.from_native):
        with suppress(StateError, OSError):
            read(path)
    with suppress(StateError, OSError):
        convert_file(path, path.with_suffix(".out"), session_version=11, force=True)


def measure(path: Path) -> dict[str, float]:
    """Return what the file at *path* costs: seconds and bytes, as shares of what it may."""
    size = path.stat().st_size
    start = time.process_time()
    use(path)
    seconds = time.process_time() - start
    tracemalloc.start()
    try:
        use(path)
        peak = tracemalloc.get_traced_memory()[1]
    except MemoryError:
        peak = 1 << 60
    finally:
        tracemalloc.stop()
    return {
        "seconds": seconds / (SECONDS + SECONDS_A_BYTE * size),
        "bytes": peak / (BYTES + BYTES_A_BYTE * size),
    }


def main(folder: Path) -> None:
    """Measure each file; one that takes all memory or all time ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for path in sorted(folder.glob("*.bin")):
        print(json.dumps({"name": path.stem}), flush=True)
        print(json.dumps(measure(path)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
