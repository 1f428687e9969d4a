"""Checkpoints of a ``Llama``: its tokens travel along, and it goes on as if nothing happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from tests.adapters.llamas import KINDS, MORE, generated, is_true, prompt_of

pytestmark = pytest.mark.llama_cpp

Make = Callable[..., Any]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq_id", [None, 0])
def test_a_llama_goes_on(make: Make, kind: str, seq_id: int | None, tmp_path: Path) -> None:
    """Saved, loaded into another Llama, answered: token for token, nothing evaluated twice."""
    one, two = make(kind), make(kind)
    ctx = ls.attach(one)
    prompt = prompt_of(one)
    one.eval(prompt)
    checkpoint = ctx.checkpoint(seq_id, meta={"name": kind})
    assert checkpoint.tokens == tuple(prompt)
    checkpoint.save(tmp_path / "a.llst")
    expected = generated(one, prompt + MORE)
    other = ls.attach(two)
    two.eval([65, 66, 67])
    restored = other.resume(ls.Checkpoint.load(tmp_path / "a.llst"))
    assert restored.tokens == tuple(prompt)
    is_true(two, other, prompt)
    ids, evaluated = generated(two, prompt + MORE)
    assert (ids, evaluated) == (expected[0], len(MORE))


def test_other_settings_of_a_llama_are_named(make: Make) -> None:
    """Rope settings are those of its parameters; the Llama is left as it was."""
    one, two = make(), make(rope_freq_base=5000.0)
    prompt = prompt_of(one)
    one.eval(prompt)
    two.eval([65, 66])
    with pytest.raises(ls.MismatchError) as caught:
        ls.attach(two).resume(ls.attach(one).checkpoint())
    assert [difference.name for difference in caught.value.differences] == ["rope"]
    assert two.input_ids[: two.n_tokens].tolist() == [65, 66]


def test_tokens_that_are_missing(make: Make) -> None:
    """A checkpoint without the tokens of sequence 0 cannot go into a Llama."""
    llm = make()
    ctx = ls.attach(llm)
    prompt = prompt_of(llm)
    llm.eval(prompt)
    bare = ctx.checkpoint(0, tokens=[])
    before = ctx.snapshot()
    with pytest.raises(ls.MismatchError, match="tokens of sequence 0"):
        ctx.resume(bare)
    assert ctx.snapshot() == before
    is_true_before = llm.input_ids[: llm.n_tokens].tolist()
    assert is_true_before == prompt


def test_logits_of_a_decode_of_ours(make: Make) -> None:
    """Those of the last token that was decoded through the attachment can be kept."""
    ctx = ls.attach(make())
    ctx.decode([65, 66, 67])
    row = bytes(ctx.logits())
    checkpoint = ctx.checkpoint(0, logits=True)
    ctx.clear()
    ctx.resume(checkpoint)
    assert bytes(ctx.logits()) == row
    assert list(ctx.tokens) == [65, 66, 67]
