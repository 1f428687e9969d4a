"""Models with an encoder: BERT, whose contexts have no memory, and T5, which encodes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

import llama_state as ls
from tests.context.c_files import Native
from tests.layout import ggufs

pytestmark = pytest.mark.libllama

WIDTH, VOCABULARY = 64, 32
COMMON = {
    "vocab_size": ggufs.u32(VOCABULARY),
    "context_length": ggufs.u32(64),
    "embedding_length": ggufs.u32(WIDTH),
    "block_count": ggufs.u32(1),
    "feed_forward_length": ggufs.u32(WIDTH),
    "attention.head_count": ggufs.u32(2),
}
FLOAT = 6
Shapes = Mapping[str, tuple[int, ...]]


def bert(path: Path) -> Path:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (WIDTH, VOCABULARY),
        "token_types.weight": (WIDTH, 2),
        "position_embd.weight": (WIDTH, 64),
    }
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}.weight"], shapes[f"blk.0.{name}.bias"] = (WIDTH, WIDTH), (WIDTH,)
    for name in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (WIDTH,)
    keys = {
        "bert.attention.layer_norm_epsilon": ggufs.Typed(FLOAT, 1e-12),
        "tokenizer.ggml.token_type_count": ggufs.u32(2),
    }
    return _write(path, "bert", keys, shapes)


def t5(path: Path) -> Path:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (WIDTH, VOCABULARY)}
    for half in ("enc", "dec"):
        for name in ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_up", "ffn_down"):
            shapes[f"{half}.blk.0.{name}.weight"] = (WIDTH, WIDTH)
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            shapes[f"{half}.{name}.weight"] = (WIDTH,)
        shapes[f"{half}.blk.0.attn_rel_b.weight"] = (2, 32)
    for name in "qkvo":
        shapes[f"dec.blk.0.cross_attn_{name}.weight"] = (WIDTH, WIDTH)
    shapes["dec.blk.0.cross_attn_norm.weight"] = (WIDTH,)
    keys = {
        "t5.attention.layer_norm_rms_epsilon": ggufs.Typed(FLOAT, 1e-6),
        "t5.attention.relative_buckets_count": ggufs.u32(32),
        "t5.decoder_start_token_id": ggufs.u32(0),
    }
    return _write(path, "t5", keys, shapes)


def _write(path: Path, arch: str, keys: Mapping[str, ggufs.Typed], shapes: Shapes) -> Path:
    common = {f"{arch}.{name}": value for name, value in COMMON.items()}
    names = {
        "general.architecture": ggufs.string(arch),
        "tokenizer.ggml.model": ggufs.string("no_vocab"),
    }
    draws = np.random.default_rng(1)
    tensors = {
        name: (shape, ggufs.F32, draws.standard_normal(shape, np.float32).tobytes())
        for name, shape in shapes.items()
    }
    return ggufs.write(path, {**names, **common, **keys}, tensors)


@pytest.fixture
def context(
    request: pytest.FixtureRequest, library: ls.Library, tmp_path: Path
) -> Iterator[ls.Context]:
    """A context of the model that the function of the parameter writes."""
    write: Callable[[Path], Path] = request.param
    with ls.Model(write(tmp_path / "model.gguf"), library) as model, model.context(n_ctx=64) as ctx:
        yield ctx


@pytest.mark.parametrize("context", [bert], indirect=True)
def test_a_sequence_file_without_memory(context: ls.Context, tmp_path: Path) -> None:
    """llama.cpp refuses the file that it has written itself; here it gives its tokens back."""
    native = Native(context.library)
    path = tmp_path / "sequence"
    written = native.seq_save(context, path, 0, (1, 2, 3))
    assert written == path.stat().st_size
    refused, _ = native.seq_load(context, path, 0)
    assert not refused
    assert context.seq_load_state(path).tokens == (1, 2, 3)
    context.seq_save_state(path, 0, [4, 5])
    assert context.seq_load_state(path).tokens == (4, 5)


@pytest.mark.parametrize("context", [bert], indirect=True)
def test_blobs_without_memory(context: ls.Context) -> None:
    """They are sound blobs that hold no sequence."""
    assert context.restore(context.snapshot()).sequences == {}
    assert context.seq_restore(context.seq_snapshot()).sequences == {}
    assert context.n_past() == 0


@pytest.mark.parametrize("context", [t5], indirect=True)
def test_decoding_before_encoding(context: ls.Context) -> None:
    """An error that says who encodes, where llama.cpp ends the process; the context goes on."""
    with pytest.raises(ls.UnsupportedError, match="t5 models encode first"):
        context.decode([1, 2])
    assert context.restore(context.snapshot()).sequences == {}
