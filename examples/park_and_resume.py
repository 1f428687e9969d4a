"""Two chats on one Llama: park one, hold the other, resume the first without evaluating it again.

python examples/park_and_resume.py MODEL.gguf
"""

from __future__ import annotations

import sys
import time
from typing import Any

import llama_cpp

import llama_state as ls


def say(llm: Any, chat: list[dict[str, str]], text: str) -> None:
    """Add a turn and its answer to *chat*, and say what it took."""
    start = time.perf_counter()
    chat.append({"role": "user", "content": text})
    done = llm.create_chat_completion(chat, max_tokens=16, temperature=0)
    chat.append(done["choices"][0]["message"])
    print(f"{text!r}: {chat[-1]['content']!r} ({time.perf_counter() - start:.2f} s)")


def main(path: str) -> None:
    """Run the example."""
    llm = llama_cpp.Llama(path, n_ctx=1024, verbose=False)
    ctx = ls.attach(llm)
    alice: list[dict[str, str]] = []
    bob: list[dict[str, str]] = []

    say(llm, alice, "I am Alice. Remember that.")
    parked, tokens = ctx.snapshot(), ctx.tokens
    print(f"parked {len(tokens)} tokens in {len(parked)} bytes")

    say(llm, bob, "I am Bob, somebody else.")

    ctx.restore(parked, tokens=tokens)
    say(llm, alice, "Who am I?")


if __name__ == "__main__":
    main(sys.argv[1])
