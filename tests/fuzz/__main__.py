"""Run damaged states, or stores, through the public API and count what became of them.

Several processes at once, each with one kind of model; a case that kills its process, or hangs it,
is counted and named, and the process is started again behind it. Exit status 1 when a case did
anything but be refused with nothing changed, or be accepted as what it says; when a damaged store
gave anything but what was remembered, or less.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_state as ls
from llama_state.testing.models import KINDS, write_model
from tests.kinds import SHARE, is_sampled

HANG = 120.0
"""Seconds without a word after which a case counts as hanging."""

FINE = {
    "states": ("refused", "equal", "differs in tensor bytes", "another sound state"),
    "objects": ("whole", "shorter", "believed"),
}
"""What can become of a case, by the module that runs it; "believed": objects that were made for a
store without a key, which can be kept from doing harm, not from being wrong."""


def loadable(folder: Path, library: ls.Library) -> list[str]:
    """Write the tiny models and a foreign state of each; the kinds that *library* loads."""
    kinds = []
    for kind in KINDS:
        path = write_model(folder / f"{kind}.gguf", kind)
        try:
            with ls.Model(path, library) as model, model.context(n_ctx=256) as ctx:
                ctx.decode(range(7))
                (folder / f"{kind}.state").write_bytes(ctx.snapshot())
        except ls.ModelLoadError:
            continue
        kinds.append(kind)
    return kinds


def run_worker(module: str, kind: str, folder: Path, first: int, cases: int) -> Counter[str]:
    """Run *cases* cases, in as many processes one after the other as it takes."""
    found: Counter[str] = Counter()
    end = first + cases
    while first < end:
        command = [sys.executable, "-m", f"tests.fuzz.{module}", kind, str(folder)]
        command += ["--first", str(first), "--cases", str(end - first)]
        last = first - 1
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            for line in _lines(process):
                if line.startswith("{"):
                    result = json.loads(line)
                    outcome = result["outcome"]
                    found[outcome if outcome in FINE[module] else f"{kind} {last}: {result}"] += 1
                elif line:
                    last = int(line)
            status = process.wait()
            error = process.stderr.read()[-2000:] if process.stderr else ""
        done = sum(found.values())
        if status == 0 and done == cases:
            break
        found[f"{kind} {last}: DIED with status {status}: {error}"] += 1
        first = last + 1
    return found


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """The lines that a worker prints; it is killed when it falls silent."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line.strip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=HANG)
        except queue.Empty:
            process.kill()
            return
        if line is None:
            return
        yield line


def run(module: str, cases: int, first: int, jobs: int) -> Counter[str]:
    """Spread *cases* over the kinds; what became of them."""
    library = ls.load_library()
    with tempfile.TemporaryDirectory(prefix="llama_state-fuzz-") as name:
        folder = Path(name)
        kinds = loadable(folder, library)
        shares = spread(cases, kinds)

        def run_one(kind: str) -> Counter[str]:
            return run_worker(module, kind, folder, first, shares[kind])

        with ThreadPoolExecutor(jobs) as pool:
            counters = pool.map(run_one, kinds)
            return sum(counters, Counter())


def spread(cases: int, kinds: list[str]) -> dict[str, int]:
    """Return the cases of each kind, together at least *cases*: fewer of those that are sampled."""
    weights = {kind: 1 if is_sampled(kind.rpartition("-")[0]) else SHARE for kind in kinds}
    return {kind: -(-cases * weight // sum(weights.values())) for kind, weight in weights.items()}


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--of", choices=FINE, default="states", help="what is damaged: states, or stores' objects"
    )
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number, and so seed, of the first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--soak", type=int, default=1, metavar="N", help="N times as many cases")
    options = parser.parse_args()
    fine = FINE[options.of]
    started = time.monotonic()
    found = run(options.of, options.cases * options.soak, options.first, options.jobs)
    wrong = {what: n for what, n in found.items() if what not in fine}
    seconds = time.monotonic() - started
    library = ls.load_library()
    print(f"{library.path}: {sum(found.values())} cases of {options.of} in {seconds:.0f} s")
    for outcome in fine:
        print(f"  {outcome:<26} {found[outcome]}")
    print(f"  {'deaths, hangs or wrong':<26} {sum(wrong.values())}")
    for what in wrong:
        print(f"    {what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
