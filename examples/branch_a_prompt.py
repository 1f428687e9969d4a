"""One prompt, many continuations: evaluated once, restored for each.

    python examples/branch_a_prompt.py MODEL.gguf

Works for recurrent and hybrid models too, whose memory a Llama cannot cut back.
"""

from __future__ import annotations

import sys
import time

import llama_cpp

import llama_state as ls

PROMPT = b"A long document, which every question is about. " * 8
QUESTIONS = (b"What is it about?", b"Who wrote it?", b"Is it long?")


def main(path: str) -> None:
    """Run the example."""
    llm = llama_cpp.Llama(path, n_ctx=1024, verbose=False)
    ctx = ls.attach(llm)
    prompt = llm.tokenize(PROMPT)
    llm.eval(prompt)
    blob = ctx.snapshot()
    print(f"evaluated {len(prompt)} tokens once")
    for question in QUESTIONS:
        ctx.restore(blob, tokens=prompt)
        start = time.perf_counter()
        tokens = [*prompt, *llm.tokenize(question, add_bos=False)]
        text = llm.create_completion(tokens, max_tokens=16, temperature=0)["choices"][0]["text"]
        print(f"{question.decode()} {text!r} ({time.perf_counter() - start:.2f} s)")


if __name__ == "__main__":
    main(sys.argv[1])
