"""How two states differ: by fields, positions and rows, whatever cells the rows are in."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from math import isnan, sqrt
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import quantize

from llama_state import StateFile, inspect_file
from llama_state.errors import FormatError
from llama_state.inspection import report, values
from llama_state.inspection.diff import Comparison, compare
from llama_state.inspection.rows import Tensor, layers, row_bytes
from llama_state.layout import TYPES
from tests.inspection.test_summary import check_text
from tests.layout.blobs import F16, F32, Q8_0, State, text
from tests.layout.slots import image, packed
from tests.layout.statefiles import native, slot, write
from tests.layout.test_parse import CHAT

KINDS = [
    pytest.param(state, id=name)
    for name, state in {
        "shared": State("kv", cells=CHAT, arch="llama"),
        "split": State("kv", cells=CHAT, split=3, arch="llama"),
        "transposed": State("kv", cells=CHAT, v_trans=True, arch="llama"),
        "quantized": State("kv", type_k=Q8_0, row_k=68, type_v=Q8_0, row_v=34, arch="llama"),
        "windows": State("iswa", cells=CHAT, window=2, arch="gemma3"),
        "recurrent": State("recurrent", cells=text(4) + text(3, 1), arch="mamba2"),
        "hybrid": State("hybrid", cells=text(4) + text(3, 1), arch="jamba"),
        "M-RoPE": State("kv", ext=True, cells=CHAT, arch="qwen2vl"),
        "compressed": State("dsv4", cells=CHAT, arch="deepseek4"),
        "one sequence": State("kv", cells=text(9, 3), seq=3),
    }.items()
]
PLAIN = State("kv", cells=text(6) + text(4, 1), arch="llama", type_k=F32, type_v=F16)


def opened(folder: Path, data: bytes, name: str = "a") -> StateFile:
    return inspect_file(write(folder, data, name))


def compared(folder: Path, a: bytes, b: bytes) -> Comparison:
    """Compare two files; what is found can be shown."""
    found = compare(opened(folder, a, "a"), opened(folder, b, "b"))
    json.dumps(report.as_dict(found), allow_nan=False)
    check_text(report.text(found))
    return found


def tensor_of(found: StateFile, name: str, layer: int, stream: int = 0) -> Tensor:
    assert found.layout is not None
    for cache in found.layout.caches:
        for one in layers(cache):
            if (one.name, one.index) == (name, layer) and one.streams[stream] is not None:
                return one.streams[stream]  # type: ignore[return-value]
    raise AssertionError(f"no {name} in layer {layer}")


def filled(folder: Path, state: State, value: float) -> bytes:
    """Build a file of a state in which every value is *value*."""
    data = bytearray(native(state))
    found = opened(folder, bytes(data), "filled")
    assert found.layout is not None
    for cache in found.layout.caches:
        for layer in layers(cache):
            for tensor in filter(None, layer.streams):
                kind = "<f4" if tensor.type.name == "f32" else "<f2"
                size = tensor.n_row * tensor.row
                at = found.state_offset + tensor.offset
                data[at : at + size] = np.full(size // np.dtype(kind).itemsize, value, kind).data
    return bytes(data)


@pytest.mark.parametrize("state", KINDS)
def test_equal(state: State, tmp_path: Path) -> None:
    """A state and itself."""
    found = compared(tmp_path, native(state, [1]), native(state, [1]))
    assert found.equal
    assert found.rows
    assert (found.fields, found.positions, found.moved) == ((), (), 0)
    assert all(row.n_differ == 0 for row in found.rows)


@pytest.mark.parametrize("state", KINDS)
def test_one_byte(state: State, tmp_path: Path) -> None:
    """A change of the last byte, which is in a tensor, is one row of one layer."""
    data = native(state)
    changed = data[:-1] + bytes([data[-1] ^ 1])
    found = compared(tmp_path, data, changed)
    assert not found.equal
    assert (found.fields, found.positions) == ((), ())
    differing = [row for row in found.rows if row.n_differ]
    assert len(differing) == 1
    assert differing[0].n_differ == 1


def test_cells_in_another_order(tmp_path: Path) -> None:
    """The same rows in other cells are the same state."""
    state = State("kv", cells=CHAT, arch="llama")
    other = replace(state, cells=tuple(reversed(CHAT)))
    found = compared(tmp_path, native(state), native(other))
    assert found.equal
    assert found.moved == len(CHAT)
    assert all(row.n_row == len(CHAT) for row in found.rows)
    assert "14 rows are in other cells, which is not a difference" in report.text(found)


def test_streams_and_cells(tmp_path: Path) -> None:
    """A context that shares cells and one that is split hold the same rows."""
    cells = text(5, 0) + text(3, 1)
    unified, split = State("kv", cells=cells, arch="llama"), State("kv", cells=cells, split=2)
    found = compared(tmp_path, native(unified), native(replace(split, arch="llama")))
    assert [difference.name for difference in found.fields] == ["n_stream"]
    assert [(row.n_row, row.n_differ) for row in found.rows] == [(8, 0)] * 4


def test_transposed_and_not(tmp_path: Path) -> None:
    """V that is stored in another order has the same rows."""
    flash = State("kv", cells=CHAT, arch="llama")
    found = compared(tmp_path, native(flash), native(replace(flash, v_trans=True)))
    assert [difference.name for difference in found.fields] == ["flash attention"]
    assert {(row.name, row.n_row, row.n_differ) for row in found.rows} == {
        ("K", len(CHAT), 0),
        ("V", len(CHAT), 0),
    }


def test_by_how_much(tmp_path: Path) -> None:
    """The largest difference, and its norm over that of the first state's values."""
    data = bytearray(filled(tmp_path, PLAIN, 2.0))
    a = opened(tmp_path, bytes(data))
    tensor = tensor_of(a, "K", 1)
    at = a.state_offset + tensor.offset + 3 * tensor.row
    data[at : at + 8] = np.array([2.5, -1.0], "<f4").tobytes()
    found = compared(tmp_path, filled(tmp_path, PLAIN, 2.0), bytes(data))
    (row,) = [row for row in found.rows if row.n_differ]
    assert (row.cache, row.name, row.layer, row.n_row, row.n_differ) == ("kv", "K", 1, 10, 1)
    assert row.max_abs == 3.0
    assert row.relative == pytest.approx(sqrt((0.25 + 9.0) / (4.0 * tensor.n_value)))
    assert found.computed
    assert "1.4" in report.text(found) or "0.3" in report.text(found)


