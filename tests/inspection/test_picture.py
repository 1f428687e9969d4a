"""Pictures of states: whole files, of every kind of memory, the same each time."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from math import nan
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from llama_state import Library, Model, inspect_file
from llama_state.errors import FormatError, UnsupportedError
from llama_state.inspection import values
from llama_state.inspection.layer_numbers import layer_numbers
from llama_state.inspection.magnitudes import (
    BUCKETS,
    MOST_ROWS,
    Magnitudes,
    magnitudes,
    shades,
)
from llama_state.inspection.picture import render
from llama_state.layout import KVCache
from llama_state.testing import write_model
from tests.inspection.test_diff import KINDS, PLAIN, filled, opened
from tests.layout.blobs import F32, Q8_0, State, text
from tests.layout.statefiles import native, write

MANY = tuple((pos, (seq,)) for seq in range(40) for pos in range(0, 9, 2))


def check_png(image: bytes) -> tuple[int, int]:
    """Read its chunks to the end; width and height in pixels."""
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    at, names = 8, []
    while at < len(image):
        (length,) = struct.unpack_from(">I", image, at)
        body = image[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == struct.unpack_from(">I", image, at + 8 + length)[0]
        names.append(body[:4])
        at += 12 + length
    assert (names[0], names[-1]) == (b"IHDR", b"IEND")
    width, height = struct.unpack_from(">II", image, 16)
    return width, height


def texts_of(image: bytes) -> str:
    """Return an SVG, in which matplotlib writes each text as a comment above its outlines."""
    ElementTree.fromstring(image)  # noqa: S314 - we wrote it
    return image.decode()


@pytest.mark.parametrize("state", KINDS)
def test_every_kind(state: State, tmp_path: Path) -> None:
    """Both formats, and the same bytes when it is drawn again."""
    found = opened(tmp_path, native(state))
    image = render(found, ".png")
    width, height = check_png(image)
    assert width > 600
    assert height > 300
    drawn = render(found, ".svg")
    assert drawn == render(found, ".svg")
    names = texts_of(drawn)
    assert found.layout is not None
    for cache in found.layout.caches:
        if any(map(len, cache.cells)):
            assert f"<!-- {cache.name}: " in names
        for heat in magnitudes(found.state, cache):
            assert f"<!-- {cache.name} {heat.name}" in names


def test_what_is_said(tmp_path: Path) -> None:
    """Title, counts, holes and the sequences."""
    cells = (*text(5, 0, 1), *text(3, 0, start=9))
    names = texts_of(render(opened(tmp_path, native(State("kv", cells=cells))), ".svg"))
    for title in ("a: session file, made-up, kv", "kv: 8 cells", "positions (1 hole)"):
        assert title in names
    assert "sequence 0" in names
    assert "sequence 1" in names


def test_many_sequences_and_cells(tmp_path: Path) -> None:
    """More than can be named or drawn one by one."""
    names = texts_of(render(opened(tmp_path, native(State("kv", cells=MANY))), ".svg"))
    assert "and 24 more" in names
    long = State("kv", cells=text(20_000), row_k=4, row_v=4, n_layer=1)
    names = texts_of(render(opened(tmp_path, native(long)), ".svg"))
    assert "kv: 20,000 cells, a square is 2 of them" in names
    assert f"of at most {MOST_ROWS:,} rows a layer" in names


def test_nothing_to_draw(tmp_path: Path) -> None:
    """An empty state is a picture that says so."""
    for state in (State("kv", cells=()), State("none")):
        found = opened(tmp_path, native(state))
        check_png(render(found, ".png"))
        assert "the state is empty" in texts_of(render(found, ".svg"))


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other formats, damaged states, packages that are not there."""
    found = opened(tmp_path, native(PLAIN))
    for suffix in (".jpg", ""):
        with pytest.raises(UnsupportedError, match=r"\.png or \.svg"):
            render(found, suffix)
    with pytest.raises(FormatError):
        render(inspect_file(write(tmp_path, native(PLAIN)[:-1])), ".png")
    monkeypatch.setattr(values, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"matplotlib and numpy: pip install .*\[plot\]"):
        render(found, ".png")


def test_magnitudes(tmp_path: Path) -> None:
    """The root mean square of each layer and bucket of positions; no number without rows."""
    cells = (*text(4), *text(2, 0, start=6))
    state = State("kv", cells=cells, type_k=F32, row_k=64, n_layer=2, arch="llama")
    found = opened(tmp_path, filled(tmp_path, state, -3.0))
    assert found.layout is not None
    k, v = magnitudes(found.state, found.layout.caches[0])
    assert (k.name, v.name, k.axis, k.layers) == ("K", "V", "position", (0, 1))
    row = [3.0, 3.0, 3.0, 3.0, nan, nan, 3.0, 3.0]
    np.testing.assert_array_equal(k.rms, [row, row])
    np.testing.assert_array_equal(k.edges, np.arange(9))


