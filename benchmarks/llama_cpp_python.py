"""Beside llama-cpp-python's own: snapshots, restores, the prompt cache.

    python benchmarks/llama_cpp_python.py [--tokens 4088] [--rounds 9] [--flash-attn]

Medians of alternating rounds in one process, with the model of 128 KiB of state for a token that
``llama_state.testing.write_benchmark_model`` makes; then ten prompts that share 2,000 tokens,
with each cache in a process of its own. Needs llama-cpp-python and the extra ``testing``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llama_cpp
from validation import medians

from llama_state import _transfer
from llama_state.adapters.llama_cpp import LlamaContext, PromptCache
from llama_state.testing.models import write_benchmark_model

CACHES = ("none", "LlamaRAMCache", "PromptCache")
SHARED = 2000
CAPACITY = 2 << 30


def open_llama(path: str, n_ctx: int, *, flash_attn: bool) -> Any:
    """A Llama on the benchmark's model."""
    return llama_cpp.Llama(path, n_ctx=n_ctx, n_batch=512, flash_attn=flash_attn, verbose=False)


def some_tokens(n: int, seed: int = 0) -> list[int]:
    """Printable bytes, as this model's tokens."""
    return [35 + (seed + 7 * i) % 90 for i in range(n)]


def bare_restore(ctx: LlamaContext, blob: bytes) -> int:
    """llama_state_set_data and nothing else."""
    with ctx._handle.use() as call:
        return _transfer.write(call, None, blob)


def states(path: str, n_tokens: int, rounds: int, *, flash_attn: bool) -> None:
    """Save and restore one large state in every way."""
    llm = open_llama(path, n_tokens + 8, flash_attn=flash_attn)
    tokens = some_tokens(n_tokens)
    llm.eval(tokens)
    ctx = LlamaContext(llm)
    theirs, blob = llama_cpp.Llama.save_state(llm), ctx.snapshot()
    out = bytearray(len(blob))
    cache = PromptCache(llm)
    llm.set_cache(cache)
    cache[tokens] = llm.save_state()

    def hit() -> None:
        ctx.clear()
        llm.load_state(cache[[*tokens, 40]])

    seconds = medians(
        rounds,
        save_state=lambda: llama_cpp.Llama.save_state(llm),
        snapshot=ctx.snapshot,
        snapshot_out=lambda: ctx.snapshot(out=out),
        load_state=lambda: llama_cpp.Llama.load_state(llm, theirs),
        bare_restore=lambda: bare_restore(ctx, blob),
        restore=lambda: ctx.restore(blob, tokens=tokens),
        cache_hit=hit,
    )
    print(f"{len(blob):,} bytes, {n_tokens} tokens, flash_attn={flash_attn}, medians of {rounds}")
    for name, value in seconds.items():
        print(f"  {name:<14} {1e3 * value:9.1f} ms  {len(blob) / value / 2**30:6.2f} GiB/s")
    print(f"  save_state / snapshot     {seconds['save_state'] / seconds['snapshot']:.1f}")
    print(f"  load_state / restore      {seconds['load_state'] / seconds['restore']:.1f}")
    print(f"  cache hit / bare restore  {seconds['cache_hit'] / seconds['bare_restore']:.2f}")


def prompts(path: str, cache: str, between: str, *, flash_attn: bool) -> dict[str, float]:
    """Ten prompts that share a prefix; with *between* "other" another prompt after each."""
    llm = open_llama(path, 4096, flash_attn=flash_attn)
    evaluated, decoding = 0, 0.0
    decode = llm._ctx.decode

    def counted(batch: Any) -> None:
        nonlocal evaluated, decoding
        evaluated += batch.batch.n_tokens
        start = time.perf_counter()
        decode(batch)
        decoding += time.perf_counter() - start

    llm._ctx.decode = counted
    if cache == "PromptCache":
        llm.set_cache(PromptCache(llm, capacity_bytes=CAPACITY))
    elif cache == "LlamaRAMCache":
        llm.set_cache(llama_cpp.LlamaRAMCache(capacity_bytes=CAPACITY))
    prefix = some_tokens(SHARED)
    start = time.perf_counter()
    for i in range(10):
        asked = [[*prefix, *some_tokens(20, seed=i + 1)]]
        if between == "other":
            asked.append(some_tokens(50, seed=40 + i))
        for prompt in asked:
            llm.create_completion(prompt, max_tokens=4, temperature=0, grammar=ascii_only())
    seconds = time.perf_counter() - start
    other = seconds - decoding
    return {"seconds": seconds, "other": other, "peak": peak_memory(), "evaluated": evaluated}


def peak_memory() -> float:
    """MiB that this process has held at the most, since it began to run this program."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def ascii_only() -> Any:
    """A Llama goes on beyond max_tokens after half a character."""
    return llama_cpp.LlamaGrammar.from_string("root ::= [ -~]*", verbose=False)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=4088)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--flash-attn", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        cache, between, path = options.child
        print(json.dumps(prompts(path, cache, between, flash_attn=options.flash_attn)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_benchmark_model(Path(folder) / "large.gguf", text=True))
        states(path, options.tokens, options.rounds, flash_attn=options.flash_attn)
        for between in ("nothing", "other"):
            print(f"ten prompts that share {SHARED} tokens, between them: {between}")
            for cache in CACHES:
                command = [sys.executable, __file__, "--child", cache, between, path]
                command += ["--flash-attn"] if options.flash_attn else []
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603
                found = json.loads(done.stdout)
                print(
                    f"  {cache:<14} {found['seconds']:7.1f} s, {found['other']:5.1f} not decoding"
                    f"  {found['peak']:8.0f} MiB at the most  "
                    f"{found['evaluated']:6} tokens evaluated"
                )


if __name__ == "__main__":
    main()
