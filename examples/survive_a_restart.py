"""Leave a prompt on the disk and go on with it in another process.

python examples/survive_a_restart.py MODEL.gguf STATE      # run it twice
"""

from __future__ import annotations

import sys
from pathlib import Path

import llama_cpp

import llama_state as ls

PROMPT = b"A system prompt that takes a while to evaluate. " * 8


def main(path: str, state: str) -> None:
    """Run the example."""
    llm = llama_cpp.Llama(path, n_ctx=1024, verbose=False)
    ctx = ls.attach(llm)
    prompt = llm.tokenize(PROMPT)
    if Path(state).exists():
        restored = ctx.load_state(state)
        print(f"loaded {len(restored.tokens)} tokens")
    else:
        llm.eval(prompt)
        print(f"saved {len(ctx.tokens)} tokens in {ctx.save_state(state)} bytes")
    tokens = [*prompt, *llm.tokenize(b"And now?", add_bos=False)]
    print(repr(llm.create_completion(tokens, max_tokens=16, temperature=0)["choices"][0]["text"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
