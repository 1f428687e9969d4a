"""Every kind of memory is read to its last byte, and described as it was written."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state.errors import FormatError, TruncatedError, UnsupportedError
from llama_state.layout import (
    UNKNOWN_ID,
    KVCache,
    Layout,
    RecurrentCache,
    Traits,
    Window,
    has_sequence_head,
    parse_sequence,
    parse_whole,
)
from tests.layout.blobs import F32, Q8_0, Cell, State, text

CACHES = {
    "none": (),
    "kv": ("kv",),
    "iswa": ("base", "swa"),
    "recurrent": ("recurrent",),
    "hybrid": ("attn", "recurrent"),
    "hybrid-iswa": ("base", "swa", "recurrent"),
    "hybrid-idx": ("attn", "recurrent", "idx"),
    "dsa": ("mla", "lid"),
    "dsa-iswa": ("mla", "lid", "swa"),
    "msa": ("base", "idx"),
    "dsv4": ("base", "swa", "csa", "hca", "lid", "csa state", "hca state", "lid state"),
}
IN_PARTIAL = {
    "iswa": ("swa",),
    "hybrid": ("recurrent",),
    "hybrid-iswa": ("swa", "recurrent"),
    "hybrid-idx": ("recurrent",),
    "dsa-iswa": ("swa",),
    "dsv4": ("swa", "csa state", "hca state", "lid state"),
}
VERSIONS = (9, 10, 11)
CHAT = (*text(5, 0, 1), *text(3, 0, start=5), *text(2, 1, start=5), *text(4, 2))
"""Two sequences that share a beginning, and one of its own."""
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "empty": {"cells": ()},
    "shared": {"cells": CHAT},
    "split": {"cells": CHAT, "split": 4},
    "K only": {"k_only": True},
    "M-RoPE": {"ext": True, "cells": CHAT},
    "V transposed": {"v_trans": True, "cells": CHAT},
    "quantized": {"type_k": Q8_0, "row_k": 68, "type_v": Q8_0, "row_v": 34, "rotation": (128, 64)},
    "f32": {"type_k": F32, "type_v": F32, "v_trans": True},
    "windowed": {"cells": CHAT, "window": 2},
    "no rows": {"row_s": 0, "row_r": 0, "row_v": 0},
    "equal rows": {"row_s": 24, "row_r": 24},
    "n-grams": {"ple": True, "ngrams": (1,), "cells": CHAT},
}
PAIRS = [
    (module, form)
    for module in CACHES
    for form in FORMS
    if form != "n-grams" or module == "hybrid-idx"  # of the others there is no such model
]


def traits_of(state: State) -> Traits:
    return Traits(
        state.arch,
        state.module,  # type: ignore[arg-type]
        k_only=state.k_only,
        ext=state.ext,
        ple=state.ple,
        window=state.window and Window("standard", state.window),  # type: ignore[arg-type]
    )


def parse(state: State, **options: Any) -> Layout:
    options = {"version": state.version, "traits": traits_of(state), **options}
    if state.seq is None:
        return parse_whole(state.blob(), **options)
    return parse_sequence(state.blob(), partial=state.partial, **options)


def make_state(module: str, form: str, version: int = 11) -> State:
    state = State(module, version=version, **FORMS[form])
    return replace(state, split=state.split or 3) if module == "dsv4" else state


def names(layout: Layout) -> tuple[str, ...]:
    return tuple(cache.name for cache in layout.caches)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("module", "form"), PAIRS)
class TestEveryForm:
    """Of every kind of memory, in every version."""

    def test_whole(self, module: str, form: str, version: int) -> None:
        """A whole state is one reading of all its bytes."""
        state = make_state(module, form, version)
        layout = parse(state)
        assert names(layout) == CACHES[module]
        assert (layout.kind, layout.arch, layout.source) == ("whole", "made-up", None)
        assert layout.nbytes == len(state.blob())
        assert layout.alternatives == ()
        ends = [cache.offset + cache.nbytes for cache in layout.caches]
        assert ends[-1:] in ([], [layout.nbytes])
        owned = {i for _, ids in state.cells for i in ids} if module != "none" else set()
        assert set(layout.sequences) == owned
        assert set(layout.spans) == owned

    def test_sequence(self, module: str, form: str, version: int) -> None:
        """So is the state of a sequence, with its head and without."""
        for seq in (0, 1):
            state = make_state(module, form, version).only(seq)
            layout = parse(state)
            assert (names(layout), layout.source, layout.kind) == (CACHES[module], seq, "sequence")
            bare = parse_sequence(
                state.payload(), version=version, headed=False, traits=traits_of(state)
            )
            assert bare.geometry == layout.geometry
            assert list(bare.spans.values()) == list(layout.spans.values())
            assert bare.source in (seq, None)

    def test_partial(self, module: str, form: str, version: int) -> None:
        """A partial state has the parts that llama.cpp keeps in it."""
        state = replace(make_state(module, form, version).only(0), partial=True)
        layout = parse(state)
        assert names(layout) == IN_PARTIAL.get(module, CACHES[module])

    def test_without_traits(self, module: str, form: str, version: int) -> None:
        """What reads with the right traits reads without any, if not always in one way."""
        state = make_state(module, form, version)
        for one in (state, state.only(0)):
            known, layout = parse(one), parse(one, traits=None)
            readings = (layout.traits, *layout.alternatives)
            same = [parse(one, traits=traits).caches == known.caches for traits in readings]
            assert any(same)


def test_worked_example() -> None:
    """The state of a tiny llama, byte by byte."""
    blob = bytes.fromhex(
        "05000000 6c6c616d61 01000000 02000000"
        "00000000 01000000 00000000 01000000 01000000 00000000"
        "00000000 02000000 00000000 00000000"
    )
    blob += (bytes.fromhex("01000000 4000000000000000") + bytes(128)) * 4
    layout = parse_whole(blob, version=11)
    assert (len(blob), layout.module, layout.arch) == (617, "kv", "llama")
    assert layout.spans == {0: (0, 1)}
    assert layout.cells_needed == {"kv": (2,)}
    (cache,) = layout.caches
    assert isinstance(cache, KVCache)
    (stream,) = cache.streams
    assert (cache.offset, stream.offset, stream.tail) == (9, 13, 41)
    assert list(stream.cells.starts) == [17, 29]
    assert (stream.v_trans, stream.n_layer, stream.n_rot_k, stream.n_rot_v) == (False, 2, 0, 0)
    assert [(b.type_id, b.row, b.offset, b.nbytes) for b in (*stream.k, *stream.v)] == [
        (1, 64, offset, 128) for offset in (69, 209, 349, 489)
    ]
    sequence = struct.pack("<Ii", 0xAF143CD8, 0) + blob[9:]
    assert len(sequence) == 616
    assert parse_sequence(sequence, version=11).spans == {0: (0, 1)}


def test_spans_are_those_of_the_cache_that_answers() -> None:
    """Windows shorten what a sequence reports; recurrent memory has one position only."""
    cells = text(10, 0)
    for module, span in (
        ("kv", (0, 9)),
        ("iswa", (6, 9)),
        ("recurrent", (9, 9)),
        ("hybrid", (9, 9)),
        ("hybrid-iswa", (9, 9)),
        ("hybrid-idx", (9, 9)),
        ("dsa", (0, 9)),
        ("dsa-iswa", (6, 9)),
        ("msa", (0, 9)),
        ("dsv4", (9, 9)),
    ):
        layout = parse(State(module, cells=cells, window=4, split=int(module == "dsv4")))
        assert layout.spans == {0: span}
        assert layout.base_spans == {0: (9, 9) if module == "recurrent" else (0, 9)}


def test_cells_in_any_order_with_gaps() -> None:
    """After a ring was reused, positions are in any order."""
    layout = parse(State("kv", cells=((7, (0,)), (3, (0,)), (9, (1,)), (5, (0, 1)))))
    (cells,) = layout.caches[0].cells
    assert list(cells.positions) == [7, 3, 9, 5]
    assert layout.spans == {0: (3, 7), 1: (5, 9)}
    assert list(cells.positions_of(1)) == [9, 5]
    assert cells.positions_of(2) == []


def test_cells_needed() -> None:
    """Capacity is given for each stream; for deepseek4's compressed caches in rows."""
    assert parse(State("kv", cells=CHAT, split=4)).cells_needed == {"kv": (8, 7, 4, 0)}
    assert parse(State("hybrid", cells=CHAT)).cells_needed == {"attn": (14,), "recurrent": (3,)}
    needed = parse(State("dsv4", cells=CHAT, split=3)).cells_needed
    assert (needed["csa"], needed["csa state"]) == ((8, 8, 8), ())


