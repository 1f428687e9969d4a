"""Write tiny GGUF models with random weights: one for every kind of memory in llama.cpp.

The files in ``specs`` describe a model of each kind: typed GGUF keys and a table of tensor shapes.
A weight depends only on the kind, the seed and the name of its tensor, and is computed from
integers, so that a model has the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._install import pip_install
from .._io import StrPath
from .._io.arguments import checked
from ..errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["KINDS", "write_benchmark_model", "write_model", "write_probe"]

_SPECS = files(__package__) / "specs"

KINDS: tuple[str, ...] = tuple(sorted(spec.name.removesuffix(".json") for spec in _SPECS.iterdir()))
"""The kinds of tiny model that can be written."""

_LAYER = re.compile(r"blk\.(\d+)\.")
_PER_TOKEN = ("token_embd.weight", "output.weight", "output.bias")
_DEVIATION = 0.05
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class _Spec:
    """A model without its weights; tensor shapes are in GGUF's order, the reverse of numpy's."""

    name: str
    kv: Mapping[str, tuple[str, Any]]
    tensors: Mapping[str, tuple[int, ...]]

    def full_key(self, key: str) -> str:
        """Return *key* with the architecture before it, if it needs one and has none."""
        arch = self.kv["general.architecture"][1]
        return key if key.startswith((f"{arch}.", "general.", "tokenizer.")) else f"{arch}.{key}"

    def number(self, key: str) -> int:
        """Return the value of *key*, an integer."""
        return int(self.kv[self.full_key(key)][1])


@checked
def write_model(
    path: StrPath,
    kind: str = "llama-dense",
    *,
    seed: int = 0,
    text: bool = False,
    overrides: Mapping[str, object] | None = None,
) -> Path:
    """Write a tiny model.

    Args:
        path: The file to write.
        kind: One of ``KINDS``.
        seed: Seed of the weights.
        text: Give the model a tokenizer of bytes (260 tokens) and a chat template.
        overrides: GGUF keys to set, with or without the architecture before them, such as
            ``{"attention.sliding_window": 16}``. The tensors are adapted to "block_count", by
            repeating the last layer, and to "vocab_size". Other keys must fit the tensors.

    Returns:
        *path*.

    Raises:
        ValueError: There is no such *kind*.
        UnsupportedError: The packages of the extra "testing" are not installed.
    """
    values = {**(_text_keys() if text else {}), **(overrides or {})}
    return _write(path, _with_keys(_load(kind), values), seed)


@checked
def write_benchmark_model(
    path: StrPath,
    *,
    n_layer: int = 32,
    n_head_kv: int = 8,
    head_dim: int = 128,
    n_embd: int = 64,
    n_ctx: int = 8192,
    seed: int = 0,
    text: bool = False,
) -> Path:
    """Write a llama model with a large state for each token and little to compute.

    Args:
        path: The file to write.
        n_layer: Layers.
        n_head_kv: Heads of keys and values in a layer; as many attend.
        head_dim: Values in a head. With the defaults, a token has 128 KiB of f16 state.
        n_embd: Width of the model outside its attention.
        n_ctx: The context length that the model was trained with, as its keys say.
        seed: Seed of the weights.
        text: Give the model a tokenizer of bytes (260 tokens) and a chat template.

    Returns:
        *path*.

    Raises:
        ValueError: A number is out of range.
    """
    if not 0 < n_ctx < 2**31:
        raise ValueError(f"n_ctx must be 1 to {2**31 - 1}, not {n_ctx}")
    spec = _llama(
        "benchmark", n_layer, n_head_kv, head_dim, n_embd=n_embd, n_vocab=128, n_ctx=n_ctx
    )
    return _write(path, _with_keys(spec, _text_keys()) if text else spec, seed)


@checked
def write_probe(path: StrPath) -> Path:
    """Write the smallest llama model that loads; the package carries it as ``probe.gguf``."""
    return _write(path, _llama("probe", 1, 1, 32, n_embd=8, n_vocab=2, n_ctx=32), 0)


def _load(kind: str) -> _Spec:
    if kind not in KINDS:
        raise ValueError(f"no model of kind {kind!r}; the kinds are {', '.join(KINDS)}")
    data = json.loads((_SPECS / f"{kind}.json").read_text(encoding="utf-8"))
    kv = {key: (kind_of, value) for key, (kind_of, value) in data["kv"].items()}
    return _Spec(kind, kv, {name: tuple(shape) for name, shape in data["tensors"].items()})


def _llama(
    name: str, n_layer: int, n_head: int, head_dim: int, *, n_embd: int, n_vocab: int, n_ctx: int
) -> _Spec:
    """Return a llama model of the given size, with a feed-forward part as wide as the rest."""
    n_attn = n_head * head_dim
    keys = {
        "vocab_size": n_vocab,
        "context_length": n_ctx,
        "embedding_length": n_embd,
        "block_count": n_layer,
        "feed_forward_length": n_embd,
        "attention.head_count": n_head,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": head_dim,
        "tokenizer.ggml.model": "no_vocab",
    }
    shapes = {
        "attn_norm": (n_embd,),
        "attn_q": (n_embd, n_attn),
        "attn_k": (n_embd, n_attn),
        "attn_v": (n_embd, n_attn),
        "attn_output": (n_attn, n_embd),
        "ffn_norm": (n_embd,),
        "ffn_gate": (n_embd, n_embd),
        "ffn_down": (n_embd, n_embd),
        "ffn_up": (n_embd, n_embd),
    }
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_embd, n_vocab),
        "output_norm.weight": (n_embd,),
        "output.weight": (n_embd, n_vocab),
    }
    for layer in range(n_layer):
        tensors |= {f"blk.{layer}.{part}.weight": shape for part, shape in shapes.items()}
    bare = _Spec(name, {"general.architecture": ("STRING", "llama")}, tensors)
    return _Spec(name, {**bare.kv, **_typed(bare, keys)}, tensors)


def _text_keys() -> dict[str, object]:
    """Return the keys of a tokenizer: three control tokens, one for each byte, one for space.

    This kind of tokenizer turns a space into U+2581, which needs a token to be turned back.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    return {
        "vocab_size": len(tokens),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": _CHAT_TEMPLATE,
    }


