"""Whatever happens to the bytes of a state: an error of ours, or a layout of all of them."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_state.errors import FormatError, StateError, UnsupportedError
from llama_state.layout import Traits, differences, parse_sequence, parse_whole
from tests.layout.blobs import State, u32
from tests.layout.test_parse import CACHES, make_state, names, parse, traits_of
from tests.layout.test_reject import HUGE, SEQUENCE, WHOLE, read

SMALL = {"n_layer": 1, "row_k": 8, "row_v": 4, "row_r": 4, "row_s": 8, "n_recurrent": 2}
SAMPLES = [
    replace(make_state(module, form), **SMALL, seq=seq)  # type: ignore[arg-type]
    for module in CACHES
    for form in ("plain", "shared", "M-RoPE", "V transposed")
    for seq in (None, 0)
]


def survive(state: State, blob: bytes) -> None:
    """Read damaged bytes in every way: an error of ours, or a layout of all bytes."""
    for traits in (traits_of(state), None):
        try:
            if state.seq is None:
                layout = parse_whole(blob, version=11, traits=traits)
            else:
                layout = parse_sequence(blob, version=11, traits=traits)
        except StateError:
            continue
        assert layout.nbytes == len(blob)
        for low, high in layout.spans.values():
            assert low >= -1
            assert high < 2**31 - 1


@pytest.mark.parametrize("state", SAMPLES, ids=lambda state: f"{state.module}-{state.seq}")
def test_cut_at_every_length(state: State) -> None:
    """A state that ends early is refused, or has other layers than the whole of it.

    How many recurrent layers a hybrid model has is written nowhere: cut between two blocks, its
    state can read as that of a model of fewer.
    """
    blob, geometry = state.blob(), parse(state).geometry
    # deepseek4 has ten times the bytes of the others, most of them in tensors.
    for length in range(0, len(blob), 1 + len(blob) // 2000):
        try:
            layout = read(state, blob[:length])
        except FormatError:
            continue
        assert state.module.startswith("hybrid")
        assert differences(layout.geometry, geometry) or names(layout) == ("attn", "recurrent")


@given(
    st.sampled_from(SAMPLES),
    st.integers(0, 2**16),
    st.sampled_from([0, 1, 2, 3, 8, 255, 256, 2**31 - 1, 2**31, HUGE]) | st.integers(0, HUGE),
    st.booleans(),
)
@example(SAMPLES[0], 0, 0, True)
def test_any_word_replaced(state: State, place: int, word: int, aligned: bool) -> None:
    """One wrong word is refused, or does no harm."""
    blob = state.blob()
    start = (len(state.arch) + 4 if state.seq is None else 0) if aligned else 0
    offset = start + place % max((len(blob) - start) // 4, 1) * 4
    survive(state, (blob[:offset] + u32(word) + blob[offset + 4 :])[: len(blob)])


@given(st.sampled_from(SAMPLES), st.integers(0, 2**16), st.integers(0, 7))
def test_any_bit_flipped(state: State, place: int, bit: int) -> None:
    """One wrong bit is refused, or does no harm."""
    blob = bytearray(state.blob())
    blob[place % len(blob)] ^= 1 << bit
    survive(state, bytes(blob))


@given(st.sampled_from(SAMPLES), st.integers(0, 2**16), st.binary(min_size=1, max_size=40))
def test_any_bytes_inserted(state: State, place: int, new: bytes) -> None:
    """Bytes too many are refused, or are read as a state of that length."""
    blob = state.blob()
    place %= len(blob) + 1
    survive(state, blob[:place] + new + blob[place:])


@given(st.binary(max_size=300))
def test_noise(noise: bytes) -> None:
    """Bytes of no meaning are never more than refused."""
    state = State("kv")
    survive(state, noise)
    survive(state.only(0), noise)
    survive(state.only(0), u32(0xAF143CD8, 0) + noise)


@pytest.mark.parametrize("traits", [None, Traits("llama", "kv"), Traits("llama", "hybrid")])
@pytest.mark.parametrize("extra", [b"", b"\0"])
def test_the_buffer_is_let_go(traits: Traits | None, extra: bytes) -> None:
    """Read or refused: a mapped file can be closed at once, without a garbage collection."""
    gc.disable()
    try:
        for state in (WHOLE, SEQUENCE, State("hybrid"), State("hybrid", seq=0)):
            buffer = bytearray(state.blob() + extra)
            parse_it = parse_whole if state.seq is None else parse_sequence
            with suppress(StateError):
                parse_it(buffer, version=11, traits=traits)
            buffer.clear()
    finally:
        gc.enable()


def test_a_hostile_recurrent_state_costs_no_time() -> None:
    """Zeros read as any number of empty blocks; that is not tried for all of them."""
    blob = u32(5) + b"mamba" + u32(0, 0, HUGE) + bytes(2_000_001)
    with pytest.raises(FormatError):
        parse_whole(blob, version=11)
    with pytest.raises(UnsupportedError):
        parse_whole(blob.replace(b"mamba", b"novaa"), version=11)
