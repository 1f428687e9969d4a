"""Keep the prompts of a chat in a folder: a program that starts again evaluates what is new.

python examples/keep_prompts.py MODEL.gguf FOLDER      # run it twice
"""

from __future__ import annotations

import sys

import llama_cpp

from llama_state.adapters.llama_cpp import PromptCache

QUESTIONS = ("What is a prefix?", "And what is a state?")


def main(path: str, folder: str) -> None:
    """Run the example."""
    llm = llama_cpp.Llama(path, n_ctx=1024, verbose=False)
    cache = PromptCache(llm, folder, capacity_bytes=1 << 30)
    llm.set_cache(cache)
    answers, chat = [], []
    for question in QUESTIONS:
        chat.append({"role": "user", "content": question})
        done = llm.create_chat_completion(chat, max_tokens=16, temperature=0)
        chat.append(done["choices"][0]["message"])
        answers.append(repr(chat[-1]["content"]))
        if len(answers) == 1:  # what the second question finds is of this process
            print(cache.store.stats().tokens_recalled, "tokens were there")
    print("\n".join(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
