"""A state in another form: the bytes that llama.cpp would have written in that form."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state.errors import FormatError, StateError, UnsupportedError
from llama_state.layout import parse_sequence, parse_whole
from llama_state.layout.conversion import Form, convert, form_of
from tests.layout.blobs import State
from tests.layout.test_parse import CHAT, FORMS, PAIRS, VERSIONS, traits_of

F16, Q8_0 = 1, 8


def converted(state: State, form: Form) -> bytes:
    parse = parse_whole if state.seq is None else parse_sequence
    blob = state.blob()
    layout = parse(blob, version=state.version, traits=traits_of(state))
    found = convert(blob, layout, form)
    again = parse(found, version=form.version, traits=traits_of(state))
    assert again.spans == layout.spans
    return bytes(found)


@given(
    pair=st.sampled_from(
        [pair for pair in PAIRS if pair[1] not in ("n-grams", "quantized", "M-RoPE")]
    ),
    versions=st.tuples(*[st.sampled_from(VERSIONS)] * 2),
    seq=st.sampled_from([None, 0, 1, 2]),
    v_trans=st.tuples(*[st.booleans()] * 2),
)
def test_another_version_and_v_turned(
    pair: tuple[str, str],
    versions: tuple[int, int],
    seq: int | None,
    v_trans: tuple[bool, bool],
) -> None:
    """Of every kind of memory, whole and of one sequence: byte for byte."""
    module, name = pair
    options = {**FORMS[name], "seq": seq}
    states = [
        State(module, **{**options, "version": version, "v_trans": turned})
        for version, turned in zip(versions, v_trans, strict=True)
    ]
    form = Form(versions[1], v_trans=v_trans[1])
    assert converted(states[0], form) == states[1].blob()


@pytest.mark.parametrize(
    "module", ["kv", "iswa", "hybrid", "hybrid-iswa", "dsa", "dsa-iswa", "msa"]
)
@pytest.mark.parametrize("version", VERSIONS)
def test_one_stream_and_many(module: str, version: int) -> None:
    """A sequence of a unified context, as one of a split context, and back."""
    for seq in (0, 1, 2):
        one = State(module, version=version, cells=CHAT, seq=seq)
        many = replace(one, split=4)
        assert converted(one, Form(version, n_stream=4)) == many.blob()
        assert converted(many, Form(version, n_stream=1)) == one.blob()
    whole = State(module, version=version, cells=CHAT)
    with pytest.raises(UnsupportedError, match="sequence by sequence"):
        converted(whole, Form(version, n_stream=4))


@pytest.mark.parametrize("seq", [None, 1])
def test_positions_of_images(seq: int | None) -> None:
    """From version 10 on their cells have a token, which is not known of older ones."""
    old = State("kv", version=9, cells=CHAT, ext=True, seq=seq)
    new = replace(old, version=11)
    assert converted(new, Form(9)) == old.blob()
    raised = converted(old, Form(11))
    assert len(raised) == len(new.blob())
    assert raised.replace(b"\xff\xff\xff\xff", b"\x4d\0\0\0") == new.blob()


def test_quantized_rows() -> None:
    """Only version 11 says whether they are rotated: nothing else can be made of them."""
    state = State("kv", cells=CHAT, version=11, **FORMS["quantized"])
    assert converted(state, Form(11)) == state.blob()
    for version in (9, 10):
        with pytest.raises(UnsupportedError, match="q8_0 rows are rotated"):
            converted(state, Form(version))
        with pytest.raises(UnsupportedError, match="q8_0 rows are rotated"):
            converted(replace(state, version=version), Form(11))
    with pytest.raises(UnsupportedError, match="in blocks"):
        converted(state, Form(11, v_trans=True))
    with pytest.raises(UnsupportedError, match=r"rotated by \(128, 64\), not by \(0, 0\)"):
        converted(state, Form(11, rotations={"kv": (0, 0)}))


def test_n_grams() -> None:
    """They came with version 10."""
    state = State("hybrid-idx", version=11, **FORMS["n-grams"])
    assert converted(state, Form(10)) == replace(state, version=10).blob()
    with pytest.raises(UnsupportedError, match="n-gram"):
        converted(state, Form(9))


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_its_own_form(module: str, name: str) -> None:
    """Nothing changes."""
    for seq in (None, 1):
        state = State(module, **{**FORMS[name], "seq": seq})
        layout = (parse_whole if seq is None else parse_sequence)(
            state.blob(), version=11, traits=traits_of(state)
        )
        assert bytes(convert(state.blob(), layout, form_of(layout))) == state.blob()


def test_forms_that_there_are_not() -> None:
    """Refused before a byte is written."""
    with pytest.raises(StateError, match="session version 12 is not known"):
        converted(State("kv"), Form(12))
    for n_stream in (0, -1, 257):
        with pytest.raises(UnsupportedError, match="streams"):
            converted(State("kv", seq=0), Form(11, n_stream=n_stream))
    layout = parse_whole(State("kv").blob(), version=11)
    with pytest.raises(FormatError, match="the layout is that of"):
        convert(State("kv").blob()[:-1], layout, Form(11))
