"""llama-cpp-python: the whole API on a ``llama_cpp.Llama``, and a prompt cache for it."""

from __future__ import annotations

from .context import LlamaContext
from .prompt_cache import CacheStats, PromptCache

__all__ = ["CacheStats", "LlamaContext", "PromptCache"]
