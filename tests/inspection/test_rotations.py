"""Rows that llama.cpp rotated before it stored them, compared with others by their values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import quantize

from llama_state import Library, Model, StateFile, inspect_file
from llama_state.inspection import report, rotations
from llama_state.inspection.diff import Comparison, compare
from llama_state.inspection.magnitudes import magnitudes
from llama_state.inspection.rows import layers
from tests.layout.blobs import F16, Q8_0, State, text
from tests.layout.statefiles import native, write

Floats = npt.NDArray[np.float32]

N_CELL, N_VALUE = 80, 128
HALF = State("kv", cells=text(N_CELL), arch="llama", row_k=2 * N_VALUE, row_v=2 * N_VALUE)
EIGHT = replace(HALF, type_k=Q8_0, type_v=Q8_0, row_k=N_VALUE // 32 * 34, row_v=N_VALUE // 32 * 34)
KIND = {F16: gguf.GGMLQuantizationType.F16, Q8_0: gguf.GGMLQuantizationType.Q8_0}
VALUES = np.random.default_rng(5).normal(size=(N_CELL, N_VALUE)).astype(np.float32)
# By this much q8_0 differs from f16, and unlike rows from each other.
CLOSE, UNLIKE = 0.02, 1.3
# The same rows but for one value, which differs by this; rotated, it would be spread over many.
STEP = 3.0
STEPPED = VALUES.copy()
STEPPED[70, 5] += STEP


def hadamard(size: int) -> Floats:
    """The matrix, by its definition."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix).astype(np.float32)
    return matrix / np.float32(size**0.5)


def rotated(rows: Floats, size: int) -> Floats:
    if not size:
        return rows
    return (rows.reshape(-1, size) @ hadamard(size)).reshape(rows.shape)


def holding(
    folder: Path, state: State, rows: Floats = VALUES, done: tuple[int, int] | None = None
) -> StateFile:
    """A file of a state whose layers all hold *rows*, rotated as it says, or as was *done*."""
    data = bytearray(native(state))
    found = inspect_file(write(folder, bytes(data), "empty"))
    assert found.layout is not None
    sizes = dict(zip("KV", state.rotation if done is None else done, strict=True))
    for layer in layers(found.layout.caches[0]):
        (tensor,) = layer.streams
        assert tensor is not None
        stored = quantize(rotated(rows, sizes[layer.name]), KIND[tensor.type_id])
        at = found.state_offset + tensor.offset
        data[at : at + tensor.n_row * tensor.row] = stored.tobytes()
    name = f"{state.version}-{state.type_k}-{state.rotation}-{done}"
    return inspect_file(write(folder, bytes(data), name))


def figures(found: Comparison, name: str, step: float = 0.0) -> tuple[float, int | None]:
    """The largest relative difference of the rows *name*, and the rotation that was undone.

    The largest difference of two values is *step*.
    """
    rows = [row for row in found.rows if row.name == name]
    assert all(row.n_row == N_CELL for row in rows)
    assert all(row.max_abs == pytest.approx(step, abs=0.1) for row in rows)
    (rotation,) = {row.rotation for row in rows}
    return max(row.relative or 0.0 for row in rows), rotation


@pytest.mark.parametrize("size", [2, 64, 128, 256, 512])
def test_the_transform(size: int) -> None:
    """It is the product with the Hadamard matrix of each group, and its own inverse."""
    rows = np.random.default_rng(1).normal(size=(5, 1024)).astype(np.float32)
    found = rotations.undone(rows, size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rotated(rows, size), atol=1e-5)
    np.testing.assert_allclose(rotations.undone(found, size), rows, atol=1e-5)
    assert rotations.undone(rows[:0], size).shape == (0, 1024)
    for none in (0, None):
        assert rotations.undone(rows, none) is rows


def test_recorded(tmp_path: Path) -> None:
    """What the state says is undone, in either order: then it shows what quantizing costs."""
    plain, quantized = (
        holding(tmp_path, state, rows)
        for state, rows in ((HALF, STEPPED), (replace(EIGHT, rotation=(128, 64)), VALUES))
    )
    for pair in ((plain, quantized), (quantized, plain)):
        found = compare(*pair)
        for name, size in (("K", 128), ("V", 64)):
            relative, rotation = figures(found, name, STEP)
            assert 0 < relative < 2 * CLOSE
            assert rotation == size
        fields = {field.name for field in found.fields}
        assert fields >= {"n_rot_k", "n_rot_v"}
        said = " ".join(report.text(found).split())
        assert "kv rotated in one of the two, which was undone: K by 128, V by 64" in said


@pytest.mark.parametrize("version", [9, 10])
def test_not_recorded(version: int, tmp_path: Path) -> None:
    """Before session version 11 no state says: the values of the two tell."""
    half, eight = (replace(state, version=version) for state in (HALF, EIGHT))
    plain = holding(tmp_path, half, STEPPED)
    for done in ((128, 64), (64, 0)):
        quantized = holding(tmp_path, eight, done=done)
        for pair in ((plain, quantized), (quantized, plain)):
            found = compare(*pair)
            for name, size in zip("KV", done, strict=True):
                relative, rotation = figures(found, name, STEP)
                assert 0 < relative < 2 * CLOSE
                assert rotation == (size or None)


