"""Many chats on one system prompt: it is evaluated once and kept once.

python examples/share_a_system_prompt.py MODEL.gguf
"""

from __future__ import annotations

import sys

import llama_state as ls

SYSTEM = "You answer questions about llamas, politely and in one sentence. " * 6
QUESTIONS = ("What do they eat?", "Where do they live?", "Do they swim?", "How old do they get?")


def main(path: str) -> None:
    """Run the example."""
    with (
        ls.Model(path) as model,
        model.context(n_ctx=1024) as ctx,
        ls.PrefixStore("memory:?size=1GiB", chunk_tokens=64) as store,
    ):
        system = model.tokenize(SYSTEM)
        store.prefill(ctx, system)
        store.pin(ctx, system)  # it stays when room is needed
        print(f"evaluated {len(system)} tokens of the system prompt")
        alone = 0
        for question in QUESTIONS:
            tokens = [*system, *model.tokenize(question, add_special=False)]
            recalled = store.prefill(ctx, tokens)
            alone += ctx.seq_state_size()
            print(f"evaluated {len(tokens) - len(recalled.tokens)} tokens of {len(tokens)}")
        print(f"{store.stats().used_bytes} bytes are kept; states of their own have {alone}")


if __name__ == "__main__":
    main(sys.argv[1])
