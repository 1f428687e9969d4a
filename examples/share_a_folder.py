"""A shared folder: what one process has evaluated, the others find; nobody without the key can.

python examples/share_a_folder.py MODEL.gguf FOLDER
"""

from __future__ import annotations

import multiprocessing
import secrets
import sys

import llama_state as ls

PROMPT = "A prompt that every worker begins with. " * 6


def work(path: str, folder: str, key: bytes, text: str) -> str:
    """Evaluate a prompt, as one of many processes."""
    with (
        ls.Model(path) as model,
        model.context(n_ctx=1024) as ctx,
        ls.PrefixStore(folder, capacity_bytes=1 << 30, key=key) as store,
    ):
        tokens = model.tokenize(PROMPT + text)
        recalled = store.prefill(ctx, tokens)
        return f"evaluated {len(tokens) - len(recalled.tokens)} of {len(tokens)} tokens: {text}"


def main(path: str, folder: str) -> None:
    """Run the example."""
    key = secrets.token_bytes(32)  # keep it where the programs are, not in the folder
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(pool.apply(work, (path, folder, key, "I am the first.")))
        others = [(path, folder, key, f"I am number {number}.") for number in (2, 3, 4)]
        print("\n".join(pool.starmap(work, others)))
    with (
        ls.Model(path) as model,
        model.context(n_ctx=1024) as ctx,
        ls.PrefixStore(folder, readonly=True) as store,
    ):
        print("without the key:", store.find(ctx, model.tokenize(PROMPT)).why)


if __name__ == "__main__":
    main(*sys.argv[1:])