def test_other_types(tmp_path: Path) -> None:
    """Rows of other types are compared by value: what quantizing costs can be seen."""
    half = State("kv", cells=text(3), arch="llama", row_k=128, row_v=64)
    eight = replace(half, type_k=Q8_0, row_k=68)
    data = {}
    for state in (half, eight):
        raw = bytearray(filled(tmp_path, replace(half, n_layer=2), 0.0) if state is half else b"")
        if state is eight:
            raw = bytearray(native(eight))
        found = opened(tmp_path, bytes(raw))
        for layer in (0, 1):
            tensor = tensor_of(found, "K", layer)
            numbers = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)
            kind = gguf.GGMLQuantizationType(tensor.type_id)
            at = found.state_offset + tensor.offset
            stored = quantize(numbers, kind).tobytes()
            raw[at : at + len(stored)] = stored
        data[state.type_k] = bytes(raw)
    result = compared(tmp_path, data[F16], data[Q8_0])
    assert "type_k" in [difference.name for difference in result.fields]
    for row in result.rows:
        if row.name == "K":
            assert (row.n_row, row.n_differ) == (3, 3)
            assert row.max_abs is not None
            assert 0 < row.max_abs < 0.01


def test_no_numbers(tmp_path: Path) -> None:
    """Infinities and NaN are reported as such, also in JSON."""
    data = bytearray(filled(tmp_path, PLAIN, 1.0))
    a = opened(tmp_path, bytes(data))
    for layer, value in ((0, np.inf), (1, np.nan)):
        at = a.state_offset + tensor_of(a, "K", layer).offset
        data[at : at + 4] = np.array([value], "<f4").tobytes()
    found = compared(tmp_path, filled(tmp_path, PLAIN, 1.0), bytes(data))
    infinite, none = (row for row in found.rows if row.n_differ)
    assert infinite.max_abs == np.inf
    assert none.max_abs is not None
    assert isnan(none.max_abs)
    reported = [row["max_abs"] for row in report.as_dict(found)["rows"] if row["n_differ"]]
    assert reported == ["inf", "nan"]


