"""The tiny models: data in, the same GGUF bytes out on every machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import llama_state.testing.models as models
from llama_state.errors import UnsupportedError
from llama_state.testing import KINDS, write_benchmark_model, write_model, write_probe


def keys(path: Path) -> Mapping[str, Any]:
    """Return the keys of a GGUF file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> Mapping[str, np.ndarray[Any, Any]]:
    """Return the tensors of a GGUF file, in numpy's order of dimensions."""
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def test_there_is_a_kind_for_every_memory() -> None:
    """Every kind of memory but none has a model, and the names are sorted."""
    assert len(KINDS) == 13
    assert list(KINDS) == sorted(KINDS)
    assert "llama-dense" in KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_has_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """Kind and seed decide every byte; another seed changes them."""
    once = write_model(tmp_path / "once.gguf", kind, seed=7).read_bytes()
    again = write_model(tmp_path / "again.gguf", kind, seed=7).read_bytes()
    other = write_model(tmp_path / "other.gguf", kind, seed=8).read_bytes()
    assert once == again
    assert once != other
    assert len(once) == len(other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [False, True])
def test_a_model_has_the_tensors_of_its_spec(kind: str, text: bool, tmp_path: Path) -> None:
    """Shapes are those of the spec, reversed for numpy; the vocabulary follows the tokenizer."""
    spec = models._load(kind)
    written = tensors(write_model(tmp_path / "m.gguf", kind, text=text))
    assert list(written) == list(spec.tensors)
    for name, shape in spec.tensors.items():
        per_token = text and name in {"token_embd.weight", "output.weight", "output.bias"}
        expected = (*shape[:-1], 260) if per_token else shape
        assert written[name].shape == expected[::-1], name
        assert written[name].dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_small_and_safe(kind: str, tmp_path: Path) -> None:
    """Scales are 1, norms at least 1, decays negative, and the rest near 0 with deviation 0.05."""
    for name, values in tensors(write_model(tmp_path / "m.gguf", kind)).items():
        if name.endswith("scale"):
            assert (values == 1).all(), name
        elif name.endswith("ssm_a"):
            assert (values <= np.float32(-0.1)).all(), name
        elif name.endswith(("norm.weight", "rope_freqs.weight")):
            assert (values >= 1).all(), name
        elif values.size > 10_000:
            assert abs(values.mean()) < 0.002, name
            assert values.std() == pytest.approx(0.05, rel=0.02), name


def test_text_gives_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    """Three control tokens, one token for a byte, one for a space, and a chat template."""
    found = keys(write_model(tmp_path / "m.gguf", text=True))
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokens[-2:] == ["<0xFF>", "\u2581"]
    assert len(tokens) == len(found["tokenizer.ggml.scores"]) == found["llama.vocab_size"] == 260
    assert found["tokenizer.ggml.token_type"] == [2, 3, 3, *[6] * 256, 1]
    assert found["tokenizer.ggml.bos_token_id"] == 1
    assert "messages" in found["tokenizer.chat_template"]


def test_a_weight_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    """The same layer of a longer model has the same weights."""
    two = tensors(write_model(tmp_path / "two.gguf"))
    three = tensors(write_model(tmp_path / "three.gguf", overrides={"block_count": 3}))
    assert all(np.array_equal(three[name], values) for name, values in two.items())
    added = {name for name in three if name not in two}
    assert added == {name.replace("blk.1.", "blk.2.") for name in two if name.startswith("blk.1.")}
    assert not np.array_equal(three["blk.2.attn_q.weight"], two["blk.1.attn_q.weight"])


def test_layers_can_be_cut_off_and_lists_follow_them(tmp_path: Path) -> None:
    """A list with a number for every layer gets as long as there are layers."""
    fewer = write_model(tmp_path / "one.gguf", "jamba-dense", overrides={"block_count": 1})
    assert keys(fewer)["jamba.attention.head_count"] == [2]
    assert not any(name.startswith("blk.1.") for name in tensors(fewer))
    more = write_model(tmp_path / "eight.gguf", "gemma3-dense", overrides={"block_count": 8})
    assert keys(more)["gemma3.attention.sliding_window_pattern"] == [1, 1, 1, 1, 1, 0, 0, 0]
    sections = write_model(tmp_path / "vl.gguf", "qwen2vl-dense", overrides={"block_count": 4})
    assert keys(sections)["qwen2vl.rope.dimension_sections"] == [32, 32, 32, 32]


def test_keys_can_be_set(tmp_path: Path) -> None:
    """Keys go in with or without the architecture, known and new, each with its type."""
    values: dict[str, object] = {
        "attention.sliding_window": 16,
        "gemma3.context_length": 1024,
        "rope.freq_base": 5000.0,
        "general.name": "tiny",
        "vocab_size": 64,
        "sliding_window_pattern_is_new": [True, False],
    }
    path = write_model(tmp_path / "m.gguf", "gemma3-dense", overrides=values)
    found = keys(path)
    assert found["gemma3.attention.sliding_window"] == 16
    assert found["gemma3.context_length"] == 1024
    assert found["gemma3.rope.freq_base"] == 5000.0
    assert found["general.name"] == "tiny"
    assert found["gemma3.sliding_window_pattern_is_new"] == [True, False]
    assert tensors(path)["token_embd.weight"].shape == (64, 256)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    """The error names the kinds that there are, and no file appears."""
    with pytest.raises(ValueError, match="llama-dense"):
        write_model(tmp_path / "m.gguf", "llama")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gguf the error says what to install."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match=r"'.\[testing\]'"):
        write_model(tmp_path / "m.gguf")


def test_the_benchmark_model_has_128_kib_for_a_token(tmp_path: Path) -> None:
    """Keys and values of a token take 128 KiB as f16 with the defaults."""
    written = tensors(write_benchmark_model(tmp_path / "m.gguf"))
    caches = ("attn_k.weight", "attn_v.weight")
    rows = [values.shape[0] for name, values in written.items() if name.endswith(caches)]
    assert len(rows) == 64
    assert 2 * sum(rows) == 128 * 1024


def test_the_probe_in_the_package_is_what_write_probe_makes(tmp_path: Path) -> None:
    """The committed probe can be made again, byte for byte."""
    committed = files("llama_state") / "_llama" / "probe.gguf"
    assert write_probe(tmp_path / "probe.gguf").read_bytes() == committed.read_bytes()
    assert len(committed.read_bytes()) < 8 * 1024
