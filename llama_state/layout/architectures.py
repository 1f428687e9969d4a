"""Which layouts the states of an architecture can have, as far as its metadata tells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import TypeAlias

from .traits import Module, Traits, Window

Metadata: TypeAlias = Callable[[str], "str | None"]

ROPE_TYPES_2D = frozenset({8, 40})
"""``llama_model_rope_type``: M-RoPE and interleaved M-RoPE."""

CHUNK = 8192
_WINDOWED = frozenset({"iswa", "hybrid-iswa", "dsa-iswa", "dsv4"})


@dataclass(frozen=True, slots=True)
class _ModelInfo:
    """What is known of a model. Numbers and answers are None where it is not known."""

    arch: str
    metadata: Metadata | None
    rope_type: int | None
    recurrent: bool | None
    hybrid: bool | None
    n_swa: int | None

    def number(self, key: str, absent: int = 0) -> int | None:
        if self.metadata is None:
            return None
        text = self.metadata(f"{self.arch}.{key}")
        if text is None:
            return absent
        return int(text) if text.isdecimal() else None

    def positive(self, key: str, absent: int = 0) -> bool | None:
        number = self.number(key, absent)
        return None if number is None else number > 0

    def window(self) -> int | None:
        return self.number("attention.sliding_window") if self.n_swa is None else self.n_swa


_Rule: TypeAlias = Callable[[_ModelInfo], "bool | None"]


def _never(_: _ModelInfo) -> bool | None:
    return False


def _always(_: _ModelInfo) -> bool | None:
    return True


def _perhaps(_: _ModelInfo) -> bool | None:
    return None


def _windowed(facts: _ModelInfo) -> bool | None:
    size = facts.window()
    return None if size is None else size > 0


def _has_window(facts: _ModelInfo) -> bool | None:
    return None if facts.n_swa is None else facts.n_swa > 0


def _chunked(facts: _ModelInfo) -> bool | None:
    if facts.n_swa is not None:
        return facts.n_swa > 0
    return facts.positive("attention.sliding_window", absent=CHUNK)


def _deep(facts: _ModelInfo) -> bool | None:
    count = facts.number("block_count")
    return None if count is None else count == 64


def _latent(facts: _ModelInfo) -> bool | None:
    key = facts.positive("attention.key_length_mla")
    return facts.positive("attention.value_length_mla") if key else key


def _indexed(facts: _ModelInfo) -> bool | None:
    return facts.positive("attention.indexer.top_k")


def _ngrams(facts: _ModelInfo) -> bool | None:
    return facts.positive("ple.ngram_size")


@dataclass(frozen=True, slots=True)
class _Family:
    """How to choose the traits of an architecture.

    Attributes:
        module: The kind of memory, where *applies* says yes.
        otherwise: The kind of memory, where it says no.
        k_only, ext, ple: See :class:`Traits`. A rope type that is given overrules *ext*.
        window: Kind of the window, and its size where neither API nor metadata gives it.
    """

    module: Module
    otherwise: Module = "kv"
    applies: _Rule = _always
    k_only: _Rule = _never
    ext: _Rule = _never
    ple: _Rule = _never
    window: Window | None = None


def _table(rows: Mapping[str, _Family]) -> Mapping[str, _Family]:
    """Return *rows*, whose keys are names with spaces between, with one name a key."""
    return MappingProxyType({name: family for key, family in rows.items() for name in key.split()})


_FAMILIES = _table(
    {
        "llama deci falcon grok gpt2 gptj gptneox mpt baichuan starcoder refact bloom stablelm "
        "qwen qwen2 qwen2moe qwen3 qwen3moe phi2 phi3 phimoe plamo codeshell orion internlm2 "
        "minicpm minicpm3 gemma starcoder2 xverse command-r dbrx olmo olmoe openelm arctic "
        "deepseek deepseek2-ocr chatglm bitnet t5 t5encoder jais jais2 nemotron exaone granite "
        "granitemoe chameleon plm bailingmoe bailingmoe2 dots1 arcee ernie4_5 ernie4_5-moe "
        "hunyuan-moe hunyuan-dense hy_v3 smollm3 seed_oss grovemoe apertus minimax-m2 mistral3 "
        "pangu-embedded llama-embed maincoder cogvlm nanbeige hrm_text": _Family("kv"),
        "qwen2vl paddleocr qwen3vl qwen3vlmoe qwen3tts": _Family("kv", ext=_always),
        # M-RoPE only where the GGUF has rope sections, which are an array: not told by metadata.
        "glm4 glm4moe hunyuan_vl": _Family("kv", ext=_perhaps),
        "deepseek2 mistral4": _Family("kv", k_only=_latent),
        "gemma2 gemma3n gemma4 gpt-oss cohere2 cohere2moe exaone-moe granite_swa mimo2 step35 "
        "muse-glimmer maple spark2_5": _Family("iswa"),
        "gemma3 afmoe laguna mellum olmo2 plamo3": _Family("iswa", applies=_windowed),
        "smallthinker": _Family("iswa", applies=_windowed, window=Window("standard", 4096)),
        "dflash": _Family("iswa", applies=_windowed, ext=_perhaps),
        "llama4": _Family("iswa", applies=_chunked, window=Window("chunked", CHUNK)),
        "exaone4": _Family("iswa", applies=_deep),
        "mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7": _Family("recurrent"),
        "jamba falcon-h1 granitehybrid nemotron_h nemotron_h_moe plamo2 qwen3next minimax-01": (
            _Family("hybrid")
        ),
        "qwen35 qwen35moe": _Family("hybrid", ext=_always),
        "kimi-linear kimi-k3": _Family("hybrid", k_only=_always),
        "bailingmoe3": _Family("hybrid", k_only=_always, ext=_perhaps),
        "lfm2": _Family("hybrid-iswa", "hybrid", applies=_windowed),
        "lfm2moe": _Family("hybrid"),
        "qwen4exp": _Family("hybrid-idx", ext=_always, ple=_ngrams),
        "glm5-next": _Family("hybrid-idx", k_only=_always),
        "deepseek32 glm-dsa": _Family("dsa", k_only=_always),
        "hy_v4": _Family("dsa", applies=_indexed, k_only=_always),
        "dots3note": _Family("dsa-iswa", k_only=_always),
        "minimax-m3": _Family("msa"),
        "deepseek4": _Family("dsv4", k_only=_always),
        # gemma4-assistant reads the cells of another context and has none of its own.
        "bert nomic-bert nomic-bert-moe modern-bert neo-bert jina-bert-v2 jina-bert-v3 eurobert "
        "gemma-embedding wavtokenizer-dec dream llada llada-moe rnd1 clef gemma4-assistant": (
            _Family("none")
        ),
    }
)

_GUESSES: tuple[_Family, ...] = (
    _Family("kv", k_only=_perhaps, ext=_perhaps),
    _Family("iswa", applies=_has_window, k_only=_perhaps, ext=_perhaps),
    _Family("hybrid", k_only=_perhaps, ext=_perhaps),
    _Family("recurrent"),
    _Family("hybrid-iswa", "hybrid", applies=_has_window, k_only=_perhaps, ext=_perhaps),
    _Family("dsv4", ext=_perhaps),
    _Family("msa", ext=_perhaps),
    _Family("dsa", ext=_perhaps),
    _Family("dsa-iswa", ext=_perhaps),
    _Family("hybrid-idx", k_only=_perhaps, ext=_perhaps, ple=_perhaps),
    _Family("none"),
)
"""Everything that memory can be, most common first."""


def is_known(arch: str) -> bool:
    """Tell whether the layouts of this architecture are known."""
    return arch in _FAMILIES


def model_traits(
    arch: str = "",
    metadata: Metadata | None = None,
    *,
    rope_type: int | None = None,
    recurrent: bool | None = None,
    hybrid: bool | None = None,
    n_swa: int | None = None,
) -> tuple[Traits, ...]:
    """Return the layouts that states of a model can have, most likely first.

    One is certain; of several, the one that reads a state to its last byte is right. There are
    several where not everything that decides is given, and for an unknown architecture.

    Args:
        arch: Its architecture; "" where not known.
        metadata: Key -> its GGUF value as text, None where the GGUF lacks it (as
            ``llama_model_meta_val_str``). None: the metadata is not at hand.
        rope_type: ``llama_model_rope_type``, which overrules what is known of *arch*.
        recurrent: ``llama_model_is_recurrent``, likewise.
        hybrid: ``llama_model_is_hybrid``, likewise.
        n_swa: ``llama_model_n_swa`` (positions).
    """
    facts = _ModelInfo(arch, metadata, rope_type, recurrent, hybrid, n_swa)
    known = [_FAMILIES[arch]] if is_known(arch) else []
    # Where the library contradicts the table, the table is out of date.
    return _candidates(known, facts) or _candidates(_GUESSES, facts)


def _candidates(families: Iterable[_Family], facts: _ModelInfo) -> tuple[Traits, ...]:
    found = (traits for family in families for traits in _of_family(family, facts))
    return tuple(dict.fromkeys(traits for traits in found if _agrees(traits.module, facts)))


def _of_family(family: _Family, facts: _ModelInfo) -> Iterator[Traits]:
    ext = family.ext(facts) if facts.rope_type is None else facts.rope_type in ROPE_TYPES_2D
    for applies in reversed(_either(family.applies(facts))):
        module = family.module if applies else family.otherwise
        window = _window(family, facts) if module in _WINDOWED else None
        flags = map(_either, (family.k_only(facts), ext, family.ple(facts)))
        for k_only, with_ext, ple in product(*flags):
            yield Traits(facts.arch, module, k_only, with_ext, ple, window)


def _either(answer: bool | None) -> tuple[bool, ...]:
    return (False, True) if answer is None else (answer,)


def _window(family: _Family, facts: _ModelInfo) -> Window | None:
    """Return the window; None for an unknown architecture: its kind is not known either."""
    if not is_known(facts.arch):
        return None
    kind, fixed = (family.window.kind, family.window.size) if family.window else ("standard", 0)
    size = facts.n_swa or fixed or facts.window()
    return Window(kind, size) if size else None


def _agrees(module: Module, facts: _ModelInfo) -> bool:
    hybrid = module.startswith("hybrid")
    if facts.hybrid is not None and facts.hybrid != hybrid:
        return False
    return hybrid or facts.recurrent is None or facts.recurrent == (module == "recurrent")