def test_recurrent_blocks() -> None:
    """The number of recurrent layers, which is nowhere written, is found."""
    state = State("hybrid-idx", ple=True, ngrams=(0, 2), n_recurrent=4)
    recurrent = parse(state).caches[1]
    assert isinstance(recurrent, RecurrentCache)
    assert [len(blocks) for blocks in (recurrent.r, recurrent.p, recurrent.s)] == [4, 2, 4]
    assert recurrent.n_layer == 6
    assert names(parse(replace(state, indexer=False))) == ("attn", "recurrent")


def test_a_recurrent_payload_without_head_names_nobody() -> None:
    """Only in a recurrent payload is there no sequence id at all."""
    state = State("recurrent").only(0)
    layout = parse_sequence(state.payload(), version=11, headed=False, traits=traits_of(state))
    assert (layout.source, layout.spans) == (None, {UNKNOWN_ID: (2, 2)})


def test_any_contiguous_buffer_at_any_address() -> None:
    """Buffers need not be bytes nor aligned, and nothing keeps them."""
    state = State("kv")
    buffer = bytearray(b"x" + state.blob())
    layout = parse_whole(memoryview(buffer)[1:], version=11, traits=traits_of(state))
    assert layout == parse(state)
    buffer.clear()
    with pytest.raises(TypeError):
        parse_whole(memoryview(bytes(64))[::2], version=11)


