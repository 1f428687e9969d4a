"""A process that fills in a system prompt and a question of its own: ``turn.py MODEL URL SEED``.

It prints how many tokens it had to evaluate, and the last logits' largest.
"""

from __future__ import annotations

import sys
from random import Random

import llama_state as ls
from llama_state.store import PrefixStore
from tests.libllama import LIBRARY

SYSTEM = 300
QUESTION = 20
CHUNK = 64


def prompt(seed: int, n_vocab: int) -> list[int]:
    """The prompt of one process: what is common to all, and its own."""
    common, own = Random(0), Random(seed)
    return [
        *(common.randrange(n_vocab) for _ in range(SYSTEM)),
        *(own.randrange(n_vocab) for _ in range(QUESTION)),
    ]


def main(model_path: str, url: str, seed: int) -> None:
    """Fill it in."""
    with (
        ls.Model(model_path, LIBRARY) as model,
        model.context(n_ctx=512) as ctx,
        PrefixStore(url, chunk_tokens=CHUNK) as store,
    ):
        tokens = prompt(seed, model.n_vocab)
        recalled = store.prefill(ctx, tokens)
        row = ctx.logits()
        best = max(range(len(row)), key=row.__getitem__)
        print(len(tokens) - len(recalled.tokens), best, store.stats().failures)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
