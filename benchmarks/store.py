"""What the prefix store costs and spares, beside whole states and the caches of llama-cpp-python.

    python benchmarks/store.py [MODEL.gguf...] [--quick] [--json FILE] [--chart FILE] [--markdown]

Turns: 64 new tokens after 1k to 32k, in one stream, with 128 KiB of f16 state for a token, and
chunks of 256. ``remember()`` writes what is new and ``save_state()`` all of it; ``recall()`` and
``load_state()`` bring all of it back, from files in the page cache.

Chats: ten that share a system prompt, one after the other, without a store, with one, and with one
that is opened again; where llama-cpp-python and diskcache are installed also in a ``Llama`` with
each of its caches, another prompt between them. Each MODEL does so too: its times are those that
people feel. Needs the extras ``store`` and ``testing``, for ``--chart`` also ``plot``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import _machine
import _output
import _ways
from _bare import Bare
from _chats import CAPACITY, Chats, chats
from _report import Report
from _states import (
    CONFIGURATIONS,
    Configuration,
    Subject,
    fill,
    llama_cpp,
    some_tokens,
    write_model,
)
from _targets import findings
from _timing import Timing, Way, alternate
from llama_cpp_python import with_each

import llama_state as ls

NEW = 64
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
JUDGED = 4096
SHARED = 2000
OWN = "128 KiB a token"


def turns(
    model: ls.Model, how: Configuration, n_tokens: int, folder: Path, rounds: int
) -> list[Timing]:
    """Return how long each way takes after a turn of :data:`NEW` tokens on *n_tokens*."""
    tokens, numbers = some_tokens(n_tokens), count(1)
    whole = n_tokens + NEW
    make = partial(
        model.context,
        n_ctx=n_tokens + 512,
        n_seq_max=2,
        kv_unified=True,
        flash_attn=how.flash_attn,
    )
    with (
        make() as source,
        make() as target,
        ls.PrefixStore(folder / "kv", capacity_bytes=CAPACITY) as store,
    ):
        fill(Subject(source), n_tokens)
        store.remember(source, tokens)
        new: list[int] = []

        def turn() -> None:
            new[:] = some_tokens(NEW, seed=next(numbers))
            source.seq_rm(0, n_tokens)
            source.decode(new)

        def remember() -> None:
            assert store.remember(source, [*tokens, *new]).new_tokens >= NEW

        turn()
        remember()
        kept = [*tokens, *new, 35]
        file, written = folder / "state", folder / "new"
        room = bytearray(2 * NEW * source.state_size() // whole)
        source.save_state(file, kept[:-1], durable=False)

        def recall() -> None:
            assert store.recall(target, kept).n_past == whole

        save = partial(source.save_state, written, durable=False)
        bare = Bare(source, whole)
        ways = (
            Way(_ways.SEQ_RANGE, _ways.C, lambda: bare.seq_get_range(room, n_tokens, whole)),
            Way(_ways.REMEMBER, _ways.OURS, remember, before=turn),
            Way(_ways.SAVE, _ways.OURS, save, after=written.unlink),
            Way(_ways.SAVE_FILE, _ways.C, lambda: bare.save_file(written), after=written.unlink),
            Way(_ways.RECALL, _ways.OURS, recall, before=target.clear),
            Way(_ways.LOAD, _ways.OURS, lambda: target.load_state(file), before=target.clear),
        )
        groups = [(source.state_size(), ways)]
        return alternate(groups, rounds, section="growth", configuration=str(how))


def _all_turns(
    model: ls.Model, lengths: Sequence[int], folder: Path, rounds: int
) -> Iterator[Timing]:
    judged = JUDGED if JUDGED in lengths else max(lengths)
    for n_tokens in lengths:
        for how in CONFIGURATIONS[:2]:
            _progress(f"a turn after {n_tokens} tokens, {how}")
            with tempfile.TemporaryDirectory(dir=folder) as inside:
                timings = turns(model, how, n_tokens, Path(inside), rounds)
            yield from timings
            if n_tokens == judged:
                yield from (replace(one, section="turns") for one in timings)


def _all_chats(models: dict[str, str], n_chats: int, shared: int, folder: Path) -> Iterator[Chats]:
    system = some_tokens(shared)
    questions = [some_tokens(NEW, seed=1 + chat) for chat in range(n_chats)]
    for name, path in models.items():
        _progress(f"chats, {name}")
        with ls.Model(path) as model:
            yield from chats(model, name, system, questions, folder / f"chats, {name}")
        if llama_cpp is not None:
            found = with_each(path, "other", flash_attn=True, n_chats=n_chats, shared=shared)
            for cache, of in found:
                _progress(f"chats, {name}: {cache}")
                way = f"Llama, {cache}"
                yield Chats(name, way, tuple(of["first"]), int(of["evaluated"]), of["kept"])


def _progress(what: str) -> None:
    print(f"measuring: {what}", file=sys.stderr)


def _measure(options: argparse.Namespace) -> Report:
    lengths = options.tokens or (LENGTHS[:3] if options.quick else LENGTHS)
    rounds = options.rounds or (3 if options.quick else 7)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="llama_state-", dir=options.folder) as made:
        folder = Path(made)
        host = None if llama_cpp is None else "llama_cpp_python"
        facts = _machine.facts(ls.load_library(), host, folder)
        path = write_model(folder)
        with ls.Model(path) as model:
            timings = [*_all_turns(model, lengths, folder, rounds)]
        names = {OWN: path, **{Path(each).stem: each for each in options.models}}
        models = names if options.chats else {}
        shared = [*_all_chats(models, options.chats, options.shared, folder)]
    facts["seconds"] = f"{time.perf_counter() - start:.0f}"
    return Report(facts, rounds, timings, findings(timings, shared), shared)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a GGUF file, for chats")
    parser.add_argument("--quick", action="store_true", help="up to 4,096 tokens, 3 rounds")
    parser.add_argument(
        "--tokens",
        type=lambda text: tuple(map(int, text.split(","))),
        metavar="N,...",
        help=f"tokens before each turn ({','.join(map(str, LENGTHS))}): multiples of 256, or a "
        "turn writes the end of them again",
    )
    parser.add_argument(
        "--chats", type=int, default=10, help="chats on one system prompt (10; 0: none)"
    )
    parser.add_argument("--shared", type=int, default=SHARED, help=f"tokens of that ({SHARED})")
    parser.add_argument("--rounds", type=int, help="runs of each way that are measured (7)")
    _output.add_options(parser)
    _output.report(parser.parse_args(arguments), _measure)


if __name__ == "__main__":
    main()
