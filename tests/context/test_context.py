"""Decoding, positions, cutting, copying, savepoints: the context without its states."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.testing.conformance import NMSE_LIMIT, nmse
from tests.kinds import K_ONLY

pytestmark = pytest.mark.libllama

Make = Callable[..., ls.Context]


def logits_after(ctx: ls.Context, token: int, seq_id: int = 0) -> bytes:
    ctx.decode([token], seq_id)
    return bytes(ctx.logits())


def test_facts(llama: ls.Model, make: Make) -> None:
    """A context says what it was made with."""
    ctx = make(n_ctx=512, n_seq_max=2, n_batch=64)
    assert (ctx.n_ctx, ctx.n_seq_max, ctx.n_batch) == (512, 2, 64)
    assert (ctx.arch, ctx.n_vocab) == ("llama", llama.n_vocab) == (llama.arch, 128)
    assert ctx.library is llama.library
    assert ctx.pointer > 0
    assert "512 cells" in repr(ctx)


def test_pieces_equal_one_run(make: Make) -> None:
    """A run longer than n_batch is decoded in pieces with the same result."""
    tokens = [(7 * i) % 128 for i in range(100)]
    one, many = make(n_batch=128), make(n_batch=32)
    one.decode(tokens)
    many.decode(iter(tokens))
    assert one.n_past() == many.n_past() == 100
    assert nmse(one.logits(), many.logits()) < NMSE_LIMIT


def test_logits_are_a_copy_and_never_stale(make: Make) -> None:
    """None before a decode, after a restore or clear; a view outlives the context."""
    ctx = make()
    with pytest.raises(ls.StateError, match="decode a token first"):
        ctx.logits()
    ctx.decode([1, 2, 3])
    kept = ctx.logits()
    assert (len(kept), kept.format) == (ctx.n_vocab, "f")
    before = bytes(kept)
    ctx.decode([4])
    assert bytes(kept) == before != bytes(ctx.logits())
    ctx.restore(ctx.snapshot())
    with pytest.raises(ls.StateError):
        ctx.logits()
    ctx.decode([4])
    ctx.clear()
    with pytest.raises(ls.StateError):
        ctx.logits()
    ctx.close()
    assert bytes(kept) == before


def test_nothing_to_decode(make: Make) -> None:
    """No tokens change nothing."""
    ctx = make()
    ctx.decode([])
    assert ctx.n_past() == 0


@pytest.mark.parametrize("token", [-1, 128, 2**31 - 1, 2**40])
def test_tokens_outside_the_vocabulary(make: Make, token: int) -> None:
    """They are refused before anything is decoded."""
    ctx = make()
    with pytest.raises(ls.DecodeError, match="vocabulary"):
        ctx.decode([1, 2, token])
    assert ctx.n_past() == 0


def test_a_full_cache(make: Make) -> None:
    """CapacityError says how much was wanted; the sequence is what it was, also after pieces."""
    ctx = make(n_ctx=256, n_batch=64)
    ctx.decode(range(100))
    with pytest.raises(ls.CapacityError) as caught:
        ctx.decode([1] * 200)
    assert (caught.value.need, caught.value.have) == (300, 256)
    assert ctx.n_past() == 100
    ctx.decode([1] * 156)
    assert ctx.n_past() == 256


@pytest.mark.parametrize("unified", [True, False])
def test_cut_and_go_on(make: Make, unified: bool) -> None:
    """Cutting the tail brings back the context of before."""
    ctx = make(n_ctx=768, n_seq_max=3, kv_unified=unified)
    ctx.decode(range(20), 1)
    expected = logits_after(ctx, 99, 1)
    ctx.decode(range(30), 1)
    ctx.seq_rm(1, 20)
    assert ctx.n_past(1) == 20
    assert logits_after(ctx, 99, 1) == expected
    ctx.seq_rm(1)
    assert ctx.n_past(1) == 0
    ctx.seq_rm(1, 5, 5)
    ctx.seq_rm(2)


@pytest.mark.parametrize("unified", [True, False])
def test_copies_are_independent_and_immediate(model: ls.Model, unified: bool) -> None:
    """A copy equals its source at once, replaces what was there, and lives on its own.

    llama.cpp itself copies between streams only at the next decode.
    """
    with model.context(n_ctx=768, n_seq_max=3, kv_unified=unified) as ctx:
        ctx.decode(range(24), 0)
        ctx.decode(range(50, 60), 2)
        ctx.seq_cp(0, 2)
        assert ctx.n_past(2) == 24
        copy, source = ctx.seq_snapshot(2), ctx.seq_snapshot(0)
        assert len(copy) == len(source)
        ctx.decode([9], 0)
        expected = bytes(ctx.logits())
        ctx.seq_rm(0)
        assert ctx.n_past(2) == 24
        ctx.decode([9], 2)
        assert bytes(ctx.logits()) == expected
        ctx.seq_cp(1, 2)
        assert ctx.n_past(2) == 0


def test_copy_of_a_prefix(make: Make) -> None:
    """In a unified context a prefix can be shared; across streams only whole sequences."""
    ctx = make(n_ctx=768, n_seq_max=3, kv_unified=True)
    ctx.decode(range(40), 0)
    ctx.seq_cp(0, 1, 0, 25)
    assert ctx.n_past(1) == 25
    fresh = make()
    fresh.decode(range(25))
    assert logits_after(ctx, 7, 1) == logits_after(fresh, 7)
    split = make(n_ctx=768, n_seq_max=3)
    split.decode(range(40), 0)
    split.decode(range(5), 1)
    with pytest.raises(ls.UnsupportedError, match="kv_unified"):
        split.seq_cp(0, 1, 0, 25)
    assert (split.n_past(0), split.n_past(1)) == (40, 5)


def test_memory_that_cannot_be_cut(model: ls.Model) -> None:
    """Recurrent memory refuses a cut, a window one beyond its cells; nothing has changed then."""
    with model.context(n_ctx=512, n_seq_max=2, kv_unified=True, swa_full=False) as ctx:
        ctx.decode(range(100), 0)
        # A sequence restore keeps of a sliding window only what the next token needs.
        span = ctx.seq_restore(ctx.seq_snapshot(0), 0).sequences[0]
        before = ctx.snapshot()
        if span.rewind_min > 0:
            with pytest.raises(ls.UnsupportedError, match="restore a snapshot"):
                ctx.seq_rm(0, span.rewind_min - 1)
            with pytest.raises(ls.UnsupportedError):
                ctx.seq_cp(0, 1, 0, span.rewind_min - 1)
            assert ctx.snapshot() == before
        ctx.seq_rm(0, span.rewind_min)
        assert ctx.n_past() == min(span.rewind_min, 100)
        ctx.seq_rm(0)
        assert ctx.n_past() == 0


@pytest.mark.parametrize("seq_ids", [(), (0,), (0, 1)])
def test_savepoint(model: ls.Model, seq_ids: tuple[int, ...]) -> None:
    """A block that raises leaves the sequences as they were; one that ends well keeps its work."""
    with model.context(n_ctx=512, n_seq_max=2) as ctx:
        ctx.decode(range(20), 0)
        ctx.decode(range(10), 1)
        before = [ctx.seq_snapshot(i) for i in (0, 1)]
        with pytest.raises(ZeroDivisionError), ctx.savepoint(*seq_ids):
            ctx.decode([1, 2, 3], 0)
            ctx.seq_rm(0)
            1 / 0  # noqa: B018
        assert [ctx.seq_snapshot(i) for i in (0, 1)] == before
        with ctx.savepoint(*seq_ids):
            ctx.decode([1], 0)
        assert ctx.n_past(0) == 21


def test_an_undo_that_fails(make: Make) -> None:
    """The exception of the block stays; that its sequence could only be emptied is its note."""
    ctx = make(n_ctx=256, n_seq_max=2, kv_unified=True)
    ctx.decode([1] * 100, 0)
    with pytest.raises(ZeroDivisionError) as caught, ctx.savepoint(0):
        ctx.clear()
        ctx.decode([2] * 200, 1)
        raise ZeroDivisionError
    notes = " ".join(getattr(caught.value, "__notes__", []))
    assert "sequence 0 was emptied, not undone" in notes
    assert ctx.n_past(0) == 0
    assert ctx.n_past(1) == 200


def test_savepoint_around_a_close(make: Make) -> None:
    """The block's own error comes out even when it closed the context."""
    ctx = make()
    with pytest.raises(ZeroDivisionError), ctx.savepoint():
        ctx.close()
        1 / 0  # noqa: B018


