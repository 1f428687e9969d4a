"""The parser against what llama.cpp really writes."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

import llama_state as ls
from llama_state import layout
from tests.context.test_flags import tokens
from tests.kinds import K_ONLY
from tests.layout.blobs import State, u32

pytestmark = pytest.mark.libllama

CONFIGURATIONS = [
    {"n_seq_max": n_seq_max, "kv_unified": unified, "flash_attn": flash, **types}
    for n_seq_max, unified in ((1, False), (3, True), (3, False))
    for flash in (None, True, False)
    for types in ({}, {"type_k": "q8_0"}, {"type_k": "q8_0", "type_v": "q8_0"}, {"type_k": "f32"})
    if flash or "type_v" not in types
]


def histories(ctx: ls.Context) -> Iterator[None]:
    """Put *ctx* into states of ever more kinds: empty, filled, cut, shared."""
    yield
    ctx.decode(tokens(50))
    yield
    for seq_id in range(1, ctx.n_seq_max):
        ctx.decode(tokens(5 + seq_id, seq_id), seq_id)
    yield
    if ctx.n_seq_max > 1:
        ctx.seq_cp(0, 1)
        ctx.decode([3], 1)
        yield
    if not ctx._facts.recurrent:
        ctx.seq_rm(0, 10, 20)
        yield
    ctx.seq_rm(0)
    yield


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_byte_is_accounted_for(model: ls.Model, options: dict[str, object]) -> None:
    """Whole and sequence states of every configuration parse to their last byte.

    With what the model says, and, but for what no byte tells, without.
    """
    try:
        ctx = model.context(n_ctx=768, n_threads=1, **options)  # type: ignore[arg-type]
    except ls.UnsupportedError:
        assert model.arch in K_ONLY  # keeps no V: its type must be that of K
        assert options.get("type_k", "f16") != options.get("type_v", "f16")
        return
    library, traits = model.library, ctx._facts.traits
    assert len(traits) == 1
    with ctx:
        for _ in histories(ctx):
            blob = ctx.snapshot()
            for given in (traits, None):
                parsed = layout.parse_whole(blob, version=library.session_version, traits=given)
                assert parsed.nbytes == len(blob)
            assert parsed.arch == model.arch
            for seq_id in range(ctx.n_seq_max):
                blob = ctx.seq_snapshot(seq_id)
                for given in (traits, None):
                    alone = layout.parse_sequence(
                        blob,
                        version=library.session_version,
                        headed=library.sequence_head,
                        traits=given,
                    )
                    assert alone.nbytes == len(blob)
                assert set(alone.sequences) <= {seq_id, layout.UNKNOWN_ID}


DSV4_MAGIC = u32(0x34565344)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
def test_a_damaged_state_of_deepseek4_is_told_as_one(model: ls.Model, unified: bool) -> None:
    """Its head is not read as a stream count, in a context of any model and on any build."""
    with model.context(n_ctx=256, n_seq_max=2, kv_unified=unified, n_threads=1) as ctx:
        ctx.decode(tokens(50))
        state = State("dsv4", seq=0, version=ctx.library.session_version).blob()
        own = ctx.seq_snapshot(0)
        said = [refusal(ctx, state)] if DSV4_MAGIC not in own else []
        for blob in (state, own):
            rng = Random(0)
            first = blob.find(DSV4_MAGIC) + 4 if DSV4_MAGIC in blob else 0
            for _ in range(60):
                at = rng.randrange(first, min(len(blob), first + 600))
                said += [refusal(ctx, blob[:at]), refusal(ctx, blob[:at] + u32(9) + blob[at + 4 :])]
        assert not any(str(0x34565344) in text for text in said)
        assert DSV4_MAGIC in own or "a deepseek4 payload, not one of" in said[0]


def refusal(ctx: ls.Context, blob: bytes) -> str:
    """The text with which a state is refused, or nothing."""
    try:
        ctx.seq_restore(blob, 0)
    except ls.StateError as error:
        return str(error)
    return ""
