"""What the prefix store costs, side by side with whole states.

    python benchmarks/store.py [--tokens N,...] [--chats N] [--rounds N] [--json FILE]

The context has 128 KiB of f16 state for a token, in one stream. Each turn has 64 new tokens, which
``remember`` writes and ``save_state`` writes with all that were before; ``recall`` and
``load_state`` bring all of it back. Then a number of chats share a system prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path

import _machine
from _bare import Bare
from _states import CONFIGURATIONS, Configuration, Subject, fill, some_tokens, write_model
from _timing import MIB, Timing, Way, alternate, times_as_fast

import llama_state as ls

NEW = 64
LENGTHS = (1024, 2048, 4096, 8192, 16384)
SYSTEM = 2000
REMEMBER, SAVE, SAVE_FILE = "remember, 64 new", "save_state", "llama_state_save_file"
RECALL, LOAD = "recall", "load_state"
OURS, STORE, C = "llama_state", "PrefixStore", "llama.cpp"
# (of, over, the least ratio with flash attention, and without, at 4096 tokens)
BOUNDS = ((REMEMBER, SAVE, 20.0, 20.0), (REMEMBER, SAVE_FILE, 0, 0), (RECALL, LOAD, 0.85, 0.75))
JUDGED = 4096


def turns(
    model: ls.Model, how: Configuration, n_tokens: int, folder: Path, rounds: int
) -> Iterator[Timing]:
    """Yield how long each way takes after a turn of :data:`NEW` tokens on *n_tokens*."""
    options = {"n_ctx": n_tokens + 512, "n_seq_max": 2, "kv_unified": True}
    tokens, numbers = some_tokens(n_tokens), count(1)
    whole = n_tokens + NEW
    with (
        model.context(**options, flash_attn=how.flash_attn) as source,  # type: ignore[arg-type]
        model.context(**options, flash_attn=how.flash_attn) as target,  # type: ignore[arg-type]
        ls.PrefixStore(folder / "kv", capacity_bytes=64 << 30) as store,
    ):
        fill(Subject(source), n_tokens)
        store.remember(source, tokens)
        new: list[int] = []

        def turn() -> None:
            new[:] = some_tokens(NEW, seed=next(numbers))
            source.seq_rm(0, n_tokens)
            source.decode(new)

        def remember() -> None:
            assert store.remember(source, [*tokens, *new]).new_tokens == NEW

        turn()
        remember()
        kept = [*tokens, *new, 35]
        file, written = folder / "state", folder / "new"
        source.save_state(file, kept[:-1], durable=False)

        def recall() -> None:
            assert store.recall(target, kept).n_past == whole

        save = partial(source.save_state, written, durable=False)
        bare = Bare(source, whole)
        nbytes = source.state_size()
        ways = (
            Way(REMEMBER, STORE, remember, before=turn),
            Way(SAVE, OURS, save, after=written.unlink),
            Way(SAVE_FILE, C, partial(bare.save_file, written), after=written.unlink),
            Way(RECALL, STORE, recall, before=target.clear),
            Way(LOAD, OURS, partial(target.load_state, file), before=target.clear),
        )
        yield from alternate(
            [(nbytes, ways)], rounds, section=f"{n_tokens} tokens", configuration=str(how)
        )
        file.unlink()


def chats(model: ls.Model, n_chats: int, folder: Path) -> dict[str, float]:
    """Let chats share a system prompt, and return what is kept of them."""
    system = some_tokens(SYSTEM, seed=1000)
    own = NEW
    with (
        model.context(n_ctx=SYSTEM + 512, n_seq_max=2, kv_unified=True) as ctx,
        ls.PrefixStore(folder / "chats", capacity_bytes=64 << 30) as store,
    ):
        store.prefill(ctx, system)
        alone = store.stats().used_bytes
        for chat in range(n_chats):
            store.prefill(ctx, [*system, *some_tokens(own, seed=2000 + chat)])
        stats = store.stats()
        rows = alone / SYSTEM
        new = rows * own * n_chats
        evaluated = (n_chats * (SYSTEM + own)) - stats.tokens_recalled
        return {
            "chats": n_chats,
            "MiB of one prompt": alone / MIB,
            "MiB kept": stats.used_bytes / MIB,
            "over one prompt and what is new": stats.used_bytes / (alone + new),
            "tokens evaluated": evaluated,
            "tokens without a store": n_chats * (SYSTEM + own),
        }


def show(timings: Sequence[Timing]) -> Iterator[str]:
    """Yield the lines of the tables."""
    by_place: dict[tuple[str, str], dict[str, Timing]] = {}
    for one in timings:
        by_place.setdefault((one.section, one.configuration), {})[one.way] = one
    for (section, configuration), ways in by_place.items():
        yield f"\n{section}, {configuration}"
        for way, timing in ways.items():
            yield f"  {way:<24}{timing.median * 1e3:9.1f} ms"
        for of, over, flash, plain in BOUNDS:
            ratios = times_as_fast(ways[of], ways[over])
            ratio = statistics.median(ratios)
            bound = flash if configuration == str(CONFIGURATIONS[0]) else plain
            judged = bound and section == f"{JUDGED} tokens"
            met = "yes" if ratio >= bound else "NO"
            text = f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f}) times as fast"
            yield f"  {of} / {over}: {text}{f', wanted {bound}: {met}' if judged else ''}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--tokens",
        type=lambda text: tuple(map(int, text.split(","))),
        default=LENGTHS,
        metavar="N,...",
        help=f"tokens before each turn ({','.join(map(str, LENGTHS))}); multiples of 256",
    )
    parser.add_argument("--chats", type=int, default=10, help="chats on one system prompt (10)")
    parser.add_argument("--rounds", type=int, default=7, help="runs that are measured (7)")
    parser.add_argument("--folder", type=Path, help="where to put files (the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory(prefix="llama_state-", dir=options.folder) as made:
        folder = Path(made)
        facts = _machine.facts(ls.load_library(), None, folder)
        with ls.Model(write_model(folder)) as model:
            for n_tokens in options.tokens:
                for how in CONFIGURATIONS[:2]:
                    with tempfile.TemporaryDirectory(dir=folder) as inside:
                        timings += turns(model, how, n_tokens, Path(inside), options.rounds)
            shared = chats(model, options.chats, folder)
    facts["seconds"] = f"{time.perf_counter() - start:.0f}"
    for name, value in facts.items():
        print(f"{name + ':':<13}{value}")
    print(*show(timings), sep="\n")
    print("\nchats on one system prompt of", SYSTEM, "tokens")
    for name, figure in shared.items():
        print(f"  {name:<32}{figure:10.2f}")
    if options.json:
        found = {"facts": facts, "timings": [asdict(one) for one in timings], "chats": shared}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
