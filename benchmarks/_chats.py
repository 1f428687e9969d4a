"""Chats that share a system prompt: what is kept of them, and how long each one waits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import llama_state as ls

CAPACITY = 64 << 30
NO_STORE, STORE, RESTARTED = "no store", "PrefixStore", "PrefixStore, restarted"


@dataclass(frozen=True)
class Chats:
    """What some chats took, one after the other.

    Attributes:
        model: The model, and how many tokens they share.
        way: Where states were kept.
        seconds: Of each chat, until the logits of its first token, or the token, were there.
        evaluated: Tokens that were evaluated of all of them.
        nbytes: Bytes that were kept at the end.
        least: Bytes of the shared prompt and of what is new in each; 0 where that is not known.
    """

    model: str
    way: str
    seconds: tuple[float, ...]
    evaluated: int
    nbytes: int
    least: int = 0


def chats(
    model: ls.Model, name: str, system: Sequence[int], questions: Sequence[Sequence[int]], at: Path
) -> Iterator[Chats]:
    """Yield what chats take without a store, with one in a folder, and when it is opened again.

    Args:
        model: The model.
        name: What to call it.
        system: The tokens that all begin with.
        questions: Those that follow, of each chat.
        at: A folder that is not there.
    """
    prompts = [[*system, *question] for question in questions]
    n_ctx = max(map(len, prompts)) + 64
    least = 0
    for way in (NO_STORE, STORE, RESTARTED):
        with ExitStack() as stack:
            ctx = stack.enter_context(model.context(n_ctx=n_ctx))
            store = None
            if way != NO_STORE:
                store = stack.enter_context(ls.PrefixStore(at, capacity_bytes=CAPACITY))
            if store and not least:
                store.prefill(ctx, system)
                alone = store.stats().used_bytes
                least = alone + alone * sum(map(len, questions)) // len(system)
            seconds, evaluated = [], 0
            for prompt in prompts:
                ctx.clear()
                start = time.perf_counter()
                recalled = store.prefill(ctx, prompt).n_past if store else 0
                if store is None:
                    ctx.decode(prompt)
                ctx.logits()
                seconds.append(time.perf_counter() - start)
                evaluated += len(prompt) - recalled
            nbytes = store.stats().used_bytes if store else 0
        yield Chats(name, way, tuple(seconds), evaluated, nbytes, least if store else 0)
