"""What the strategies promise: every example is valid, or, where it is damage, different."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from llama_state.testing import strategies
from llama_state.testing.strategies import Clear, Decode, SeqCp, SeqRm, Step, replay

# Any example will do, so there is no time to spend on a smaller one; and always the same.
FIRST = settings(phases=[Phase.generate], database=None, derandomize=True, max_examples=500)
BLOBS = st.binary(min_size=1, max_size=200)
N_SEQS, MAX_LENGTH, MAX_RUN, N_VOCAB = 3, 20, 6, 50
HISTORIES: dict[str, Any] = {
    "n_vocab": N_VOCAB,
    "n_seqs": N_SEQS,
    "max_run": MAX_RUN,
    "max_length": MAX_LENGTH,
}


@given(st.data(), st.integers(1, 300), st.integers(1, 20))
def test_token_runs_stay_in_the_vocabulary(data: st.DataObject, n_vocab: int, size: int) -> None:
    """A run has one token to *size*, each a token of the vocabulary."""
    run = data.draw(strategies.token_runs(n_vocab, size))
    assert isinstance(run, tuple)
    assert 1 <= len(run) <= size
    assert all(0 <= token < n_vocab for token in run)


@given(strategies.context_options(max_seqs=3, n_ctx=[256]))
def test_context_options_are_such_as_llama_cpp_takes(options: dict[str, Any]) -> None:
    """Caches are quantized only with flash attention, and never of two types."""
    assert set(options) == {
        "n_ctx",
        "n_seq_max",
        "kv_unified",
        "flash_attn",
        "type_k",
        "type_v",
    }
    assert options["n_ctx"] == 256
    assert 1 <= options["n_seq_max"] <= 3
    assert options["type_k"] == options["type_v"]
    assert options["type_v"] != "q8_0" or options["flash_attn"] is True


@given(strategies.histories(**HISTORIES))
def test_histories_are_possible(history: list[Step]) -> None:
    """Each step can be taken after those before it, and no position reaches the limit."""
    for n, step in enumerate(history):
        before, after = replay(history[:n]), replay(history[: n + 1])
        match step:
            case Decode(seq_id, tokens):
                assert 0 <= seq_id < N_SEQS
                assert 1 <= len(tokens) <= MAX_RUN
                assert all(0 <= token < N_VOCAB for token in tokens)
                assert max(after[seq_id]) < MAX_LENGTH
            case SeqRm(seq_id, start, end):
                assert seq_id in before
                assert start >= 0
                assert end is None or start <= end
            case SeqCp(src, dst):
                assert src in before
                assert dst not in before
                assert after[src] == after[dst] == before[src]
            case Clear():
                assert after == {}


@given(strategies.histories(cuts=False, **HISTORIES))
def test_histories_without_cuts_remove_whole_sequences(history: list[Step]) -> None:
    """Without cuts a sequence has every position from 0, as recurrent memory needs it."""
    assert all(step == SeqRm(step.seq_id) for step in history if isinstance(step, SeqRm))
    for held in replay(history).values():
        assert list(held) == list(range(len(held)))


def test_replay_keeps_tokens_by_position() -> None:
    """A decode goes on behind the last position, whatever was cut before it."""
    history: list[Step] = [
        Decode(0, (5, 6, 7, 8)),
        SeqCp(0, 2),
        SeqRm(0, 1, 2),
        Decode(0, (9,)),
        Decode(1, (4,)),
        SeqRm(1),
        SeqRm(2, 3),
    ]
    assert replay(history) == {0: {0: 5, 2: 7, 3: 8, 4: 9}, 2: {0: 5, 1: 6, 2: 7}}
    assert replay([*history, Clear()]) == {}


@pytest.mark.parametrize("kind", [Decode, SeqRm, SeqCp, Clear])
def test_histories_have_every_kind_of_step(kind: type) -> None:
    """Every kind of step is drawn."""
    find(
        strategies.histories(**HISTORIES),
        lambda history: any(isinstance(step, kind) for step in history),
        settings=FIRST,
    )


@given(st.data(), BLOBS)
def test_damage_is_never_the_blob_itself(data: st.DataObject, blob: bytes) -> None:
    """Whatever kind of damage is drawn, the bytes differ."""
    assert data.draw(strategies.damaged(blob)) != blob


@given(st.data(), BLOBS)
def test_flips_keep_the_length_and_change_few_bytes(data: st.DataObject, blob: bytes) -> None:
    """At most eight bytes differ after at most eight flips."""
    damage = data.draw(strategies.bit_flips(blob))
    assert len(damage) == len(blob)
    assert 1 <= sum(a != b for a, b in zip(damage, blob, strict=True)) <= 8


@given(st.data(), BLOBS)
def test_cuts_and_tails_keep_the_rest(data: st.DataObject, blob: bytes) -> None:
    """A truncation is a beginning of the blob; the blob is a beginning of an extension."""
    cut = data.draw(strategies.truncations(blob))
    assert blob.startswith(cut)
    assert len(cut) < len(blob)
    longer = data.draw(strategies.extensions(blob))
    assert longer.startswith(blob)
    assert len(longer) > len(blob)


@given(st.data(), st.binary(min_size=4, max_size=200))
def test_word_edits_change_four_bytes_at_most(data: st.DataObject, blob: bytes) -> None:
    """All that differs lies in one 32-bit word."""
    damage = data.draw(strategies.word_edits(blob))
    assert len(damage) == len(blob)
    changed = [at for at, (a, b) in enumerate(zip(damage, blob, strict=True)) if a != b]
    assert not changed or changed[-1] - changed[0] < 4


@pytest.mark.parametrize(
    "is_wanted",
    [
        lambda damage, blob: len(damage) < len(blob),
        lambda damage, blob: len(damage) > len(blob),
        lambda damage, blob: len(damage) == len(blob),
    ],
)
def test_damage_is_of_many_kinds(is_wanted: Callable[[bytes, bytes], bool]) -> None:
    """Blobs get shorter, longer, or stay as long."""
    blob = bytes(range(100))
    find(strategies.damaged(blob), lambda damage: is_wanted(damage, blob), settings=FIRST)


def test_words_become_as_large_as_can_be() -> None:
    """An edit writes the largest number too, which a reader may take for a length."""
    find(
        strategies.word_edits(bytes(range(100))),
        lambda damage: b"\xff\xff\xff\xff" in damage,
        settings=FIRST,
    )
