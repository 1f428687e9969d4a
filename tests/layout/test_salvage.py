"""Of a state that is cut off or damaged, the first cells are read, and only right ones."""

from __future__ import annotations

from random import Random

import pytest

from llama_state.layout import Kind, KVCache, leading_cells, parse_sequence, parse_whole
from tests.layout.blobs import State, text
from tests.layout.test_parse import CHAT, traits_of

STATES = [
    pytest.param(State("kv", cells=CHAT), id="shared"),
    pytest.param(State("kv", cells=CHAT, split=4), id="split"),
    pytest.param(State("kv", cells=CHAT, ext=True), id="M-RoPE"),
    pytest.param(State("kv", cells=CHAT, ext=True, version=9), id="M-RoPE, version 9"),
    pytest.param(State("iswa", cells=CHAT, window=2), id="windows"),
    pytest.param(State("hybrid", cells=CHAT, v_trans=True), id="hybrid"),
    pytest.param(State("dsv4", cells=CHAT, k_only=True), id="compressed"),
    pytest.param(State("kv", cells=text(9, 3), seq=3), id="sequence"),
    pytest.param(State("dsa", cells=text(9, 3), seq=3, k_only=True), id="K only"),
]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("known", [True, False], ids=["model", "no model"])
def test_cuts(state: State, known: bool) -> None:
    """The longer the rest, the more cells, and each is one of the state."""
    blob, traits = state.blob(), traits_of(state)
    kind: Kind = "whole" if state.seq is None else "sequence"
    parse = parse_whole if state.seq is None else parse_sequence
    first = parse(blob, version=state.version, traits=traits).caches[0]
    assert isinstance(first, KVCache)
    before = 0
    for length in range(0, len(blob), 7):
        found = leading_cells(
            blob[:length],
            kind,
            version=state.version,
            headed=True,
            traits=[traits] if known else (),
        )
        assert len(found) <= len(first.streams)
        number = sum(map(len, found))
        assert number >= before
        before = number
        for cells, expected in zip(found, first.cells, strict=False):
            assert cells.positions == expected.positions
            assert {i: [*own] for i, own in cells.owners.items()} == {
                i: [*own] for i, own in expected.owners.items()
            }
    assert before == sum(map(len, first.cells))


@pytest.mark.parametrize("state", STATES)
def test_flips(state: State) -> None:
    """Whatever a byte is changed to, cells are returned or not; nothing else happens."""
    random = Random(1)
    kind: Kind = "whole" if state.seq is None else "sequence"
    for at in range(min(300, len(state.blob()))):
        blob = bytearray(state.blob())
        blob[at] = random.randrange(256)
        found = leading_cells(blob, kind, version=state.version, headed=True)
        assert sum(map(len, found)) * 12 <= len(blob)


def test_none() -> None:
    """Recurrent states come first where there is nothing else, and tell nothing alone."""
    for state in (State("recurrent"), State("none"), State("kv", cells=())):
        found = leading_cells(
            state.blob(), "whole", version=11, headed=True, traits=[traits_of(state)]
        )
        assert sum(map(len, found)) == 0
    assert leading_cells(b"", "whole", version=11, headed=True) == ()
    assert leading_cells(b"", "sequence", version=11, headed=True) == ()
