"""Tables are hints: where one is wrong, a state is saved and restored as what its bytes are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import llama_state as ls
from llama_state.context.form import StateForm
from llama_state.layout import architectures
from llama_state.layout.families import Family
from llama_state.testing.conformance import nmse, nmse_limit

pytestmark = pytest.mark.libllama

ROWS = list(dict.fromkeys(architectures.ARCHITECTURES.values()))
PROMPT = list(range(2, 50))  # longer than every window
NEXT = 7


@pytest.fixture(params=ROWS, ids=lambda row: f"{row.module}-{ROWS.index(row)}")
def row(request: pytest.FixtureRequest, model: ls.Model, monkeypatch: pytest.MonkeyPatch) -> Family:
    """A row of the table, which stands where that of the model should."""
    table = {**architectures.ARCHITECTURES, model.arch: request.param}
    monkeypatch.setattr(architectures, "ARCHITECTURES", MappingProxyType(table))
    return request.param  # type: ignore[no-any-return]


def next_logits(ctx: ls.Context, seq_id: int) -> memoryview[float]:
    ctx.decode([NEXT], seq_id)
    return ctx.logits()


@pytest.fixture
def filled(model: ls.Model, row: Family) -> Iterator[ls.Context]:
    with model.context(n_ctx=256, n_seq_max=2, n_threads=1) as ctx:
        ctx.decode(PROMPT, 0)
        ctx.decode(PROMPT[:9], 1)
        yield ctx


def test_every_way(model: ls.Model, filled: ls.Context, tmp_path: Path) -> None:
    """Into an empty context and over what another one holds, whole and by sequence."""
    blob, one = filled.snapshot(), filled.seq_snapshot(0)
    filled.save_state(tmp_path / "whole", PROMPT)
    filled.seq_save_state(tmp_path / "one", 0, PROMPT)
    expected = next_logits(filled, 0)
    checkpoint = filled.checkpoint(1)
    for begun in ([], [1, 2, 3]):
        with model.context(n_ctx=256, n_seq_max=2, n_threads=1) as ctx:
            ways = [
                lambda: ctx.restore(blob),
                lambda: ctx.seq_restore(one, 0),
                lambda: ctx.load_state(tmp_path / "whole"),
                lambda: ctx.seq_load_state(tmp_path / "one", 0),
            ]
            for way in ways:
                ctx.clear()
                ctx.decode(begun)
                assert way().sequences[0].n_past == len(PROMPT)
                assert nmse(next_logits(ctx, 0), expected) < nmse_limit(model.arch)
            assert ctx.resume(checkpoint, 1).sequences[1].n_past == 9
            with pytest.raises(ZeroDivisionError), ctx.savepoint():
                ctx.decode([1])
                raise ZeroDivisionError
            assert ctx.n_past(0) == len(PROMPT) + 1


def test_the_log_says_so(
    model: ls.Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once a context, and never where the table is right."""
    for wrong in (False, True):
        if wrong:
            kind = "recurrent" if model.arch != "mamba2" else "kv"
            table = {**architectures.ARCHITECTURES, model.arch: Family(kind)}
            monkeypatch.setattr(architectures, "ARCHITECTURES", MappingProxyType(table))
        caplog.clear()
        with model.context(n_ctx=256, n_threads=1) as ctx:
            ctx.decode(PROMPT)
            for _ in range(2):
                ctx.restore(ctx.snapshot())
        records = [record for record in caplog.records if record.name == "llama_state.layout"]
        assert len(records) == wrong
        assert all(model.arch in record.getMessage() for record in records)


@pytest.mark.parametrize(
    "words", list(product([False, True], [False, True], [0, 32])), ids=lambda words: str(words)
)
def test_what_llama_cpp_says_is_a_hint(model: ls.Model, words: tuple[bool, bool, int]) -> None:
    """Whatever it says of recurrent, hybrid and windows, a context reads its own states."""
    recurrent, hybrid, n_swa = words
    told: dict[str, Any] = {"recurrent": recurrent, "hybrid": hybrid, "n_swa": n_swa}
    with model.context(n_ctx=256, n_threads=1) as ctx, ctx._handle.use() as call:
        ctx.decode(PROMPT)
        facts = replace(
            ctx._facts,
            traits=architectures.model_traits(model.arch, **told),
            others=partial(architectures.every_kind, model.arch, **told),
        )
        form = StateForm(model.library, facts)
        parsed = form.read(call, 0)
        assert parsed.module == ctx._state._form.read(call, 0).module
        form.settle(parsed)
        assert parsed.traits in form.traits


def test_damage_is_none_of_it(model: ls.Model) -> None:
    """A state that is cut off anywhere is not taken for one of another memory."""
    with model.context(n_ctx=256, n_threads=1) as ctx:
        ctx.decode(PROMPT)
        blob = ctx.snapshot()
        layout = ctx.checkpoint().layout
        ends = [cache.offset + cache.nbytes for cache in layout.caches]
        for end in {*ends[:-1], *range(0, len(blob), len(blob) // 50)}:
            for begun in (PROMPT, [3]):
                ctx.clear()
                ctx.decode(begun)
                held = ctx.snapshot()
                with pytest.raises(ls.StateError):
                    ctx.restore(blob[:end])
                assert ctx.snapshot() == held