def _with_keys(spec: _Spec, values: Mapping[str, object]) -> _Spec:
    """Return *spec* with other keys, its tensors adapted to their layers and vocabulary."""
    changed = _Spec(spec.name, {**spec.kv, **_typed(spec, values)}, {})
    before = spec.number("block_count")
    sources = [min(layer, before - 1) for layer in range(changed.number("block_count"))]
    kv = {
        key: (kind, [value[source] for source in sources])
        if kind.startswith("ARRAY") and len(value) == before and spec.kv.get(key) == (kind, value)
        else (kind, value)
        for key, (kind, value) in changed.kv.items()
    }
    tensors: dict[str, tuple[int, ...]] = {}
    for name, shape in spec.tensors.items():
        if name in _PER_TOKEN:
            tensors[name] = (*shape[:-1], changed.number("vocab_size"))
        elif match := _LAYER.match(name):
            of_layer = f"blk.{{}}.{name[match.end() :]}"
            here = (layer for layer, source in enumerate(sources) if source == int(match[1]))
            tensors |= {of_layer.format(layer): shape for layer in here}
        else:
            tensors[name] = shape
    return _Spec(spec.name, kv, tensors)


def _typed(spec: _Spec, values: Mapping[str, object]) -> dict[str, tuple[str, object]]:
    """Return *values* by full key, with the GGUF type that *spec* has or else the value's own."""
    typed = {}
    for key, value in values.items():
        name = spec.full_key(key)
        known = spec.kv.get(name, ("", None))[0]
        same_form = known.startswith("ARRAY") == isinstance(value, (list, tuple))
        typed[name] = (known if known and same_form else _type_name(value), value)
    return typed


def _type_name(value: object) -> str:
    """Return the GGUF type for a Python value."""
    if isinstance(value, (list, tuple)):
        return "ARRAY[INT32]" if type(value[0]) is int else f"ARRAY[{_type_name(value[0])}]"
    names = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    return names[type(value)]


def _write(path: StrPath, spec: _Spec, seed: int) -> Path:
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError(
            f"writing a model needs {error.name}: {pip_install('testing')}"
        ) from error
    target = Path(path)
    keys = dict(spec.kv)
    writer = gguf.GGUFWriter(target, keys.pop("general.architecture")[1])
    for key, (type_name, value) in keys.items():
        outer, _, inner = type_name.rstrip("]").partition("[")
        sub_type = gguf.GGUFValueType[inner] if inner else None
        writer.add_key_value(key, value, gguf.GGUFValueType[outer], sub_type=sub_type)
    for name, shape in spec.tensors.items():
        writer.add_tensor(name, _weights(name, shape, f"{spec.name} {seed} {name}"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _weights(name: str, shape: tuple[int, ...], key: str) -> npt.NDArray[np.float32]:
    """Return the weights of a tensor: nearly normal, but positive or negative if they must be."""
    import numpy as np

    if name.endswith("scale"):
        return np.ones(shape[::-1], np.float32)
    values = _random(math.prod(shape), key)
    if name.endswith("ssm_a"):
        values = -np.abs(values) - np.float32(0.1)
    elif name.endswith(("norm.weight", "rope_freqs.weight")):
        values = np.abs(values) + np.float32(1)
    return values.reshape(shape[::-1])


def _random(count: int, key: str) -> npt.NDArray[np.float32]:
    """Return *count* numbers around zero: each is the sum of four 16-bit words of *key*'s hash."""
    import numpy as np

    stream = hashlib.shake_128(key.encode()).digest(8 * count)
    draws: npt.NDArray[np.int64] = np.frombuffer(stream, "<u2").reshape(-1, 4).sum(1, np.int64)
    deviation = 65536 / math.sqrt(3)
    return ((draws - 2 * 65535) * (_DEVIATION / deviation)).astype(np.float32)
