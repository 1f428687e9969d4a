"""Partial states and snapshots on the device: what llama.cpp's flags do, without their traps."""

from __future__ import annotations

import pickle

import pytest

import llama_state as ls
from llama_state import layout
from llama_state.testing.conformance import nmse
from tests.kinds import OWN_STREAMS, PARTIAL, UNCOUNTED

pytestmark = pytest.mark.libllama

OPTIONS = [
    {"n_seq_max": 2},
    {"n_seq_max": 2, "kv_unified": True},
    {"n_seq_max": 2, "flash_attn": False},
]


def tokens(n: int, start: int = 0) -> list[int]:
    return [(start + 5 * i) % 128 for i in range(n)]


def after(ctx: ls.Context, token: int, seq_id: int = 0) -> bytes:
    ctx.decode([token], seq_id)
    return bytes(ctx.logits())


def has_partial(model: ls.Model) -> bool:
    return model.arch in PARTIAL


@pytest.mark.parametrize("options", OPTIONS)
def test_partial_states_rewind(model: ls.Model, options: dict[str, object]) -> None:
    """A partial state is smaller and brings its sequence back to where it was taken."""
    with model.context(n_ctx=1024, **options) as ctx:  # type: ignore[arg-type]
        ctx.decode(tokens(60))
        ctx.decode(tokens(10, 3), 1)
        full, partial = ctx.seq_snapshot(0), ctx.seq_snapshot(0, partial=True)
        assert ctx.seq_state_size(0, partial=True) == len(partial)
        assert (len(partial) < len(full)) == has_partial(model)
        if not has_partial(model):
            assert partial == full
        expected = after(ctx, 9)
        ctx.decode(tokens(30, 1))
        other = ctx.seq_snapshot(1)
        restored = ctx.seq_restore(partial, 0, partial=True)
        assert restored.sequences[0].n_past == ctx.n_past() == 60
        if model.arch in OWN_STREAMS and options.get("flash_attn") is False:
            # The cells of its window come back in other places, and sums depend on them.
            error = nmse(memoryview(expected).cast("f"), memoryview(after(ctx, 9)).cast("f"))
            assert error < 1e-10
        else:
            assert after(ctx, 9) == expected
        assert ctx.seq_snapshot(1) == other


def test_partial_and_full_are_not_mixed_up(model: ls.Model) -> None:
    """One taken for the other is a FormatError, and the sequence is as it was.

    llama.cpp reads a full state as a partial one into the wrong cache and reports success.
    """
    if not has_partial(model):
        return
    with model.context(n_ctx=512) as ctx:
        ctx.decode(tokens(60))
        full, partial = ctx.seq_snapshot(), ctx.seq_snapshot(partial=True)
        ctx.decode(tokens(5))
        before = ctx.snapshot()
        with pytest.raises(ls.FormatError):
            ctx.seq_restore(partial)
        with pytest.raises(ls.FormatError):
            ctx.seq_restore(full, partial=True)
        with pytest.raises(ls.FormatError):
            ctx.restore(partial)
        assert ctx.snapshot() == before


def test_a_partial_state_needs_its_sequence(model: ls.Model) -> None:
    """Over a shorter or an empty sequence it would leave a hole: MismatchError."""
    if not has_partial(model):
        return
    with model.context(n_ctx=1024, n_seq_max=3) as ctx:
        ctx.decode(tokens(60))
        ctx.decode(tokens(20), 1)
        partial = ctx.seq_snapshot(0, partial=True)
        empty = ctx.seq_snapshot(2, partial=True)
        before = ctx.snapshot()
        for blob, dest in ((partial, 1), (partial, 2), (empty, 0)):
            with pytest.raises((ls.MismatchError, ls.FormatError)):
                ctx.seq_restore(blob, dest, partial=True)
        assert ctx.snapshot() == before


def test_partial_states_parse(model: ls.Model, library: ls.Library) -> None:
    """The parser reads partial states to the last byte."""
    with model.context(n_ctx=512) as ctx:
        ctx.decode(tokens(60))
        blob = ctx.seq_snapshot(partial=True)
        parsed = layout.parse_sequence(
            blob,
            version=library.session_version,
            headed=library.sequence_head,
            traits=ctx._facts.traits,
            partial=True,
        )
        assert (parsed.partial, parsed.nbytes) == (True, len(blob))