def test_zero_rows(tmp_path: Path) -> None:
    """Where the first state has zeros, the relative difference is infinite."""
    state = replace(PLAIN, n_layer=1)
    found = compared(tmp_path, filled(tmp_path, state, 0.0), filled(tmp_path, state, 1.0))
    assert {(row.max_abs, row.relative) for row in found.rows} == {(1.0, np.inf)}


def test_positions(tmp_path: Path) -> None:
    """What only one of the two has, by cache and sequence."""
    other = replace(PLAIN, cells=text(6)[:2] + text(6)[4:] + text(5, 1) + text(2, 2))
    found = compared(tmp_path, native(PLAIN), native(other))
    assert [(one.seq_id, one.only_a, one.only_b) for one in found.positions] == [
        (0, ((2, 3),), ()),
        (1, (), ((4, 4),)),
        (2, (), ((0, 1),)),
    ]
    assert {row.n_row for row in found.rows} == {8}


def test_sequences_of_other_ids(tmp_path: Path) -> None:
    """Two states of one sequence are compared whatever its id; that it differs is reported."""
    cells = tuple((pos, (0, 1)) for pos in range(5))
    a, b = (native(State("kv", cells=cells, seq=seq)) for seq in (0, 1))
    found = compared(tmp_path, a, b)
    assert [tuple(difference) for difference in found.fields] == [("sequence", 0, 1)]
    assert {(row.n_row, row.n_differ) for row in found.rows} == {(5, 0)}


def test_tokens_and_kinds(tmp_path: Path) -> None:
    """Token lists are compared where both have one; packed ones by what is in them."""
    state = State("kv", cells=text(4), seq=0)
    found = compared(tmp_path, native(state, [1, 2, 3]), native(state, [1, 2, 4, 5]))
    reported = [(f.name, f.saved, f.current) for f in found.fields]
    assert reported == [("tokens", "3 tokens, 2 in common", "4 tokens, 2 in common")]
    assert compared(tmp_path, native(state, [1, 2]), slot(state, packed([1, 2]))).equal
    assert compared(tmp_path, native(state, [1, 2]), state.blob()).equal
    whole = native(replace(state, seq=None, arch="llama"))
    fields = compared(tmp_path, whole, native(state)).fields
    assert [difference.name for difference in fields] == ["kind"]


def test_media(tmp_path: Path) -> None:
    """Two images that look alike in the token list are distinguished by their ids."""
    state = State("kv", cells=text(4), seq=0)
    a, b = (slot(state, packed([1, -1], {1: image(1, 1, name)})) for name in ("cat", "dog"))
    assert compared(tmp_path, a, a).equal
    (field,) = compared(tmp_path, a, b).fields
    assert tuple(field) == ("media", "image cat at 1", "image dog at 1")
    (one, other) = compared(tmp_path, native(state, [1, 2]), a).fields
    assert (one.name, other.name, other.saved) == ("tokens", "media", "none")


def test_a_cache_that_only_one_has(tmp_path: Path) -> None:
    """It is a difference, though there is nothing to compare it with."""
    state = State("hybrid-idx", ext=True, arch="qwen4exp")
    found = compared(tmp_path, native(state), native(replace(state, indexer=False)))
    assert [tuple(field) for field in found.fields] == [
        ("caches", "attn, recurrent, idx", "attn, recurrent")
    ]


