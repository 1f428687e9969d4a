"""A chat back end that restarts: the conversation goes on, and only what is new is evaluated.

python examples/chat_after_a_restart.py MODEL.gguf FOLDER TEXT      # run it several times
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_state as ls

SYSTEM = "You are a helpful assistant who answers in one sentence.\n"
N_ANSWER = 16


def answer(ctx: ls.Context, store: ls.PrefixStore, tokens: list[int]) -> list[int]:
    """Return the tokens of an answer: the likeliest one each time."""
    recalled = store.prefill(ctx, tokens)
    print(f"evaluated {len(tokens) - len(recalled.tokens)} tokens of {len(tokens)}")
    found: list[int] = []
    for _ in range(N_ANSWER):
        logits = ctx.logits()
        found.append(max(range(len(logits)), key=logits.__getitem__))
        ctx.decode(found[-1:])
    store.remember(ctx, [*tokens, *found])
    return found


def main(path: str, folder: str, text: str) -> None:
    """Run the example."""
    # The program's own record of the conversation. The store keeps states, found by tokens.
    record = Path(folder, "chat.json")
    with (
        ls.Model(path) as model,
        model.context(n_ctx=1024) as ctx,
        ls.PrefixStore(Path(folder, "kv"), capacity_bytes=1 << 30) as store,
    ):
        tokens = json.loads(record.read_text()) if record.exists() else model.tokenize(SYSTEM)
        tokens += model.tokenize(f"User: {text}\nAssistant:", add_special=False)
        found = answer(ctx, store, tokens)
        print(repr(model.detokenize(found)))
        record.write_text(json.dumps([*tokens, *found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
