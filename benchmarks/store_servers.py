"""What a prefix store in Redis or Valkey costs, beside what the client does alone.

    python benchmarks/store_servers.py [URL] [--mib N] [--json FILE] [--markdown]

As many bytes are written and read in turns: by the package ``redis`` alone, in values of 2 MiB,
into a buffer that is there; by the place of a store, in objects of 32 MiB; and by ``recall()`` of a
prompt whose state has that size, verified and put into a context, with 128 KiB for a token and
chunks of 256. Needs the extras ``redis`` and ``testing``.

Without a URL a ``redis-server`` is started on 127.0.0.1, and stopped afterwards. What is written is
removed: the keys begin with ``llama-state-benchmark``.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import _machine
import _output
import _ways
from _report import Report
from _states import CONFIGURATIONS, Subject, fill, some_tokens, write_model
from _targets import findings
from _timing import MIB, Timing, Way, alternate

import llama_state as ls
from llama_state.store.objects import Name
from llama_state.store.places.backend import Backend
from llama_state.store.places.urls import open_place

PREFIX = "llama-state-benchmark"
VALUE = 2 * MIB
OBJECT = 32 * MIB
WHOLE = 512
QUICK = 64
START_SECONDS = 20.0


@contextmanager
def own_server(folder: Path) -> Iterator[str]:
    """Start a server that keeps nothing on disk, and yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    process = subprocess.Popen(  # noqa: S603 - the words above
        [*command, "--save", ""], stdout=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def client_ways(url: str, nbytes: int) -> list[Way]:
    """Return what the client does alone."""
    import redis

    client: Any = redis.Redis.from_url(url)
    data = memoryview(bytes(range(256)) * (nbytes // 256))
    buffer = memoryview(bytearray(nbytes))
    keys = [f"{PREFIX}:plain:{n}" for n in range(nbytes // VALUE)]

    def write() -> None:
        for n, key in enumerate(keys):
            client.set(key, data[n * VALUE : (n + 1) * VALUE])

    def read() -> None:
        for n, key in enumerate(keys):
            buffer[n * VALUE : (n + 1) * VALUE] = client.get(key)

    def remove() -> None:
        client.unlink(*keys)

    write()
    return [
        Way(_ways.CLIENT_SET, "redis", write, before=remove),
        Way(_ways.CLIENT_GET, "redis", read),
    ]


def place_ways(place: Backend, nbytes: int) -> list[Way]:
    """Return what the place of a store does, without a context."""
    data = memoryview(bytes(range(256)) * (OBJECT // 256))
    names = [
        Name(bytes(32), n.to_bytes(32, "little"), 256, "R") for n in range(1, nbytes // OBJECT + 1)
    ]

    def write() -> None:
        for name in names:
            assert place.put(name, [data])

    def remove() -> None:
        for name in names:
            place.remove(name)

    def read() -> None:
        for name in names:
            with place.open(name, OBJECT):
                pass

    write()
    return [
        Way(_ways.PLACE_PUT, _ways.OURS, write, before=remove),
        Way(_ways.PLACE_OPEN, _ways.OURS, read),
    ]


def measure(url: str, mib: int, folder: Path, rounds: int) -> list[Timing]:
    """Return how long each way takes with a server."""
    nbytes = mib * MIB
    how = CONFIGURATIONS[0]
    n_tokens = how.tokens_of(mib)
    where = f"{url}{'&' if '?' in url else '?'}prefix={PREFIX}&deadline=60s"
    tokens = [*some_tokens(n_tokens), 35]
    with ls.Model(write_model(folder)) as model:
        make = partial(
            model.context, n_ctx=n_tokens + 512, n_seq_max=2, kv_unified=True, flash_attn=True
        )
        with make() as source, make() as target, ls.PrefixStore(where, min_gain=None) as store:
            fill(Subject(source), n_tokens)
            store.remember(source, tokens[:-1])

            def recall() -> None:
                assert store.recall(target, tokens).n_past == n_tokens

            place = open_place(
                where.replace(PREFIX, f"{PREFIX}:place"), None, durable=False, readonly=False
            )
            ways = [
                *client_ways(url, nbytes),
                *place_ways(place, nbytes),
                Way(_ways.RECALL, _ways.OURS, recall, before=target.clear),
            ]
            scheme = urlsplit(url).scheme
            timings = alternate([(nbytes, ways)], rounds, section="servers", configuration=scheme)
            for each in (store, place):
                each.evict(0)
    return timings


def remove_plain(url: str) -> None:
    """Remove what the client alone has written."""
    import redis

    with closing(redis.Redis.from_url(url)) as client:
        for key in client.scan_iter(f"{PREFIX}:plain:*", count=1000):
            client.delete(key)


def _measure(options: argparse.Namespace) -> Report:
    rounds = options.rounds or (3 if options.quick else 7)
    mib = options.mib or (QUICK if options.quick else WHOLE)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="llama_state-", dir=options.folder) as made:
        folder = Path(made)
        facts = _machine.facts(ls.load_library(), None, folder)
        with nullcontext(options.url) if options.url else own_server(folder) as url:
            print(f"measuring: {mib} MiB", file=sys.stderr)
            try:
                timings = measure(url, mib, folder, rounds)
            finally:
                remove_plain(url)
    facts["seconds"] = f"{time.perf_counter() - start:.0f}"
    return Report(facts, rounds, timings, findings(timings))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", nargs="?", metavar="URL", help="redis://... or unix://...")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} MiB, 3 rounds")
    parser.add_argument("--mib", type=int, help=f"MiB, a multiple of 32 ({WHOLE})")
    parser.add_argument("--rounds", type=int, help="runs of each way that are measured (7)")
    _output.add_options(parser)
    _output.report(parser.parse_args(arguments), _measure)


if __name__ == "__main__":
    main()
