"""Ten prompts that share 2,000 tokens, with each prompt cache of llama-cpp-python, and without.

    python benchmarks/llama_cpp_python.py [--flash-attn] [--model FILE]

Each cache in a process of its own, with the model of 128 KiB of state for a token that
``llama_state.testing.models.write_benchmark_model`` makes; what one save or restore takes is in
``state_io.py``. Needs llama-cpp-python, diskcache and the extra ``testing``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _states import Configuration, llama_cpp, open_llama, some_tokens, write_model

from llama_state.adapters.llama_cpp import PromptCache

CACHES = (
    "none",
    "LlamaRAMCache",
    "LlamaDiskCache",
    "LlamaDiskCache, restarted",
    "PromptCache",
    "PromptCache in a folder",
    "PromptCache, restarted",
)
SHARED = 2000
CAPACITY = 2 << 30


def prompts(
    path: str, cache: str, between: str, folder: str, *, flash_attn: bool, n_chats: int, shared: int
) -> dict[str, Any]:
    """Let prompts that share a prefix be completed; with *between* "other" another after each.

    A cache that lies in *folder* finds there, "restarted", what the process before has left.
    """
    llm = open_llama(path, 2 * shared, Configuration(flash_attn=flash_attn, cache_type="f16"))
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
    elif cache.startswith("PromptCache"):
        llm.set_cache(PromptCache(llm, Path(folder, "prompts"), capacity_bytes=CAPACITY))
    elif cache == "LlamaRAMCache":
        llm.set_cache(llama_cpp.LlamaRAMCache(capacity_bytes=CAPACITY))
    elif cache.startswith("LlamaDiskCache"):
        llm.set_cache(llama_cpp.LlamaDiskCache(f"{folder}/disk", capacity_bytes=CAPACITY))
    prefix = some_tokens(shared)
    first: list[float] = []
    start = time.perf_counter()
    for i in range(n_chats):
        asked = [[*prefix, *some_tokens(20, seed=i + 1)]]
        if between == "other":
            asked.append(some_tokens(50, seed=40 + i))
        for prompt in asked:
            begin = time.perf_counter()
            answer = llm.create_completion(
                prompt, max_tokens=4, temperature=0, grammar=ascii_only(), stream=True
            )
            next(answer)
            if prompt is asked[0]:
                first.append(time.perf_counter() - begin)
            for _ in answer:
                pass
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "first": first,
        "other": seconds - decoding,
        "peak": peak_memory(),
        "evaluated": evaluated,
        "kept": 0 if llm.cache is None else llm.cache.cache_size,
    }


def peak_memory() -> float:
    """MiB that this process has held at the most, since it began to run this program."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def ascii_only() -> Any:
    """Return a grammar of ASCII only: after half a character a Llama goes on beyond max_tokens."""
    return llama_cpp.LlamaGrammar.from_string("root ::= [ -~]*", verbose=False)


def with_each(
    path: str, between: str, *, flash_attn: bool, n_chats: int = 10, shared: int = SHARED
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each cache and what :func:`prompts` found with it, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for cache in CACHES:
            command = [sys.executable, __file__, "--child", cache, between, path, folder]
            command += ["--chats", str(n_chats), "--shared", str(shared)]
            command += ["--flash-attn"] if flash_attn else []
            # A LlamaDiskCache reports every step of it.
            done = subprocess.run(  # noqa: S603
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            yield cache, json.loads(done.stdout)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--flash-attn", action="store_true")
    parser.add_argument("--model", metavar="FILE", help="a GGUF file, in place of the one made")
    parser.add_argument("--chats", type=int, default=10, help="how many prompts (10)")
    parser.add_argument("--shared", type=int, default=SHARED, help=f"tokens ({SHARED})")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if llama_cpp is None:
        parser.error("this needs llama-cpp-python: pip install llama-cpp-python")
    how = {
        "flash_attn": options.flash_attn,
        "n_chats": options.chats,
        "shared": options.shared,
    }
    if options.child:
        cache, between, path, at = options.child
        print(json.dumps(prompts(path, cache, between, at, **how)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or write_model(Path(folder))
        for between in ("nothing", "other"):
            print(f"{options.chats} prompts that share {options.shared} tokens, between: {between}")
            for cache, found in with_each(path, between, **how):
                print(
                    f"  {cache:<25} {found['seconds']:7.1f} s, {found['other']:5.1f} not decoding"
                    f"  {found['peak']:8.0f} MiB at the most  "
                    f"{found['kept'] / 2**20:8.0f} MiB kept  "
                    f"{found['evaluated']:6} tokens evaluated"
                )


if __name__ == "__main__":
    main()