def test_recorded_but_not_done(tmp_path: Path) -> None:
    """llama.cpp 11549 records a rotation of caches that some architectures do not rotate."""
    quantized = holding(tmp_path, replace(EIGHT, rotation=(64, 64)), done=(0, 0))
    found = compare(holding(tmp_path, HALF), quantized)
    for name in "KV":
        relative, rotation = figures(found, name)
        assert 0 < relative < CLOSE
        assert rotation is None
    assert "rotated" not in report.text(found)


def test_rotated_alike(tmp_path: Path) -> None:
    """Rows of two types that were both rotated are compared, too; the same bytes are equal."""
    both = (64, 64)
    a = holding(tmp_path, replace(HALF, rotation=both), STEPPED)
    b = holding(tmp_path, replace(EIGHT, rotation=both))
    relative, rotation = figures(compare(a, b), "K", STEP)
    assert 0 < relative < 2 * CLOSE
    assert rotation is None
    assert compare(b, b).equal


@pytest.mark.parametrize("done", [(0, 0), (128, 64)])
def test_versions(done: tuple[int, int], tmp_path: Path) -> None:
    """The same rows are equal where only one of the two states says how they are rotated."""
    says = holding(tmp_path, replace(EIGHT, rotation=done))
    mute = holding(tmp_path, replace(EIGHT, version=10), done=done)
    found = compare(says, mute)
    assert found.rows
    assert {(row.n_row, row.n_differ, row.rotation) for row in found.rows} == {(N_CELL, 0, None)}


def test_rows_that_tell_nothing(tmp_path: Path) -> None:
    """Zeros, infinities and other texts do not hide the rotation of the rest."""
    first, other = VALUES.copy(), VALUES.copy()
    first[:70] = 0.0
    first[70] = np.inf
    other[:70] = 0.0
    other[75:] = -VALUES[:5]
    plain = holding(tmp_path, HALF, first)
    found = compare(plain, holding(tmp_path, replace(EIGHT, rotation=(128, 64)), other))
    assert {(row.name, row.rotation) for row in found.rows} == {("K", 128), ("V", 64)}


def test_nothing_in_common(tmp_path: Path) -> None:
    """Rows of other texts are compared by what the states say, and are as unlike as they are."""
    other = VALUES[::-1].copy()
    other[3, 5] = 50.0
    quantized = holding(tmp_path, replace(EIGHT, rotation=(128, 64)), other)
    found = compare(holding(tmp_path, HALF), quantized)
    for name in "KV":
        relative, rotation = figures(found, name, 50.0 - float(VALUES[3, 5]))
        assert relative > UNLIKE
        assert rotation is None


def test_no_such_groups(tmp_path: Path) -> None:
    """A rotation that rows of this length cannot have: compared only with rows of the same."""
    odd = replace(HALF, rotation=(256, 0))
    same = holding(tmp_path, odd, done=(0, 0))
    assert {row.name for row in compare(holding(tmp_path, HALF), same).rows} == {"V"}
    found = compare(same, same)
    assert {(row.name, row.n_row, row.n_differ) for row in found.rows} == {
        ("K", N_CELL, 0),
        ("V", N_CELL, 0),
    }


def test_magnitudes(tmp_path: Path) -> None:
    """A rotation leaves the norm of each row as it is: a picture shows the same."""
    plain, turned = (holding(tmp_path, replace(EIGHT, rotation=r)) for r in ((0, 0), (128, 64)))
    for one, other in zip(
        *(magnitudes(file.state, file.layout.caches[0]) for file in (plain, turned)),  # type: ignore[union-attr]
        strict=True,
    ):
        np.testing.assert_allclose(one.rms, other.rms, rtol=0.01)


@pytest.mark.libllama
def test_caches_of_llama_cpp(model: Model, library: Library, tmp_path: Path) -> None:
    """Of each kind of memory and build: f16 against q8_0 shows what quantizing costs."""
    files = []
    for kind in ("f16", "q8_0"):
        options = {"type_k": kind, "type_v": kind, "flash_attn": True, "n_threads": 1}
        with model.context(n_ctx=256, n_seq_max=2, **options) as ctx:  # type: ignore[arg-type]
            ctx.decode(range(3, 43))
            ctx.decode(range(40, 70), 1)
            ctx.save_state(tmp_path / kind, durable=False)
        files.append(inspect_file(tmp_path / kind))
    found = compare(*files)
    quantized = {
        (cache.name, layer.name, layer.index)
        for cache in files[1].layout.caches  # type: ignore[union-attr]
        for layer in layers(cache)
        if any(tensor and tensor.type.name == "q8_0" for tensor in layer.streams)
    }
    compared = {(row.cache, row.name, row.layer) for row in found.rows if row.n_row}
    assert quantized <= compared
    assert bool(quantized) == (model.arch != "mamba2")
    for row in found.rows:
        assert row.relative is not None
        assert row.relative < 0.1, (library.path, row)
