"""Which layouts the states of an architecture can have, as far as its metadata decides.

To add an architecture, add a line to the table: its name (``general.architecture``) and one of
the families above it, or a :class:`~.families.Family` of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, starmap
from types import MappingProxyType

from .._io.arguments import checked
from .families import (
    LLAMA4_CHUNK,
    UNKNOWN,
    Family,
    Metadata,
    ModelInfo,
    api_has_window,
    has_64_layers,
    has_indexer,
    has_mla,
    has_ngram_embeddings,
    has_window,
    llama4_has_window,
)
from .traits import Traits, Window

KV = Family("kv")
KV_MROPE = Family("kv", ext=True)
# M-RoPE only if the GGUF has rope sections. They are an array, which metadata look-ups do not give.
KV_MAYBE_MROPE = Family("kv", ext=UNKNOWN)
KV_MAYBE_MLA = Family("kv", k_only=has_mla)
ISWA = Family("iswa")
ISWA_IF_WINDOW = Family("iswa", condition=has_window)
RECURRENT = Family("recurrent")
HYBRID = Family("hybrid")
HYBRID_MROPE = Family("hybrid", ext=True)
HYBRID_K_ONLY = Family("hybrid", k_only=True)
DSA = Family("dsa", k_only=True)
NO_MEMORY = Family("none")

ARCHITECTURES: Mapping[str, Family] = MappingProxyType(
    {
        "afmoe": ISWA_IF_WINDOW,
        "apertus": KV,
        "arcee": KV,
        "arctic": KV,
        "arwkv7": RECURRENT,
        "baichuan": KV,
        "bailingmoe": KV,
        "bailingmoe2": KV,
        "bailingmoe3": Family("hybrid", k_only=True, ext=UNKNOWN),
        "bert": NO_MEMORY,
        "bitnet": KV,
        "bloom": KV,
        "chameleon": KV,
        "chatglm": KV,
        "clef": NO_MEMORY,
        "codeshell": KV,
        "cogvlm": KV,
        "cohere2": ISWA,
        "cohere2moe": ISWA,
        "command-r": KV,
        "dbrx": KV,
        "deci": KV,
        "deepseek": KV,
        "deepseek2": KV_MAYBE_MLA,
        "deepseek2-ocr": KV,
        "deepseek32": DSA,
        "deepseek4": Family("dsv4", k_only=True),
        "dflash": Family("iswa", condition=has_window, ext=UNKNOWN),
        "dots1": KV,
        "dots3note": Family("dsa-iswa", k_only=True),
        "dream": NO_MEMORY,
        "ernie4_5": KV,
        "ernie4_5-moe": KV,
        "eurobert": NO_MEMORY,
        "exaone": KV,
        "exaone-moe": ISWA,
        "exaone4": Family("iswa", condition=has_64_layers),
        "falcon": KV,
        "falcon-h1": HYBRID,
        "gemma": KV,
        "gemma-embedding": NO_MEMORY,
        "gemma2": ISWA,
        "gemma3": ISWA_IF_WINDOW,
        "gemma3n": ISWA,
        "gemma4": ISWA,
        # It reads the cells of another context and has none of its own.
        "gemma4-assistant": NO_MEMORY,
        "glm-dsa": DSA,
        "glm4": KV_MAYBE_MROPE,
        "glm4moe": KV_MAYBE_MROPE,
        "glm5-next": Family("hybrid-idx", k_only=True),
        "gpt-oss": ISWA,
        "gpt2": KV,
        "gptj": KV,
        "gptneox": KV,
        "granite": KV,
        "granite_swa": ISWA,
        "granitehybrid": HYBRID,
        "granitemoe": KV,
        "grok": KV,
        "grovemoe": KV,
        "hrm_text": KV,
        "hunyuan-dense": KV,
        "hunyuan-moe": KV,
        "hunyuan_vl": KV_MAYBE_MROPE,
        "hy_v3": KV,
        "hy_v4": Family("dsa", condition=has_indexer, k_only=True),
        "internlm2": KV,
        "jais": KV,
        "jais2": KV,
        "jamba": HYBRID,
        "jina-bert-v2": NO_MEMORY,
        "jina-bert-v3": NO_MEMORY,
        "kimi-k3": HYBRID_K_ONLY,
        "kimi-linear": HYBRID_K_ONLY,
        "laguna": ISWA_IF_WINDOW,
        "lfm2": Family("hybrid-iswa", "hybrid", condition=has_window),
        "lfm2moe": HYBRID,
        "llada": NO_MEMORY,
        "llada-moe": NO_MEMORY,
        "llama": KV,
        "llama-embed": KV,
        "llama4": Family(
            "iswa", condition=llama4_has_window, window=Window("chunked", LLAMA4_CHUNK)
        ),
        "maincoder": KV,
        "mamba": RECURRENT,
        "mamba2": RECURRENT,
        "maple": ISWA,
        "mellum": ISWA_IF_WINDOW,
        "mimo2": ISWA,
        "minicpm": KV,
        "minicpm3": KV,
        "minimax-01": HYBRID,
        "minimax-m2": KV,
        "minimax-m3": Family("msa"),
        "mistral3": KV,
        "mistral4": KV_MAYBE_MLA,
        "modern-bert": NO_MEMORY,
        "mpt": KV,
        "muse-glimmer": ISWA,
        "nanbeige": KV,
        "nemotron": KV,
        "nemotron_h": HYBRID,
        "nemotron_h_moe": HYBRID,
        "neo-bert": NO_MEMORY,
        "nomic-bert": NO_MEMORY,
        "nomic-bert-moe": NO_MEMORY,
        "olmo": KV,
        "olmo2": ISWA_IF_WINDOW,
        "olmoe": KV,
        "openelm": KV,
        "orion": KV,
        "paddleocr": KV_MROPE,
        "pangu-embedded": KV,
        "phi2": KV,
        "phi3": KV,
        "phimoe": KV,
        "plamo": KV,
        "plamo2": HYBRID,
        "plamo3": ISWA_IF_WINDOW,
        "plm": KV,
        "qwen": KV,
        "qwen2": KV,
        "qwen2moe": KV,
        "qwen2vl": KV_MROPE,
        "qwen3": KV,
        "qwen35": HYBRID_MROPE,
        "qwen35moe": HYBRID_MROPE,
        "qwen3moe": KV,
        "qwen3next": HYBRID,
        "qwen3tts": KV_MROPE,
        "qwen3vl": KV_MROPE,
        "qwen3vlmoe": KV_MROPE,
        "qwen4exp": Family("hybrid-idx", ext=True, ple=has_ngram_embeddings),
        "refact": KV,
        "rnd1": NO_MEMORY,
        "rwkv6": RECURRENT,
        "rwkv6qwen2": RECURRENT,
        "rwkv7": RECURRENT,
        "seed_oss": KV,
        "smallthinker": Family("iswa", condition=has_window, window=Window("standard", 4096)),
        "smollm3": KV,
        "spark2_5": ISWA,
        "stablelm": KV,
        "starcoder": KV,
        "starcoder2": KV,
        "step35": ISWA,
        "t5": KV,
        "t5encoder": KV,
        "wavtokenizer-dec": NO_MEMORY,
        "xverse": KV,
    }
)
"""``general.architecture`` -> how the layout of its states is chosen."""

GUESSES: tuple[Family, ...] = (
    Family("kv", k_only=UNKNOWN, ext=UNKNOWN),
    Family("iswa", condition=api_has_window, k_only=UNKNOWN, ext=UNKNOWN),
    Family("hybrid", k_only=UNKNOWN, ext=UNKNOWN),
    Family("recurrent"),
    Family("hybrid-iswa", "hybrid", condition=api_has_window, k_only=UNKNOWN, ext=UNKNOWN),
    Family("dsv4", ext=UNKNOWN),
    Family("msa", ext=UNKNOWN),
    Family("dsa", ext=UNKNOWN),
    Family("dsa-iswa", ext=UNKNOWN),
    Family("hybrid-idx", k_only=UNKNOWN, ext=UNKNOWN, ple=UNKNOWN),
    NO_MEMORY,
)
"""Every kind of memory, the most common first: what an unknown architecture is tried as."""


def every_kind(
    arch: str,
    *,
    rope_type: int | None = None,
    recurrent: bool | None = None,
    hybrid: bool | None = None,
    n_swa: int | None = None,
) -> tuple[Traits, ...]:
    """Return all layouts that states with caches can have, whatever the table says of *arch*.

    First those that the table would have if llama.cpp said nothing, then those that agree with what
    it says of the model; see :func:`model_traits`.
    """
    expected = [ARCHITECTURES[arch]] if is_known(arch) else []
    families = [family for family in GUESSES if family is not NO_MEMORY]
    told = ModelInfo(arch, None, rope_type, recurrent, hybrid, n_swa)
    mute = ModelInfo(arch, None, None, None, None, None)
    tried = ((expected, mute), (families, told), (families, mute))
    return tuple(dict.fromkeys(chain.from_iterable(starmap(_candidates, tried))))


@checked
def is_known(arch: str) -> bool:
    """Return whether the layouts of this architecture are known."""
    return arch in ARCHITECTURES


def is_of_table(traits: Traits) -> bool:
    """Return whether the table has this kind of memory for the architecture of *traits*."""
    family = ARCHITECTURES.get(traits.arch)
    return family is not None and traits.module in family.modules


@checked
def model_traits(
    arch: str = "",
    metadata: Metadata | None = None,
    *,
    rope_type: int | None = None,
    recurrent: bool | None = None,
    hybrid: bool | None = None,
    n_swa: int | None = None,
) -> tuple[Traits, ...]:
    """Return the layouts that the states of a model can have, the most likely first.

    They are hints: the right one is the one that reads a state to its last byte. There are
    several if the arguments do not decide everything, and for an unknown architecture; and a
    build of llama.cpp can have another memory than the table says.

    Args:
        arch: Its architecture; "" if not known.
        metadata: Returns the value of a GGUF key as text, None if the GGUF lacks the key (as
            ``llama_model_meta_val_str`` does). None: the metadata is not at hand.
        rope_type: ``llama_model_rope_type``, which overrules what is known of *arch*.
        recurrent: ``llama_model_is_recurrent``. If it contradicts what is known of *arch*, every
            kind of memory that agrees with it is possible too.
        hybrid: ``llama_model_is_hybrid``, likewise.
        n_swa: ``llama_model_n_swa`` (positions).
    """
    model = ModelInfo(arch, metadata, rope_type, recurrent, hybrid, n_swa)
    families = [ARCHITECTURES[arch]] if is_known(arch) else []
    if agreed := _candidates(families, model):
        return agreed
    # llama.cpp contradicts the table: a word of it has changed its meaning, or the memory of the
    # architecture is another one now. Which it is, only a state can tell.
    mute = replace(model, recurrent=None, hybrid=None)
    return tuple(dict.fromkeys((*_candidates(families, mute), *_candidates(GUESSES, model))))


def _candidates(families: Iterable[Family], model: ModelInfo) -> tuple[Traits, ...]:
    known = is_known(model.arch)
    return tuple(
        dict.fromkeys(
            traits for family in families for traits in family.candidates(model, known_arch=known)
        )
    )
