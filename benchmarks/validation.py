"""What checking a state costs: parsing beside restoring, on one large state and a tiny one.

    python benchmarks/validation.py [--tokens 4088]

Medians of alternating rounds in one process, with the model of 128 KiB of state for a token that
``llama_state.testing.write_benchmark_model`` makes. Needs the extras ``engine`` and ``testing``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import llama_state as ls
from llama_state import _transfer, layout
from llama_state.testing.models import write_benchmark_model, write_model


def medians(rounds: int, **functions: Callable[[], object]) -> dict[str, float]:
    """Seconds of each function, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def bare_restore(ctx: ls.Context, blob: bytes) -> int:
    """llama_state_seq_set_data and nothing else."""
    with ctx._handle.use() as call:
        return _transfer.write(call, 0, blob)


def measure(title: str, ctx: ls.Context, rounds: int) -> None:
    """Print one table for what *ctx* holds in sequence 0."""
    blob = ctx.seq_snapshot(0)
    traits = ctx._facts.traits
    out = bytearray(len(blob))
    view = memoryview(out)
    seconds = medians(
        rounds,
        memcpy=lambda: view.__setitem__(slice(None), blob),
        parse=lambda: layout.parse_sequence(
            blob, version=ctx.library.session_version, traits=traits
        ),
        bare_restore=lambda: bare_restore(ctx, blob),
        restore=lambda: ctx.seq_restore(blob),
        snapshot_out=lambda: ctx.seq_snapshot(0, out=out),
        snapshot=lambda: ctx.seq_snapshot(0),
    )
    print(f"{title}: {len(blob):,} bytes, {ctx.n_past(0)} tokens, medians of {rounds}")
    for name, value in seconds.items():
        share = value / seconds["bare_restore"]
        print(f"  {name:<14} {1e3 * value:10.3f} ms  {share:6.3f} of the bare restore")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=4088)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny = ls.Model(write_model(Path(folder) / "tiny.gguf"))
        large = ls.Model(write_benchmark_model(Path(folder) / "large.gguf"))
        with tiny, tiny.context(n_ctx=256) as ctx:
            ctx.decode(range(40))
            measure("tiny", ctx, 50 * options.rounds)
        with large, large.context(n_ctx=options.tokens + 8, flash_attn=True) as ctx:
            ctx.decode([i % ctx.n_vocab for i in range(options.tokens)])
            measure("large", ctx, options.rounds)


if __name__ == "__main__":
    main()
