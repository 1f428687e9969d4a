"""A text that a real model has read is found in a prefix store, as far as another one begins so."""

from __future__ import annotations

from pathlib import Path

import pytest

import llama_state as ls

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize("shared", [300, 512, 640])
def test_a_text_is_found(
    real: ls.Model, prose: list[int], tmp_path: Path, cache: str, shared: int
) -> None:
    """What comes back is byte for byte what the context held that read it, and so the logits."""
    options = {"n_ctx": 1024, "type_k": cache, "type_v": cache, "flash_attn": True}
    text = [*prose[:shared], *reversed(prose[:40])]
    with real.context(**options) as source, ls.PrefixStore(tmp_path, capacity_bytes=1 << 30) as kv:
        assert kv.prefill(source, prose).n_past == 0
        source.seq_rm(0, shared)
        held = source.seq_snapshot(0)
    with (
        real.context(**options) as target,
        real.context(**options) as control,
        ls.PrefixStore(tmp_path, capacity_bytes=1 << 30) as kv,
    ):
        assert kv.recall(target, text).n_past == shared
        control.seq_restore(held, 0)
        assert target.seq_snapshot(0) == held
        for context in (target, control):
            context.decode(text[shared:])
        assert target.logits() == control.logits()
        assert kv.verify().ok
