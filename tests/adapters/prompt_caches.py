"""A Llama with a prompt cache, and what tests do to both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_state.adapters.llama_cpp import PromptCache
from tests.adapters.llamas import answer

Make = Callable[..., Any]
PREFIX = "You are a helpful assistant; the state of a context is saved and brought back. " * 3
QUESTIONS = [f"{PREFIX}Question {i}: {'x' * i}?" for i in range(5)]


def with_cache(llm: Any, *arguments: Any, **options: Any) -> PromptCache:
    cache = PromptCache(llm, *arguments, **options)
    llm.set_cache(cache)
    return cache


def fresh_answer(make: Make, kind: str, prompt: Any, **options: Any) -> str:
    return answer(make(kind, n_ctx=1024, **options), prompt)[0]


def elsewhere(llm: Any) -> None:
    """Let the Llama hold something else."""
    llm.reset()
    llm.eval(list(range(100, 140)))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def n_stored(cache: PromptCache) -> list[int]:
    """Tokens of each stored prompt that no other goes on from."""
    return sorted(entry.n_tokens for entry in cache.store.entries())
