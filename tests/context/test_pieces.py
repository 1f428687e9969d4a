"""Pieces of the states of real contexts: put together again, they are the state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama_state as ls
from llama_state import layout
from llama_state.layout.pieces import Part, compose

from ..kinds import examples

pytestmark = pytest.mark.libllama

N = 100


def _parts(ctx: ls.Context, blob: bytes, ends: list[int]) -> list[Part]:
    """Take a state to pieces that end at *ends*, and describe each as one."""
    parsed = layout.parse_sequence(
        blob,
        version=ctx.library.session_version,
        headed=ctx.library.sequence_head,
        traits=layout.model_traits(ctx.arch),
    )
    groups = layout.groups_of(parsed.module)
    pieces = [
        (group, layout.take(blob, parsed, group, start, end))
        for start, end in zip([0, *ends], ends, strict=False)
        for group in groups
        if group != "S"
    ]
    if "S" in groups:
        pieces.append(("S", layout.take(blob, parsed, "S")))
    return [_described(ctx, parsed, group, b"".join(piece)) for group, piece in pieces]


def _described(ctx: ls.Context, like: layout.Layout, group: layout.Group, data: bytes) -> Part:
    parsed = layout.parse_sequence(
        data,
        version=ctx.library.session_version,
        headed=False,
        traits=like.traits,
        piece=True,
    )
    return Part(memoryview(data), parsed, frozenset([group]))


@pytest.mark.parametrize("n_seq_max", [1, 3])
@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_whole_again(
    model: ls.Model, n_seq_max: int, *, kv_unified: bool, flash_attn: bool
) -> None:
    """Pieces of a sequence, wherever they end, make up its state byte for byte."""
    seq_id = n_seq_max - 1
    with model.context(
        n_ctx=256 * n_seq_max, n_seq_max=n_seq_max, kv_unified=kv_unified, flash_attn=flash_attn
    ) as ctx:
        ctx.decode([(7 * i) % ctx.n_vocab for i in range(N)], seq_id)
        blob = ctx.seq_snapshot(seq_id)
        n_stream = _streams(ctx, blob)

        @given(st.lists(st.integers(1, N - 1), unique=True, max_size=5).map(sorted))
        @examples(ctx.arch)
        def check(ends: list[int]) -> None:
            parts = _parts(ctx, blob, [*ends, N])
            head = blob[: len(layout.sequence_head(0)) if ctx.library.sequence_head else 0]
            assert head + b"".join(compose(parts, seq_id=seq_id, n_stream=n_stream)) == blob

        check()


def _streams(ctx: ls.Context, blob: bytes) -> int:
    parsed = layout.parse_sequence(
        blob,
        version=ctx.library.session_version,
        headed=ctx.library.sequence_head,
        traits=layout.model_traits(ctx.arch),
    )
    return layout.form_of(parsed).n_stream or 1
