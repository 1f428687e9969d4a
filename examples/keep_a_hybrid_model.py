"""A hybrid model goes on only at restore points: where they come from, and what they give.

python examples/keep_a_hybrid_model.py MODEL.gguf
"""

from __future__ import annotations

import sys

import llama_state as ls

DOCUMENT = "A document that all questions are about. " * 6


def main(path: str) -> None:
    """Run the example."""
    with (
        ls.Model(path) as model,
        model.context(n_ctx=1024) as ctx,
        ls.PrefixStore("memory:?size=1GiB", chunk_tokens=64) as store,
    ):

        def ask(text: str) -> None:
            tokens = [*document, *model.tokenize(text, add_special=False)]
            recalled = store.prefill(ctx, tokens)
            print(f"evaluated {len(tokens) - len(recalled.tokens)} of {len(tokens)}: {text}")

        document = model.tokenize(DOCUMENT)
        ask("Who wrote it?")  # all of it; restore points at some chunk ends, and at its end
        store.prefill(ctx, document)  # and one where every question begins
        ask("Is it long?")  # so this is the question alone
        ask("Is it long?")  # and this is nothing: the logits are kept too
        cut = [*document, *model.tokenize("Is it short?", add_special=False)]
        print(store.find(ctx, cut).why)
        print(*(entry.restore_points for entry in store.entries()), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