def test_other_models(tmp_path: Path) -> None:
    """States that have nothing in common are said to have nothing in common."""
    recurrent = State("recurrent", arch="mamba2")
    found = compared(tmp_path, native(PLAIN), native(recurrent))
    assert [difference.name for difference in found.fields] == ["architecture"]
    assert (found.rows, found.equal) == ((), False)
    assert "no rows in common" in report.text(found)


def test_versions(tmp_path: Path) -> None:
    """The version of the format is a difference, the rows are not."""
    found = compared(tmp_path, native(replace(PLAIN, version=9)), native(PLAIN))
    assert [difference.name for difference in found.fields] == ["session version"]
    assert not any(row.n_differ for row in found.rows)


def test_damaged(tmp_path: Path) -> None:
    """A damaged state is compared with nothing."""
    data = native(PLAIN)
    with pytest.raises(FormatError):
        compare(opened(tmp_path, data), opened(tmp_path, data[:-1], "b"))


@pytest.mark.parametrize("missing", ["numpy", "gguf"])
@pytest.mark.parametrize("state", KINDS)
def test_without_packages(
    state: State, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them the same rows are counted; by how much they differ is not known."""
    data = native(state)
    changed = data[:-1] + bytes([data[-1] ^ 1])
    whole = compared(tmp_path, data, changed)
    find = values.find_spec
    monkeypatch.setattr(values, "find_spec", lambda name: None if name == missing else find(name))
    found = compared(tmp_path, data, changed)
    counts = [[(r.cache, r.name, r.n_row, r.n_differ) for r in c.rows] for c in (whole, found)]
    assert counts[0] == counts[1]
    if missing == "numpy":
        assert not found.computed
        assert "pip install -e '.[plot]'" in report.text(found)


@pytest.mark.parametrize("type_id", sorted(TYPES))
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_and_values(type_id: int, transposed: bool) -> None:
    """The bytes of a row are the same with numpy and without, its values those of gguf."""
    kind = TYPES[type_id]
    if transposed and kind.elements != 1:
        return
    row, n_row = 4 * kind.nbytes, 5
    numbers = np.linspace(-2, 2, n_row * 4 * kind.elements, dtype=np.float32).reshape(n_row, -1)
    if kind.name == "iq4_nl":  # gguf can only read it
        stored = np.random.default_rng(1).integers(0, 60, (n_row, row), np.uint8)
    else:
        stored = quantize(numbers, gguf.GGMLQuantizationType(type_id)).view(np.uint8)
        stored = stored.reshape(n_row, row)
    order = stored.reshape(n_row, -1, kind.nbytes).swapaxes(0, 1) if transposed else stored
    state = memoryview(b"before" + order.tobytes())
    tensor = Tensor(type_id, row, n_row, 6, transposed)
    picked = values.rows_of(state, tensor, [3, 1])
    assert [bytes(one) for one in picked] == [row_bytes(state, tensor, i) for i in (3, 1)]
    assert (picked == stored[[3, 1]]).all()
    found = values.decode(picked, tensor)
    assert found.dtype == np.float32
    assert found.shape == (2, tensor.n_value)
    if kind.name != "iq4_nl":
        assert np.abs(found - numbers[[3, 1]]).max() < 0.3


def test_pieces_are_small() -> None:
    """However large a tensor is, little of it is looked at together."""
    pieces = [*values.pieces(100_000, 4096)]
    assert pieces[0].start == 0
    assert pieces[-1].stop == 100_000
    assert all(a.stop == b.start for a, b in itertools.pairwise(pieces))
    assert max(piece.stop - piece.start for piece in pieces) * 4096 <= values.PIECE
    assert [*values.pieces(3, 10**9)] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert [*values.pieces(0, 16)] == []


def test_nothing_is_imported_before_it_is_needed() -> None:
    """numpy, gguf and matplotlib are imported by what uses them."""
    import subprocess

    code = (
        "import sys, llama_state.cli, llama_state.inspection.diff\n"
        "import llama_state.inspection.text, llama_state.inspection.picture\n"
        "assert not {'numpy', 'gguf', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
