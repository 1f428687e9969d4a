"""Ten prompts that share 2,000 tokens, with each prompt cache of llama-cpp-python, and without.

    python benchmarks/llama_cpp_python.py [--flash-attn]

Each cache in a process of its own, with the model of 128 KiB of state for a token that
``llama_state.testing.models.write_benchmark_model`` makes; what one save or restore takes is in
``state_io.py``. Needs llama-cpp-python and the extra ``testing``.
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

from _states import Configuration, llama_cpp, open_llama, some_tokens, write_model

from llama_state.adapters.llama_cpp import PromptCache

CACHES = ("none", "LlamaRAMCache", "PromptCache", "in a folder", "restarted")
SHARED = 2000
CAPACITY = 2 << 30


def prompts(path: str, cache: str, between: str, *, flash_attn: bool) -> dict[str, float]:
    """Ten prompts that share a prefix; with *between* "other" another prompt after each.

    A cache "in a folder" is a PromptCache beside the model, and "restarted" one that finds there
    what the process before has left.
    """
    llm = open_llama(path, 4096, Configuration(flash_attn=flash_attn, cache_type="f16"))
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
    elif cache in ("in a folder", "restarted"):
        folder = Path(path).with_name(f"prompts, between them {between}")
        llm.set_cache(PromptCache(llm, folder, capacity_bytes=CAPACITY))
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
    """Return a grammar of ASCII only: after half a character a Llama goes on beyond max_tokens."""
    return llama_cpp.LlamaGrammar.from_string("root ::= [ -~]*", verbose=False)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--flash-attn", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if llama_cpp is None:
        parser.error("this needs llama-cpp-python: pip install llama-cpp-python")
    if options.child:
        cache, between, path = options.child
        print(json.dumps(prompts(path, cache, between, flash_attn=options.flash_attn)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder))
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
