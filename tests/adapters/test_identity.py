"""The fingerprint of a ``Llama``: its file, its rope settings, its LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from tests.adapters.llamas import KINDS, models
from tests.layout.ggufs import adapter

pytestmark = pytest.mark.llama_cpp

Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with models(tmp_path) as made:
        yield made


def fingerprint(llm: Any) -> ls.Fingerprint:
    return ls.attach(llm).fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_known_of_a_llama(kind: str, make: Make) -> None:
    """And it is what is known of a context of ours of the same file, on another build even."""
    known = fingerprint(make(kind))
    assert known.unknown == {}
    with ls.Model(make.path(kind)) as model, model.context(512, flash_attn=False) as ctx:
        assert known.model == ctx.fingerprint.model
        assert known.context["rope"] == ctx.fingerprint.context["rope"] == "the model's own"
        assert known.context["adapters"] == ctx.fingerprint.context["adapters"] == "none"


def test_an_adapter(make: Make, tmp_path: Path) -> None:
    """By its content and scale; and it does change what a state holds."""
    plain = make()
    lora = str(adapter(tmp_path / "lora.gguf"))
    changed, weaker = (make(lora_path=lora, lora_scale=scale) for scale in (1.0, 0.5))
    for llm in (plain, changed):
        llm.eval([1, 2, 3])
    assert ls.attach(plain).seq_snapshot() != ls.attach(changed).seq_snapshot()
    for one, two in ((plain, changed), (changed, weaker)):
        assert [d.name for d in fingerprint(one).differences(fingerprint(two))] == ["adapters"]


def test_rope_settings(make: Make) -> None:
    """Arguments of the ``Llama`` that are not its defaults."""
    plain, changed = make(), make(rope_freq_base=5e4, yarn_beta_fast=16.0)
    [difference] = fingerprint(plain).differences(fingerprint(changed))
    assert difference == (
        "rope",
        "the model's own",
        "rope_freq_base 50000.000000, yarn_beta_fast 16.000000",
    )


def test_overridden_hyperparameters(make: Make) -> None:
    """What the ``Llama`` was told instead of what the file says."""
    plain = make()
    changed = make(kv_overrides={"llama.rope.freq_base": 5e4, "tokenizer.ggml.add_bos_token": True})
    for llm in (plain, changed):
        llm.eval([1, 2, 3])
    assert ls.attach(plain).seq_snapshot() != ls.attach(changed).seq_snapshot()
    assert fingerprint(plain).differences(fingerprint(changed)) == [
        ("llama.rope.freq_base", "not recorded", "50000.000000")
    ]


def test_the_path_of_a_llama_is_its_own_to_say(make: Make) -> None:
    with pytest.raises(ls.StateError, match="model_path"):
        ls.attach(make(), model_path="other.gguf")
