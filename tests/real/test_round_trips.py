"""A text that a real model has read is there again, and the answer to it is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import llama_state as ls
from llama_state._llama.calls import Target
from llama_state.testing import controls
from llama_state.testing.runs import answer, nmse

pytestmark = pytest.mark.real_model

# Other tokens make 0.1 and more; cells in other places 1e-3 of the text of these tests, and up to
# 0.02 of others.
MOVED = 3e-2

Trip: TypeAlias = Callable[[ls.Context, ls.Context, Path, list[int]], ls.Restored]


def session_file(source: ls.Context, target: ls.Context, path: Path, tokens: list[int]) -> Any:
    source.save_state(path, tokens)
    return target.load_state(path)


def sequence_file(source: ls.Context, target: ls.Context, path: Path, tokens: list[int]) -> Any:
    source.seq_save_state(path, 0, tokens)
    return target.seq_load_state(path)


def checkpoint_file(source: ls.Context, target: ls.Context, path: Path, tokens: list[int]) -> Any:
    source.checkpoint(0, tokens=tokens).save(path, compress=True)
    return target.resume(ls.Checkpoint.load(path))


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize(
    ("trip", "saved"),
    [(session_file, None), (sequence_file, 0), (checkpoint_file, 0)],
    ids=["session", "sequence", "checkpoint"],
)
def test_a_text_is_there_again(
    real: ls.Model, prose: list[int], tmp_path: Path, cache: str, trip: Trip, saved: Target
) -> None:
    """Positions and tokens; the answer is bit by bit that after llama.cpp's own restore.

    That of the source can be another: after a restore llama.cpp writes over the cells that a window
    has left, and sums over cells in another order are rounded otherwise.
    """
    options = {"n_ctx": 1024, "type_k": cache, "type_v": cache, "flash_attn": True}
    with real.context(**options) as source, real.context(**options) as target:
        source.decode(prose)
        restored = trip(source, target, tmp_path / "state", prose)
        assert list(restored.tokens) == prose
        assert restored.sequences[0].n_past == len(prose) == target.n_past()
        blob = source.snapshot() if saved is None else source.seq_snapshot(saved)
        with real.context(**options) as control:
            assert controls.put(control, saved, blob)
            own = answer(control, [0])
        got, uninterrupted = answer(target, [0]), answer(source, [0])
        assert bytes(got.logits[0]) == bytes(own.logits[0])
        assert got.tokens == own.tokens
        assert nmse(uninterrupted.logits[0], got.logits[0]) < MOVED
