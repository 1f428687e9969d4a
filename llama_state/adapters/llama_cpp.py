"""llama-cpp-python: the whole API on a ``llama_cpp.Llama``, and a prompt cache for it."""

from __future__ import annotations

from ._llama_context import LlamaContext
from ._prompt_cache import BlobStore, PromptCache

__all__ = ["BlobStore", "LlamaContext", "PromptCache"]
