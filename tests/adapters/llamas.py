"""What the tests inside llama-cpp-python share: tiny models, counted tokens, greedy answers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llama_state.testing import write_model

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

# A plain cache, one with a sliding window of 32, a recurrent memory, and both ways to mix.
KINDS = ("llama-dense", "gemma3-dense", "mamba2-dense", "jamba-dense", "lfm2-dense")
CUT = ("llama-dense", "gemma3-dense")  # whose memory can be cut back
# A Llama goes on beyond max_tokens after half a character, which random weights make often.
GREEDY = {
    "temperature": 0,
    "grammar": llama_cpp.LlamaGrammar.from_string("root ::= [ -~]*", verbose=False),
}
MORE = list(b" And now?")
TEXT = "The state of a context, saved and brought back."


def prompt_of(llm: Any, text: str = TEXT) -> list[int]:
    return list(llm.tokenize(text.encode()))


def is_true(llm: Any, ctx: Any, tokens: list[int]) -> None:
    """The Llama lists *tokens*, the cache holds as many, and it will decode before it samples."""
    assert llm.n_tokens == len(tokens) == ctx.n_past()
    assert llm.input_ids[: llm.n_tokens].tolist() == tokens
    assert list(ctx.tokens) == tokens
    assert llm._requires_eval


def load_adapter(llm: Any, path: Path) -> Any:
    """Load a LoRA adapter, which is freed with the model."""
    loaded = llama_cpp.llama_adapter_lora_init(llm._model.model, str(path).encode())
    assert loaded
    return loaded


def set_adapters(llm: Any, *adapters: tuple[Any, float]) -> None:
    """Set these and no others, by llama.cpp's own function: the ``Llama`` does not know."""
    loaded = (llama_cpp.llama_adapter_lora_p_ctypes * len(adapters))(*(a for a, _ in adapters))
    scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
    assert not llama_cpp.llama_set_adapters_lora(llm._ctx.ctx, loaded, len(adapters), scales)


def swap(llm: Any, path: Path | None, scale: float = 1.0) -> None:
    """Give a ``Llama`` another adapter, or none, and let it say so."""
    loaded = load_adapter(llm, path) if path else None
    set_adapters(llm, *[(loaded, scale)] if path else [])
    llm.lora_path, llm.lora_scale = str(path) if path else None, scale
    llm._lora_adapter = loaded


class Counter:
    """Counts the tokens that llama.cpp is given to decode by a ``Llama``."""

    def __init__(self, llm: Any) -> None:
        self._inner, self._decode = llm._ctx, llm._ctx.decode
        self.total = 0

    def __enter__(self) -> Counter:
        self._inner.decode = self._count
        return self

    def __exit__(self, *_: object) -> None:
        del self._inner.decode

    def _count(self, batch: Any) -> Any:
        self.total += batch.batch.n_tokens
        return self._decode(batch)


def answer(llm: Any, prompt: Any, n: int = 12) -> tuple[str, int]:
    """The greedy completion of a prompt, and the tokens that were evaluated for it, all in all."""
    with Counter(llm) as counter:
        done = llm.create_completion(prompt, max_tokens=n, **GREEDY)
    return done["choices"][0]["text"], counter.total


def generated(llm: Any, prompt: list[int], n: int = 12) -> tuple[list[int], int]:
    """The ids of the greedy continuation, and the tokens of the prompt that were evaluated."""
    ids: list[int] = []
    with Counter(llm) as counter:
        for token in llm.generate(prompt, temp=0.0):
            ids.append(token)
            if len(ids) == n:
                break
    return ids, counter.total - (n - 1)


class Models:
    """Model files and the ``Llama`` objects of one test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[Any] = []

    def path(self, kind: str) -> Path:
        """The file of a text model of a kind."""
        path = self._folder / f"{kind}.gguf"
        if not path.exists():
            write_model(path, kind, text=True, overrides={"context_length": 2048})
        return path

    def __call__(self, kind: str = "llama-dense", **options: Any) -> Any:
        """A ``Llama``."""
        settings = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
        llm = llama_cpp.Llama(str(self.path(kind)), **{**settings, **options})
        self._open.append(llm)
        return llm

    def close(self) -> None:
        """Close what is open."""
        for llm in self._open:
            llm.close()


@contextmanager
def models(folder: Path) -> Iterator[Callable[..., Any]]:
    """Makes ``Llama`` objects and closes them."""
    made = Models(folder)
    try:
        yield made
    finally:
        made.close()