def test_what_llama_cpp_leaves_out(model: ls.Model) -> None:
    """A partial state that is a head alone says nothing of its sequence: it is refused.

    Newer builds write one for what can be cut back, and restore nothing from it.
    """
    with model.context(n_ctx=512) as ctx:
        ctx.decode(tokens(60))
        before = ctx.snapshot()
        error = ls.FormatError if ctx.arch in (*PARTIAL, "mamba2") else ls.UnsupportedError
        with pytest.raises(error) as caught:
            ctx.seq_restore(layout.sequence_head(0), partial=True)
        assert ("seq_rm" in str(caught.value)) == (error is ls.UnsupportedError)
        assert ctx.snapshot() == before


def on_device(ctx: ls.Context, seq_id: int = 0) -> ls.DeviceSnapshot | None:
    """A snapshot on the device, or None where this build or memory has none."""
    if ctx.library.session_version == 9 or ctx.arch in UNCOUNTED:
        with pytest.raises(ls.UnsupportedError):
            ctx.seq_device_snapshot(seq_id)
        return None
    return ctx.seq_device_snapshot(seq_id)


@pytest.mark.parametrize("options", OPTIONS)
def test_device_snapshots(model: ls.Model, options: dict[str, object]) -> None:
    """They keep the tensors out of main memory and restore more than once, into any sequence."""
    with model.context(n_ctx=1024, **options) as ctx:  # type: ignore[arg-type]
        ctx.decode(tokens(40))
        if (kept := on_device(ctx)) is None:
            return
        assert (kept.seq_id, kept.n_past, kept.stale) == (0, 40, False)
        assert kept.nbytes < ctx.seq_state_size() / 10
        assert "40 positions" in repr(kept)
        expected = after(ctx, 9)
        ctx.decode(tokens(7))
        assert kept.restore().sequences[0].n_past == 40
        assert after(ctx, 9) == expected
        assert kept.restore(1).sequences.keys() == {1}
        assert after(ctx, 9, 1) == expected
        ctx.clear()
        kept.restore()
        assert after(ctx, 9) == expected


def test_a_replaced_device_snapshot_is_stale(llama: ls.Model) -> None:
    """A second snapshot of a sequence makes the first an error; llama.cpp would mix them."""
    with llama.context(n_ctx=512, n_seq_max=2) as ctx:
        ctx.decode(tokens(10))
        if (first := on_device(ctx)) is None:
            return
        ctx.decode(tokens(10))
        twin = ls.attach(ctx.pointer, ctx.library)
        second = twin.seq_device_snapshot()
        assert first.stale
        assert not second.stale
        before = ctx.snapshot()
        with pytest.raises(ls.StaleError, match="sequence 0"):
            first.restore()
        assert ctx.snapshot() == before
        assert "stale" in repr(first)
        assert second.restore().sequences[0].n_past == 20
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(second)
        for seq_id in (-1, 2, 256):
            with pytest.raises(ls.SequenceIdError):
                second.restore(seq_id)


def test_device_snapshots_of_a_closed_context(llama: ls.Model) -> None:
    ctx = llama.context(n_ctx=256)
    ctx.decode(tokens(10))
    kept = on_device(ctx)
    ctx.close()
    if kept is not None:
        assert kept.stale
        with pytest.raises(ls.ClosedError):
            kept.restore()


def test_a_device_snapshot_without_room(llama: ls.Model) -> None:
    """Where cells are not sure to be free llama.cpp, which would abort, is not asked."""
    with llama.context(n_ctx=256, n_seq_max=2, kv_unified=True) as ctx:
        ctx.decode(tokens(150))
        if (kept := on_device(ctx)) is None:
            return
        ctx.seq_rm(0)
        ctx.decode(tokens(150), 1)
        before = ctx.snapshot()
        with pytest.raises(ls.CapacityError) as caught:
            kept.restore()
        assert (caught.value.need, caught.value.have) == (300, 256)
        assert ctx.snapshot() == before


def test_an_empty_device_snapshot(llama: ls.Model) -> None:
    """The snapshot of an empty sequence empties the destination."""
    with llama.context(n_ctx=512, n_seq_max=2) as ctx:
        if (kept := on_device(ctx)) is None:
            return
        ctx.decode(tokens(10), 1)
        assert kept.restore(1).sequences == {}
        assert ctx.n_past(1) == 0
