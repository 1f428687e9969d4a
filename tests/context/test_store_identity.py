"""Which prompts a store finds: those of the same model and settings, and it says what is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.store import PrefixStore, Why
from llama_state.testing.models import write_model

pytestmark = pytest.mark.libllama

PROMPT = list(range(5, 75))


@pytest.fixture
def store(tmp_path: Path, library: ls.Library) -> Iterator[PrefixStore]:
    """A store that has the prompt, of a tiny model with a tokenizer."""
    write_model(tmp_path / "model.gguf", text=True)
    store = PrefixStore(tmp_path / "kv", capacity_bytes=1 << 28, chunk_tokens=16)
    with store, ls.Model(tmp_path / "model.gguf", library) as model, model.context() as ctx:
        store.prefill(ctx, PROMPT)
        yield store


def why(store: PrefixStore, model: Path, library: ls.Library, **options: object) -> Why:
    """Why a context of a model finds nothing in the store, or how much."""
    with ls.Model(model, library) as made, made.context(**options) as ctx:  # type: ignore[arg-type]
        recalled = store.prefill(ctx, PROMPT)
        assert store.find(ctx, PROMPT).n_tokens > 0  # it was remembered, beside the other
        return recalled.why


def names(found: Why) -> list[str]:
    """The fields that differ."""
    assert found.reason == "another"
    return [each.name for each in found.differences]


def test_another_model(store: PrefixStore, tmp_path: Path, library: ls.Library) -> None:
    """Other weights: nothing is found, and the field is named."""
    other = write_model(tmp_path / "other.gguf", text=True, seed=1)
    assert names(why(store, other, library)) == ["weights"]


def test_another_rope_base(store: PrefixStore, tmp_path: Path, library: ls.Library) -> None:
    """The same weights with another base of the rotary positions."""
    key = {"llama.rope.freq_base": 5000.0}
    other = write_model(tmp_path / "other.gguf", text=True, overrides=key)
    assert names(why(store, other, library)) == ["llama.rope.freq_base"]


def test_another_cache_type(store: PrefixStore, tmp_path: Path, library: ls.Library) -> None:
    """Another type of the cache."""
    found = why(store, tmp_path / "model.gguf", library, type_k="f32", type_v="f32")
    assert names(found) == ["rows of kv"]
    assert "f16" in str(found)
    assert "f32" in str(found)


def test_another_namespace(store: PrefixStore, tmp_path: Path, library: ls.Library) -> None:
    """Another namespace in the same folder; the first one's prompts are still there."""
    place = {"capacity_bytes": 1 << 28, "chunk_tokens": 16}
    with PrefixStore(tmp_path / "kv", namespace="another", **place) as other:  # type: ignore[arg-type]
        assert names(why(other, tmp_path / "model.gguf", library)) == ["namespace"]
    with (
        ls.Model(tmp_path / "model.gguf", library) as model,
        model.context(n_ctx=512, n_seq_max=2, kv_unified=True, flash_attn=False) as ctx,
    ):
        # Streams and flash attention are form.
        assert store.recall(ctx, PROMPT, 1).n_past == len(PROMPT) - 1


def test_unknown_is_refused(store: PrefixStore, llama: ls.Model) -> None:
    """A context of which it is not known what it computes with: the error says what to declare."""
    with llama.context() as owner:
        borrowed = ls.attach(owner.pointer, library=owner.library)
        with pytest.raises(ls.UnsupportedError, match=r"declare|model_path"):
            store.recall(borrowed, PROMPT)


@pytest.mark.parametrize("key", [None, bytes(16)], ids=["no key", "key"])
def test_exchanged_objects(key: bytes | None, llama: ls.Model, tmp_path: Path) -> None:
    """An object under the name of another, with or without a key, is never used, and set aside."""
    prompts = [list(range(first, first + 20)) for first in (10, 50)]
    with llama.context(n_ctx=256) as ctx:
        for _ in range(2):
            with PrefixStore(tmp_path, capacity_bytes=1 << 28, chunk_tokens=32, key=key) as store:
                for prompt in prompts:
                    ctx.clear()
                    assert store.recall(ctx, prompt).n_past == 0
                    store.prefill(ctx, prompt)
                assert store.find(ctx, prompts[0]).n_tokens == 19
            one, other = tmp_path.glob("??/*.R")
            contents = one.read_bytes(), other.read_bytes()
            for path, content in zip((other, one), contents, strict=True):
                path.unlink()
                path.write_bytes(content)
