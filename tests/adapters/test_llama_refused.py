"""What ``attach(Llama)`` refuses, and states that go to and come from llama-cpp-python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from tests.adapters.llamas import KINDS, MORE, generated, is_true, llama_cpp, prompt_of

pytestmark = pytest.mark.llama_cpp

Make = Callable[..., Any]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


# -- never guessed


def test_tokens_are_never_guessed(make: Make, tmp_path: Path) -> None:
    """Without its tokens, or with another number of them, nothing is restored or touched."""
    llm = make()
    ctx = ls.attach(llm)
    prompt = prompt_of(llm)
    llm.eval(prompt)
    blob, sequence = ctx.snapshot(), ctx.seq_snapshot()
    ctx.save_state(tmp_path / "bare", ())
    ctx.seq_save_state(tmp_path / "short", tokens=prompt[:-1])
    llm.reset()
    llm.eval([80, 81])
    refused: tuple[Callable[[], object], ...] = (
        lambda: ctx.restore(blob),
        lambda: ctx.restore(blob, tokens=prompt[:-1]),
        lambda: ctx.restore(blob, tokens=[*prompt, 65]),
        lambda: ctx.restore(blob, tokens=prompt[:-1], validate=False),
        lambda: ctx.restore(blob, validate=False),
        lambda: ctx.seq_restore(sequence),
        lambda: ctx.load_state(tmp_path / "bare"),
        lambda: ctx.seq_load_state(tmp_path / "short"),
        lambda: ctx.seq_load_state(tmp_path / "short", tokens=prompt[1:-1]),
    )
    for call in refused:
        with pytest.raises(ls.MismatchError, match="tokens of sequence 0"):
            call()
        assert ctx.tokens == (80, 81)
        assert ctx.n_past() == 2
    with pytest.raises(ls.DecodeError):
        ctx.restore(blob, tokens=[*prompt[:-1], 100_000])
    with pytest.raises(ls.FormatError):
        ctx.restore(blob[:-1], tokens=prompt)
    assert ctx.tokens == (80, 81)
    ctx.seq_load_state(tmp_path / "short", tokens=prompt)
    is_true(llm, ctx, prompt)


def test_a_refusal_before_anything_is_touched_costs_no_decode(make: Make) -> None:
    """The logits of the Llama are still there, and it knows."""
    llm = make()
    ctx = ls.attach(llm)
    llm.eval([65, 66])
    blob = ctx.snapshot()
    with pytest.raises(ls.MismatchError):
        ctx.restore(blob)
    ctx.seq_rm(0, 2)  # nothing is there
    assert not llm._requires_eval


def test_a_llama_that_has_less_room(make: Make) -> None:
    """llama.cpp rounds n_ctx up, a Llama's list does not: more is refused before it overflows."""
    llm, small = make(n_ctx=256), make(n_ctx=60)
    assert ls.attach(small).n_ctx > 60
    llm.eval(list(range(60, 130)))
    source = ls.attach(llm)
    ctx = ls.attach(small)
    with pytest.raises(ls.CapacityError, match="tokens of a Llama"):
        ctx.restore(source.snapshot(), tokens=source.tokens)
    with pytest.raises(ls.CapacityError, match="tokens of a Llama"):
        ctx.decode(range(61))
    is_true(small, ctx, [])


def test_a_cache_that_somebody_else_changed(make: Make) -> None:
    """Where Llama and cache do not agree the tokens are an error, not a guess."""
    llm = make()
    ctx = ls.attach(llm)
    llm.eval([65, 66, 67])
    assert llm._ctx.kv_cache_seq_rm(0, 1, -1)
    with pytest.raises(ls.StateError, match="counts 3 tokens and the cache holds 1"):
        _ = ctx.tokens
    with pytest.raises(ls.StateError, match="counts 3"):
        ctx.save_state("never written")


def test_a_state_that_begins_later_is_refused(make: Make) -> None:
    """A Llama would take the missing beginning for evaluated."""
    llm = make()
    ctx = ls.attach(llm)
    llm.eval(list(range(60, 70)))
    raw = ls.attach(ctx.pointer, ctx.library)
    raw.seq_rm(0, 0, 4)
    blob = raw.snapshot()
    ctx.clear()
    with pytest.raises(ls.MismatchError, match="first position"):
        ctx.restore(blob, tokens=list(range(60, 70)))


# -- states of either library


@EVERY_KIND
def test_llama_states_go_both_ways(make: Make, kind: str) -> None:
    """LlamaState.llama_state is a snapshot, and a snapshot makes a LlamaState."""
    llm, other = make(kind), make(kind)
    prompt = prompt_of(llm)
    llm.eval(prompt)
    ctx, there = ls.attach(llm), ls.attach(other)
    theirs, ours = llm.save_state(), ctx.snapshot()
    assert theirs.llama_state == ours
    expected = generated(llm, [*prompt, *MORE])
    there.restore(theirs.llama_state, tokens=theirs.input_ids[: theirs.n_tokens])
    assert generated(other, [*prompt, *MORE]) == expected
    there.clear()
    theirs.seed = 1234
    there.restore_llama_state(theirs)
    assert other._seed == 1234
    assert generated(other, [*prompt, *MORE]) == expected
    there.clear()
    state = ctx.to_llama_state(ours, prompt)
    assert isinstance(state, llama_cpp.LlamaState)
    other.load_state(state)
    is_true(other, there, prompt)
    assert generated(other, [*prompt, *MORE]) == expected
    with pytest.raises(ls.CapacityError):
        ctx.to_llama_state(ours, range(1000))