def test_magnitudes_of_quantized_rows_need_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain rows do not."""
    find = values.find_spec
    monkeypatch.setattr(values, "find_spec", lambda name: None if name == "gguf" else find(name))
    plain = opened(tmp_path, native(PLAIN))
    quantized = opened(tmp_path, native(State("kv", type_k=Q8_0, row_k=68, arch="llama")))
    for found in (plain, quantized):
        assert found.layout is not None
        assert isinstance(found.layout.caches[0], KVCache)
    assert magnitudes(plain.state, plain.layout.caches[0])  # type: ignore[union-attr]
    with pytest.raises(UnsupportedError, match="gguf"):
        magnitudes(quantized.state, quantized.layout.caches[0])  # type: ignore[union-attr]


def test_magnitudes_of_many_rows_are_sampled(tmp_path: Path) -> None:
    """Few rows stand for many, at both ends and between."""
    state = State("kv", cells=text(5000), row_k=4, row_v=4, type_k=F32, n_layer=1, arch="llama")
    found = opened(tmp_path, filled(tmp_path, state, 2.0))
    assert found.layout is not None
    k, _ = magnitudes(found.state, found.layout.caches[0])
    np.testing.assert_array_equal(k.rms, np.full((1, BUCKETS), 2.0))


def test_every_layer_has_colours_of_its_own() -> None:
    """A loud layer takes no colours from quiet ones, and what is far outside is said to be so."""
    random = np.random.default_rng(1)
    rms = random.uniform(0.9, 1.1, (12, BUCKETS)) * np.array([100.0, *[1.0] * 11])[:, None]
    rms[3, 0], rms[4, 0], rms[5, 1] = 0.01, 50.0, nan
    heat = Magnitudes("V", tuple(range(12)), rms, np.arange(BUCKETS + 1.0), "position")
    found = shades(heat)
    common = (rms - np.nanmin(rms)) / np.nanmax(rms)
    assert np.nanstd(common[1:], axis=1).min() < 0.01  # on a common scale nothing is seen
    usual = found[:, 2:]
    assert np.nanstd(usual, axis=1).min() > 0.2
    assert usual.min() >= -1e-9
    assert usual.max() <= 1 + 1e-9
    assert found[3, 0] < -1
    assert found[4, 0] > 2
    assert np.isnan(found[5, 1])
    even = Magnitudes("V", (0, 1), np.array([[2.0] * 9, [0.0] * 9]), np.arange(10.0), "position")
    np.testing.assert_array_equal(shades(even), np.full((2, 9), 0.5))


def test_the_first_position_is_alone(tmp_path: Path) -> None:
    """An attention sink is not one of thirty in a bucket."""
    state = State("kv", cells=text(2000), row_k=4, row_v=4, type_k=F32, n_layer=1, arch="llama")
    found = opened(tmp_path, native(state))
    assert found.layout is not None
    k, _ = magnitudes(found.state, found.layout.caches[0])
    assert k.rms.shape == (1, BUCKETS)
    assert k.edges[:2].tolist() == [0, 1]
    assert k.edges[-1] == 2000
    assert "the first column is the first position alone" in texts_of(render(found, ".svg"))


def _layers_of(state: State, tmp_path: Path) -> dict[str, tuple[int, ...]]:
    found = opened(tmp_path, native(state))
    assert found.layout is not None
    return layer_numbers(found.layout)


def test_layer_numbers(tmp_path: Path) -> None:
    """Of the model; none where the caches have other layers than the architecture makes."""
    assert _layers_of(State("kv", n_layer=3, arch="llama"), tmp_path) == {"kv": (0, 1, 2)}
    gemma2 = State("iswa", cells=text(3), n_layer=2, arch="gemma2")
    assert _layers_of(gemma2, tmp_path) == {"base": (1, 3), "swa": (0, 2)}
    assert _layers_of(replace(gemma2, arch="gemma3"), tmp_path) == {}
    drawn = texts_of(render(opened(tmp_path, native(gemma2)), ".svg"))
    assert "<!-- layer -->" in drawn
    assert "<!-- 3 -->" in drawn
    other = texts_of(render(opened(tmp_path, native(replace(gemma2, arch="gemma3"))), ".svg"))
    assert "<!-- layer of the cache -->" in other


@pytest.mark.libllama
def test_layer_numbers_of_gemma3(library: Library, tmp_path: Path) -> None:
    """libllama puts as many layers into each cache as the table says."""
    pattern = {"block_count": 7, "attention.sliding_window_pattern": 6}  # as of the real ones
    path = write_model(tmp_path / "m.gguf", "gemma3-dense", overrides=pattern)
    with Model(path, library) as model, model.context(n_ctx=64, n_threads=1) as ctx:
        ctx.decode([1, 2, 3])
        ctx.save_state(tmp_path / "s", durable=False)
    found = inspect_file(tmp_path / "s")
    assert found.layout is not None
    assert layer_numbers(found.layout) == {"base": (5,), "swa": (0, 1, 2, 3, 4, 6)}
