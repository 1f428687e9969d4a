"""An agent that branches: it tries several steps, keeps the best one, and goes on from there.

python examples/branch_an_agent.py MODEL.gguf
"""

from __future__ import annotations

import sys

import llama_state as ls

TASK = "Find out why the build fails. Say which step to take, and why it is the best one. " * 3
STEPS = ("Read the log.", "Run the tests.", "Ask a colleague.")
DEPTH = 3


def main(path: str) -> None:
    """Run the example."""
    with (
        ls.Model(path) as model,
        model.context(n_ctx=1024) as ctx,
        ls.PrefixStore("memory:?size=1GiB", chunk_tokens=64) as store,
    ):
        node = model.tokenize(TASK)
        store.prefill(ctx, node)
        for _ in range(DEPTH):
            branches = {}
            for step in STEPS:
                tokens = [*node, *model.tokenize(step, add_special=False)]
                recalled = store.prefill(ctx, tokens)  # back to the node, and on from there
                print(f"evaluated {len(tokens) - len(recalled.tokens)} of {len(tokens)}: {step}")
                branches[max(ctx.logits())] = tokens  # what an agent would judge the step by
            node = branches[max(branches)]
        print(repr(model.detokenize(node[len(model.tokenize(TASK)) :])))


if __name__ == "__main__":
    main(sys.argv[1])
