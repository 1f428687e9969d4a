"""What a recall from an object store takes, beside bare obstore that reads the same objects.

    python benchmarks/store_buckets.py [--tokens N] [--rounds N] [--folder DIR] [--json FILE]

4,096 tokens of 128 KiB are remembered in a folder, which ``_static_s3.py`` serves from the page
cache. Both ways are taken in turns: ``recall()`` lists, reads, verifies, and gives the rows to
llama.cpp; obstore reads parts of 16 MiB in four threads, into nothing. At least 0.6 of its speed
is wanted. Needs the extras ``s3``, ``store`` and ``testing``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import _machine
import _ways
from _states import CONFIGURATIONS, Subject, fill, some_tokens, write_model
from _timing import MIB, Timing, Way, alternate, times_as_fast

import llama_state as ls
from llama_state.store.places.backend import text_of
from llama_state.store.places.folder import FolderBackend

WANTED = 0.6
PART = 16 * MIB
THREADS = 4
BARE = "obstore, 4 threads"
COPIED = "obstore, 4 threads, copied into a buffer"


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the folders in *folder* as buckets; yield the URL of the server."""
    command = [sys.executable, str(Path(__file__).parent / "_static_s3.py"), str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:  # noqa: S603
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()


def as_objects(store: Path, bucket: Path) -> dict[str, int]:
    """Put the objects of a store in a folder where a bucket has them; return path -> bytes."""
    backend = FolderBackend(store, 1 << 40, readonly=True)
    found = {}
    for stored in backend.entries():
        path = text_of(stored.name).replace("-", "/", 1)
        (bucket / path).parent.mkdir(parents=True, exist_ok=True)
        with backend.open(stored.name, stored.nbytes) as view:
            (bucket / path).write_bytes(view)
        found[path] = stored.nbytes
    return found


def bare(store: Any, objects: dict[str, int], buffer: memoryview | None) -> None:
    """Read all objects by parts, with obstore alone."""
    parts: SimpleQueue[tuple[str, int, int, int]] = SimpleQueue()
    at = 0
    for path, nbytes in objects.items():
        for start in range(0, nbytes, PART):
            length = min(PART, nbytes - start)
            parts.put((path, start, length, at))
            at += length

    def work() -> None:
        while True:
            try:
                path, start, length, at = parts.get_nowait()
            except Empty:
                return
            data = store.get_range(path, start=start, length=length)
            if buffer is not None:
                buffer[at : at + length] = memoryview(data)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(n_tokens: int, rounds: int, folder: Path) -> list[Timing]:
    """Return how long each way takes."""
    from obstore.store import S3Store

    os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none")  # noqa: S106
    os.environ["NO_PROXY"] = "127.0.0.1"
    tokens, how = some_tokens(n_tokens), CONFIGURATIONS[0]
    with ls.Model(write_model(folder)) as model:
        make = partial(model.context, n_ctx=n_tokens + 512, flash_attn=how.flash_attn)
        with make() as source, ls.PrefixStore(folder / "kv", capacity_bytes=1 << 40) as near:
            fill(Subject(source), n_tokens)
            near.remember(source, tokens)
        objects = as_objects(folder / "kv", folder / "buckets" / "kv")
        rows = {path: nbytes for path, nbytes in objects.items() if path.endswith(".R")}
        nbytes = sum(rows.values())
        buffer = memoryview(bytearray(nbytes))
        with served(folder / "buckets") as url, make() as target:
            client: Any = {"allow_http": True, "timeout": "60s"}
            alone = S3Store("kv", config={"endpoint": url}, client_options=client)
            with ls.PrefixStore(f"s3://kv?endpoint={url}&deadline=60", readonly=True) as store:
                wanted = [*tokens, 35]

                def recall() -> None:
                    assert store.recall(target, wanted).n_past == n_tokens

                ways = (
                    Way(BARE, "obstore", lambda: bare(alone, rows, None)),
                    Way(COPIED, "obstore", lambda: bare(alone, rows, buffer)),
                    Way(_ways.RECALL, _ways.OURS, recall, before=target.clear),
                )
                groups = [(nbytes, ways)]
                return alternate(groups, rounds, section="buckets", configuration=str(how))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the prompt (4096)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each way (7)")
    parser.add_argument("--folder", type=Path, help="where to make files, on what is measured")
    parser.add_argument("--json", type=Path, help="write the times of all runs to a file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="llama_state-", dir=options.folder) as made:
        facts = _machine.facts(ls.load_library(), None, Path(made))
        timings = measure(options.tokens, options.rounds, Path(made))
    for name, value in facts.items():
        print(f"{name}: {value}")
    print()
    by_way = {one.way: one for one in timings}
    for one in timings:
        print(f"{one.way:42} {one.nbytes / MIB:8.0f} MiB {one.median * 1e3:8.0f} ms", end="")
        print(f" {one.speed * 1024:8.0f} MiB/s")
    print()
    for base in (BARE, COPIED):
        ratios = times_as_fast(by_way[_ways.RECALL], by_way[base])
        wanted = f", wanted {WANTED}" if base == BARE else ""
        print(
            f"{_ways.RECALL} beside {base}: {statistics.median(ratios):.2f} of its speed"
            f" ({min(ratios):.2f} to {max(ratios):.2f}{wanted})"
        )
    if options.json:
        found = {"facts": facts, "timings": [asdict(one) for one in timings]}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
