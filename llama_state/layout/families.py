"""How the metadata of a model decides the layout of its states: the rules of a table row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final, TypeAlias

from .traits import Module, Traits, Window

Metadata: TypeAlias = Callable[[str], "str | None"]

UNKNOWN: Final = None
"""The answer of a rule that the API and the metadata do not decide: both answers are tried."""

LLAMA4_CHUNK: Final = 8192
"""Size of llama4's attention chunks where its GGUF does not say."""

# llama_model_rope_type: M-RoPE and interleaved M-RoPE.
_MROPE_TYPES = frozenset({8, 40})
_ANY_SIZE = Window("standard", 0)
_WITH_WINDOW = frozenset({"iswa", "hybrid-iswa", "dsa-iswa", "dsv4"})


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model; None for what is not. See :func:`model_traits`."""

    arch: str
    metadata: Metadata | None
    rope_type: int | None
    recurrent: bool | None
    hybrid: bool | None
    n_swa: int | None

    def number(self, key: str, default: int = 0) -> int | None:
        """Return the value of a GGUF key of the architecture, *default* if the GGUF lacks it."""
        if self.metadata is None:
            return None
        text = self.metadata(f"{self.arch}.{key}")
        if text is None:
            return default
        return int(text) if text.isdecimal() else None

    def is_positive(self, key: str, default: int = 0) -> bool | None:
        """Return whether the value of a key is greater than 0."""
        number = self.number(key, default)
        return None if number is None else number > 0

    def window_size(self) -> int | None:
        """Return the size of the attention window, 0 if there is none."""
        return self.number("attention.sliding_window") if self.n_swa is None else self.n_swa

    def agrees_with(self, module: Module) -> bool:
        """Return whether llama.cpp's ``is_hybrid`` and ``is_recurrent`` allow *module*."""
        if module == "dsv4":
            # Its compressors run, so later builds call it hybrid and earlier ones do not.
            return not self.recurrent
        hybrid = module.startswith("hybrid")
        if self.hybrid is not None and self.hybrid != hybrid:
            return False
        return hybrid or self.recurrent is None or self.recurrent == (module == "recurrent")


Rule: TypeAlias = "bool | Callable[[ModelInfo], bool | None] | None"
"""The answer to a question about a model, or a function that gives it; None: unknown."""


def has_window(model: ModelInfo) -> bool | None:
    """Return whether the model has an attention window, by the API or else the metadata."""
    size = model.window_size()
    return None if size is None else size > 0


def api_has_window(model: ModelInfo) -> bool | None:
    """Return whether the model has an attention window, by ``llama_model_n_swa`` only."""
    return None if model.n_swa is None else model.n_swa > 0


def llama4_has_window(model: ModelInfo) -> bool | None:
    """Return whether a llama4 has attention chunks: it does unless the GGUF says 0."""
    if model.n_swa is not None:
        return model.n_swa > 0
    return model.is_positive("attention.sliding_window", default=LLAMA4_CHUNK)


def has_64_layers(model: ModelInfo) -> bool | None:
    """Return whether the model has 64 layers, as the one exaone4 with a window does."""
    n_layer = model.number("block_count")
    return None if n_layer is None else n_layer == 64


def has_mla(model: ModelInfo) -> bool | None:
    """Return whether the model uses latent attention: older GGUF files of it do not."""
    key = model.is_positive("attention.key_length_mla")
    return model.is_positive("attention.value_length_mla") if key else key


def has_indexer(model: ModelInfo) -> bool | None:
    """Return whether the model has an indexer (sparse attention)."""
    return model.is_positive("attention.indexer.top_k")


def has_ngram_embeddings(model: ModelInfo) -> bool | None:
    """Return whether the model has n-gram embeddings."""
    return model.is_positive("ple.ngram_size")


@dataclass(frozen=True, slots=True)
class Family:
    """How to choose the traits of an architecture.

    Attributes:
        module: The kind of memory if *condition* is true.
        fallback: The kind of memory if *condition* is false.
        condition: Whether the kind is *module*.
        k_only, ext, ple: See :class:`Traits`. A rope type that is given overrules *ext*.
        window: Kind of the window, and its size if neither the API nor the metadata give it.
    """

    module: Module
    fallback: Module = "kv"
    condition: Rule = True
    k_only: Rule = False
    ext: Rule = False
    ple: Rule = False
    window: Window = _ANY_SIZE

    @property
    def modules(self) -> tuple[Module, ...]:
        """The kinds of memory that its architectures can have."""
        return (self.module,) if self.condition is True else (self.module, self.fallback)

    def candidates(self, model: ModelInfo, *, known_arch: bool) -> Iterator[Traits]:
        """Yield the traits that the states of *model* can have, the most likely first.

        Args:
            model: The model.
            known_arch: Whether its architecture is in the table. If not, the kind of its window is
                not known either, and the traits have none.
        """
        ext = self.ext if model.rope_type is None else model.rope_type in _MROPE_TYPES
        for condition in reversed(_answers(self.condition, model)):
            module = self.module if condition else self.fallback
            if not model.agrees_with(module):
                continue
            with_window = known_arch and module in _WITH_WINDOW
            window = self._window(model) if with_window else None
            flags = (_answers(rule, model) for rule in (self.k_only, ext, self.ple))
            for k_only, with_ext, ple in product(*flags):
                yield Traits(model.arch, module, k_only, with_ext, ple, window)

    def _window(self, model: ModelInfo) -> Window | None:
        # The API says 0 of deepseek4, which has one: where a cache has a window, the GGUF tells.
        size = model.n_swa or self.window.size or model.number("attention.sliding_window")
        return Window(self.window.kind, size) if size else None


def _answers(rule: Rule, model: ModelInfo) -> tuple[bool, ...]:
    """Return the answers that *rule* leaves open: one, or both."""
    answer = rule(model) if callable(rule) else rule
    return (False, True) if answer is None else (answer,)
