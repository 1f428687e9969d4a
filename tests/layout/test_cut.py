"""A sequence cut out of a whole state is what a save of that sequence would have written."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state.errors import SequenceIdError
from llama_state.layout import parse_sequence, sequence_from_whole
from tests.layout.blobs import Cell, State, text
from tests.layout.test_parse import CHAT, PAIRS, VERSIONS, make_state, parse, traits_of


def cut(whole: State, seq: int) -> bytes:
    return sequence_from_whole(whole.blob(), parse(whole), seq)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("module", "form"), [pair for pair in PAIRS if "windowed" not in pair])
def test_every_form(module: str, form: str, version: int) -> None:
    """Byte for byte, of every kind of memory; of a sequence without cells too."""
    whole = make_state(module, form, version)
    for seq in (0, 1, 2):
        assert cut(whole, seq) == whole.only(seq).payload()


def test_windowed_caches_keep_their_cells() -> None:
    """What a whole state has in its window cache is more than a sequence save would write."""
    whole = State("iswa", cells=text(10))
    layout = parse_sequence(cut(whole, 0), version=11, headed=False, traits=traits_of(whole))
    assert layout.spans == {0: (0, 9)}


def test_interleaved_cells() -> None:
    """Rows of other sequences between one's own are left out."""
    cells: tuple[Cell, ...] = tuple((i // 2, (i % 2,)) for i in range(20))
    for v_trans in (False, True):
        whole = State("kv", cells=cells, v_trans=v_trans)
        assert cut(whole, 1) == whole.only(1).payload()


def test_long_deepseek4() -> None:
    """Compressed rows are as many as positions make."""
    whole = State("dsv4", cells=(*text(21, 0), *text(9, 1)), split=2)
    for seq in (0, 1):
        assert cut(whole, seq) == whole.only(seq).payload()
    with pytest.raises(SequenceIdError):
        cut(whole, 2)


def test_from_any_buffer() -> None:
    """The whole state may be in any buffer."""
    whole = State("hybrid", cells=CHAT)
    blob = bytearray(whole.blob())
    assert sequence_from_whole(memoryview(blob), parse(whole), 2) == whole.only(2).payload()


@given(
    st.lists(
        st.sets(st.integers(0, 3), min_size=1).map(lambda ids: tuple(sorted(ids))), max_size=25
    ),
    st.booleans(),
    st.booleans(),
)
def test_any_owners(owners: list[tuple[int, ...]], ext: bool, v_trans: bool) -> None:
    """However cells are shared."""
    whole = State("hybrid", cells=tuple(enumerate(owners)), ext=ext, v_trans=v_trans)
    for seq in range(4):
        assert cut(whole, seq) == whole.only(seq).payload()
        split = replace(whole, split=4)
        assert cut(split, seq) == split.only(seq).payload()