IDS = [-5, -1, 2, 255, 256, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("unified", [True, False])
def test_wrong_sequence_ids(model: ls.Model, unified: bool, tmp_path: Path) -> None:
    """Every function that takes an id refuses a wrong one; llama.cpp would abort on some."""
    path = tmp_path / "state"
    with model.context(n_ctx=512, n_seq_max=2, kv_unified=unified) as ctx:
        ctx.decode(range(10))
        ctx.seq_save_state(path)
        before, blob = ctx.snapshot(), ctx.seq_snapshot()
        calls: list[Callable[[int], object]] = [
            lambda seq_id: ctx.decode([1], seq_id),
            ctx.n_past,
            ctx.seq_rm,
            lambda seq_id: ctx.seq_cp(0, seq_id),
            lambda seq_id: ctx.seq_cp(seq_id, 0),
            ctx.seq_state_size,
            ctx.seq_snapshot,
            lambda seq_id: ctx.seq_snapshot(seq_id, out=bytearray(10)),
            lambda seq_id: ctx.seq_restore(blob, seq_id),
            lambda seq_id: ctx.seq_save_state(path, seq_id),
            lambda seq_id: ctx.seq_load_state(path, seq_id),
            lambda seq_id: ctx.savepoint(0, seq_id).__enter__(),
        ]
        for call, seq_id in itertools.product(calls, IDS):
            with pytest.raises(ls.SequenceIdError) as caught:
                call(seq_id)
            assert (caught.value.seq_id, caught.value.limit) == (seq_id, 2)
            assert isinstance(caught.value, IndexError)
        assert ctx.snapshot() == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"n_seq_max": 0}, ValueError, "n_seq_max"),
        ({"n_seq_max": 257}, ValueError, "n_seq_max"),
        ({"n_ctx": -1}, ValueError, "n_ctx"),
        ({"n_batch": 0}, ValueError, "n_batch"),
        ({"n_seq_max": 2, "n_batch": 1}, ls.CapacityError, "n_batch.*need 2, have 1"),
        ({"type_k": "q3_7"}, ls.UnsupportedError, "q8_0"),
        ({"type_v": "q8_0", "flash_attn": False}, ls.ContextError, "type_v='q8_0'"),
    ],
)
def test_options_that_cannot_be(
    llama: ls.Model, options: dict[str, object], error: type[ValueError], words: str
) -> None:
    """Wrong options are errors that name them."""
    with pytest.raises(error, match=words):
        llama.context(**options)  # type: ignore[arg-type]


