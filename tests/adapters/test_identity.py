"""The fingerprint of a ``Llama``: its file, its rope settings, its LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from tests.adapters.llamas import KINDS, load_adapter, models, set_adapters, swap
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


def test_an_adapter_that_is_swapped_after_attach(make: Make, tmp_path: Path) -> None:
    """What the Llama says is read at each call: a checkpoint of before is refused."""
    one, two = adapter(tmp_path / "1.gguf"), adapter(tmp_path / "2.gguf", seed=1)
    llm = make()
    ctx = ls.attach(llm)
    prints = {"plain": ctx.fingerprint}
    llm.eval([1, 2, 3])
    checkpoint = ctx.checkpoint(0)
    for name, path, scale in (("one", one, 1.0), ("half", one, 0.5), ("two", two, 1.0)):
        swap(llm, path, scale)
        prints[name] = ctx.fingerprint
        fresh = fingerprint(make(lora_path=str(path), lora_scale=scale))
        # The path of one and the place of another: only its maker can say what that is.
        known = name != "half"
        assert ("adapters" in prints[name].unknown) != known
        assert fresh.context["adapters"] == prints[name].context.get("adapters") or not known
        with pytest.raises(ls.MismatchError, match="adapters"):
            ctx.resume(checkpoint)
    llm.lora_scale = 0.25
    assert ctx.fingerprint.context["adapters"].endswith(" x 0.25")
    swap(llm, None)
    assert ctx.fingerprint.differences(prints["plain"]) == []
    ctx.resume(checkpoint)


def test_an_adapter_that_only_llama_cpp_knows(make: Make, tmp_path: Path) -> None:
    """It cannot be read, so it is declared; and a swap that can be read takes that back."""
    one, two = adapter(tmp_path / "1.gguf"), adapter(tmp_path / "2.gguf", seed=1)
    llm = make()
    ctx = ls.attach(llm)
    llm.eval([1, 2, 3])
    plain = ctx.checkpoint(0)
    loaded = load_adapter(llm, one)
    set_adapters(llm, (loaded, 1.0))
    ctx.declare(adapters=[(one, 1.0)])
    with pytest.raises(ls.MismatchError, match="adapters"):
        ctx.resume(plain)
    swap(llm, two)
    assert "declare them again" in ctx.fingerprint.unknown["adapters"]
    with pytest.warns(ls.IdentityWarning, match="declare them again"):
        ctx.checkpoint(0)
    ctx.declare(adapters=[(two, 1.0)])
    assert ctx.fingerprint.differences(fingerprint(make(lora_path=str(two)))) == []
    llm.lora_path = None  # an adapter without a name
    assert "without a lora_path" in fingerprint(llm).unknown["adapters"]


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