def test_traits_of_another_architecture_do_not_hide_what_a_state_is() -> None:
    """A state that names its architecture is described even where another was expected."""
    blob = State("recurrent", arch="mamba").blob()
    layout = parse_whole(blob, version=11, traits=Traits("llama", "kv"))
    assert (layout.arch, layout.module) == ("mamba", "recurrent")


def test_ambiguous_bytes_say_so() -> None:
    """Two equal caches are iswa or msa: without traits both are named."""
    layout = parse(State("iswa", seq=0), traits=None)
    assert layout.module == "iswa"
    assert "msa" in {traits.module for traits in layout.alternatives}


def test_versions() -> None:
    """A version that is not known is not guessed at."""
    for version in (0, 8, 12):
        with pytest.raises(UnsupportedError, match=f"version {version}"):
            parse_whole(b"", version=version)
        with pytest.raises(UnsupportedError, match=f"version {version}"):
            parse_sequence(b"", version=version)


def test_has_sequence_head() -> None:
    """The head is known by its magic number."""
    state = State("kv", seq=0)
    assert has_sequence_head(state.blob())
    assert not has_sequence_head(state.payload())
    assert not has_sequence_head(b"")


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**31 - 2),
            st.sets(st.integers(0, 255), min_size=1, max_size=4).map(
                lambda ids: tuple(sorted(ids))
            ),
        ),
        max_size=30,
    ),
    st.booleans(),
)
def test_any_cells(cells: list[Cell], ext: bool) -> None:
    """Whatever the positions and owners are, each sequence gets its own."""
    state = State("kv", cells=tuple(cells), ext=ext, n_layer=1)
    layout = parse(state)
    (found,) = layout.caches[0].cells
    own: dict[int, list[int]] = {}
    for pos, ids in cells:
        for i in ids:
            own.setdefault(i, []).append(pos)
    assert {i: list(found.positions_of(i)) for i in layout.sequences} == own
    assert layout.spans == {i: (min(each), max(each)) for i, each in own.items()}
    if ext:
        words = [struct.unpack_from("<3i", state.blob(), start + 8) for start in found.starts]
        assert words == [(pos, pos, 77) for pos, _ in cells]


def test_no_layers() -> None:
    """A cache may list cells and store no layer of them."""
    layout = parse(State("iswa", n_layer=0))
    assert layout.spans == {0: (0, 2)}
    assert [cache.n_layer for cache in layout.geometry.caches] == [0, 0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("module", ["kv", "dsa", "msa"])
def test_a_head_alone(module: str, version: int) -> None:
    """Newer builds leave all out of a partial state that can be cut back; of a full one nothing."""
    head = State(module, version=version, seq=3).blob()[:8]
    traits = traits_of(State(module))
    layout = parse_sequence(head, version=version, traits=traits, partial=True)
    assert (layout.source, layout.caches, layout.spans, layout.nbytes) == (3, (), {}, 8)
    with pytest.raises(TruncatedError):
        parse_sequence(head, version=version, traits=traits)


@pytest.mark.parametrize("module", sorted(CACHES.keys() - {"kv", "dsa", "msa", "none"}))
def test_no_head_alone(module: str) -> None:
    """Something of a window, or a recurrent part, is in every partial state."""
    with pytest.raises(FormatError):
        parse_sequence(
            State(module, seq=3).blob()[:8],
            version=11,
            traits=traits_of(State(module)),
            partial=True,
        )


def test_a_head_alone_of_an_unknown_model() -> None:
    """It is taken for that of a model without memory, of which it is the whole state."""
    head = State("kv", seq=3).blob()[:8]
    for partial in (False, True):
        assert parse_sequence(head, version=11, partial=partial).module == "none"