def test_text(library: ls.Library, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A model with the byte tokenizer goes from text to tokens and back; one without says so."""
    from llama_state.testing.models import write_model

    path = write_model(tmp_path_factory.mktemp("text") / "text.gguf", text=True)
    with ls.Model(path, library) as model:
        text = "Grüße, 世界!"
        tokens = model.tokenize(text, add_special=False)
        assert model.detokenize(tokens).strip() == text
        assert model.tokenize("a")[0] == 1
        assert model.metadata("tokenizer.chat_template")
        assert model.metadata("no.such.key") is None
        with pytest.raises(ls.DecodeError):
            model.detokenize([model.n_vocab])


def test_no_tokenizer(llama: ls.Model) -> None:
    """llama.cpp aborts when a model without a vocabulary is asked to tokenize; we do not."""
    with pytest.raises(ls.UnsupportedError, match="no tokenizer"):
        llama.tokenize("a")
    with pytest.raises(ls.UnsupportedError, match="no tokenizer"):
        llama.detokenize([1])


def test_a_missing_model(library: ls.Library) -> None:
    with pytest.raises(ls.ModelLoadError, match="no such file"):
        ls.Model("/nowhere/model.gguf", library)


def test_logits_of_one_context_by_two_names(make: Make, library: ls.Library) -> None:
    """What one attachment restores or clears makes the logits of the other one stale too."""
    ctx = make()
    twin = ls.attach(ctx.pointer, library)
    ctx.decode([1, 2, 3])
    assert bytes(twin.logits()) == bytes(ctx.logits())
    twin.clear()
    with pytest.raises(ls.StateError, match="decode a token first"):
        ctx.logits()


def test_branching_keeps_the_logits(make: Make) -> None:
    """Copying and cutting other sequences leaves the last logits to sample from."""
    ctx = make(n_ctx=512, n_seq_max=2)
    ctx.decode(range(10))
    before = bytes(ctx.logits())
    ctx.seq_cp(0, 1)
    assert bytes(ctx.logits()) == before


def test_different_types_without_v(model: ls.Model) -> None:
    """A model that keeps no V takes one type; older builds of llama.cpp crash on two."""
    if model.arch in K_ONLY:
        with pytest.raises(ls.UnsupportedError, match="keeps no V"):
            model.context(n_ctx=256, type_k="q8_0", flash_attn=False)


def test_emptying_by_parts(make: Make) -> None:
    """A sequence that begins late can be cut to nothing from any position before its first."""
    ctx = make()
    ctx.decode([1, 2, 3])
    ctx.seq_rm(0, 0, 2)
    ctx.seq_rm(0, 1)
    assert ctx.n_past() == 0


@pytest.mark.parametrize("unified", [True, False])
def test_copying_nothing(model: ls.Model, unified: bool) -> None:
    """A range without positions makes an empty copy, whatever the memory."""
    with model.context(n_ctx=512, n_seq_max=2, kv_unified=unified) as ctx:
        for start, end in ((0, 0), (5, 5), (7, None), (7, 9)):
            ctx.clear()
            ctx.decode([1, 2, 3], 0)
            ctx.decode([1, 2], 1)
            ctx.seq_cp(0, 1, start, end)
            assert (ctx.n_past(0), ctx.n_past(1)) == (3, 0)
