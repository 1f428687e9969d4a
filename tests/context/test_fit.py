"""What fits, decided without llama.cpp: kinds of memory that no tiny model has."""

from __future__ import annotations

from dataclasses import replace

import pytest

import llama_state as ls
from llama_state import layout
from llama_state.context.fit import Fit
from llama_state.context.form import StateForm
from tests.layout.blobs import State, text
from tests.libllama import LIBRARY

pytestmark = pytest.mark.libllama

BOUND = ["msa", "dsv4", "hybrid-idx"]
VERSION = LIBRARY.session_version
UNKNOWN_SIZES = [*BOUND, "dsa", "dsa-iswa"]


def fitting(llama: ls.Model, traits: layout.Traits) -> Fit:
    """What is known of an empty context of *traits* with 256 cells."""
    with llama.context(n_ctx=256) as ctx:
        facts = replace(ctx._facts, traits=(traits,), arch=traits.arch)

    return Fit(facts, StateForm(llama.library, facts))


def parsed(module: str, first: int) -> layout.Layout:
    """A whole state of *module* with four positions from *first* on."""
    state = State(module, version=VERSION, cells=text(4, 0, start=first))
    traits = layout.Traits(state.arch, module)  # type: ignore[arg-type]
    return layout.parse_whole(state.blob(), version=VERSION, traits=traits)


@pytest.mark.parametrize("module", BOUND)
def test_positions_beyond_the_context(llama: ls.Model, module: str) -> None:
    """Of these kinds llama.cpp crashes at the next decode when a position passes the context."""
    good, bad = parsed(module, 252), parsed(module, 253)
    check = fitting(llama, good.traits)
    check.learn(good)
    # The number of cells is llama.cpp's to say.
    assert not check.check(None, None, good, {})  # type: ignore[arg-type]
    for form in (None, layout.Form(llama.library.session_version, n_stream=1)):
        with pytest.raises(ls.CapacityError, match="positions: need 257, have 256"):
            check.check(None, None, bad, {}, form)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", UNKNOWN_SIZES)
def test_kinds_whose_cells_are_not_counted(llama: ls.Model, module: str) -> None:
    """llama.cpp may still refuse them, so a copy of the destination is kept."""
    state = parsed(module, 0)
    check = fitting(llama, state.traits)
    check.learn(state)
    assert not check.check(None, None, state, {0: layout.Span(0, 3)})  # type: ignore[arg-type]
    with pytest.raises(ls.UnsupportedError, match="cannot be counted"):
        check.countable()


@pytest.mark.parametrize("module", ["kv", "recurrent", "hybrid"])
def test_kinds_that_are_certain(llama: ls.Model, module: str) -> None:
    """Once the geometry is known nothing is left that llama.cpp could refuse: no copy is kept."""
    state = parsed(module, 0)
    check = fitting(llama, state.traits)
    check.learn(state)
    assert check.check(None, None, state, {0: layout.Span(0, 3)})  # type: ignore[arg-type]
    assert check.countable() == state.traits
