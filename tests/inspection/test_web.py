"""Pages of states: complete, small, the same each time, and safe whatever the file says."""

from __future__ import annotations

import hashlib
import json
import os
import random
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_state import Checkpoint, Fingerprint, StateFile, inspect_file
from llama_state._io import markup
from llama_state.errors import Difference, UnsupportedError
from llama_state.inspection import compare, page_data, render_html, values, web
from llama_state.inspection.diff import Comparison
from llama_state.inspection.rows import layers, positions_by_sequence
from llama_state.inspection.web import require_suffix
from llama_state.layout import Cells
from llama_state.testing.report import Report, Row
from tests.inspection.pages import Page
from tests.inspection.test_diff import KINDS, PLAIN, filled, opened
from tests.layout.blobs import F32, Q8_0, State, text
from tests.layout.statefiles import native, write

MOST = 2 << 20
ATTACK = "</script></td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\x00"


def page_of(found: StateFile) -> Page:
    image = render_html(found)
    assert len(image) <= MOST
    assert image == render_html(found)
    return Page(image)


def cells_in(cache: object) -> Iterator[tuple[int, int, int, int, list[int]]]:
    """Yield the runs of a cache in the data of a page: stream, cell, cells, position, owners."""
    assert isinstance(cache, dict)
    for stream in cache["streams"]:
        assert stream["exact"]
        runs = stream["runs"]
        for i in range(0, len(runs), 5):
            cell, n, low, high, own = runs[i : i + 5]
            assert high - low == n - 1
            n_owner, *ids = cache["owners"][own]
            assert n_owner == len(ids)
            yield stream["index"], cell, n, low, ids


@pytest.mark.parametrize("state", KINDS)
def test_every_kind(state: State, tmp_path: Path) -> None:
    """The text of inspect, and in the data every cell, position, owner and layer."""
    found = opened(tmp_path, native(state, [1, 2, 3]))
    page = page_of(found)
    assert found.layout is not None
    assert str(found.path) in page.text
    assert found.layout.module in page.text
    caches = [cache for cache in found.layout.caches if any(map(len, cache.cells))]
    assert [cache["name"] for cache in page.data["cells"]] == [cache.name for cache in caches]
    for about, cache in zip(page.data["cells"], caches, strict=True):
        expected = {
            (index, cell, position): sorted(
                None if seq_id < 0 else seq_id
                for seq_id, own in cells.owners.items()
                if cell in own
            )
            for index, cells in enumerate(cache.cells)
            for cell, position in enumerate(cells.positions)
        }
        listed = {
            (index, cell + i, low + i): ids
            for index, cell, n, low, ids in cells_in(about)
            for i in range(n)
        }
        assert listed == expected
        held = positions_by_sequence(cache.cells)
        assert [one["cells"] for one in about["sequences"]] == [len(own) for own in held.values()]
        for one, positions in zip(about["sequences"], held.values(), strict=True):
            runs = zip(one["runs"][::2], one["runs"][1::2], strict=True)
            assert {p for first, last in runs for p in range(first, last + 1)} == set(positions)
    kinds = [kind for kind, _ in page.figures()]
    assert kinds.count("positions") == kinds.count("cells") == len(caches)
    assert kinds.count("heat") == len(page.data["heats"]) > 0
    for heat in page.data["heats"]:
        assert len(heat["rms"]) == len(heat["shade"]) == len(heat["layers"])
        assert {len(line) for line in heat["rms"]} == {len(heat["edges"]) - 1}


@pytest.mark.parametrize("state", KINDS)
def test_digests_of_tensors(state: State, tmp_path: Path) -> None:
    """Those of the bytes in the file; a changed bit shows."""
    data = native(state)
    found = opened(tmp_path, data)
    assert found.layout is not None
    assert found.state_offset is not None
    before = page_of(found).text
    for cache in found.layout.caches:
        for layer in layers(cache):
            digest, size = hashlib.sha256(), 0
            for part in filter(None, layer.streams):
                at, n = found.state_offset + part.offset, part.n_row * part.row
                digest.update(data[at : at + n])
                size += n
            if size:
                assert f"{cache.name} {layer.index} {layer.name}" in before
                assert digest.hexdigest()[:32] in before
    changed = bytearray(data)
    changed[-1] ^= 1
    assert page_of(opened(tmp_path, bytes(changed))).text != before


def test_magnitudes(tmp_path: Path) -> None:
    """The numbers of the plot; holes are without."""
    state = State("kv", cells=(*text(4), *text(2, 0, start=6)), type_k=F32, row_k=64, arch="llama")
    k, _ = page_of(opened(tmp_path, filled(tmp_path, state, -3.0))).data["heats"]
    row = [3.0, 3.0, 3.0, 3.0, None, None, 3.0, 3.0]
    assert (k["rms"], k["edges"], k["layers"]) == ([row, row], [*range(9)], [0, 1])
    assert k["shade"] == [[None if value is None else 50 for value in row]] * 2
    infinite = page_of(opened(tmp_path, filled(tmp_path, state, float("inf")))).data["heats"][0]
    assert infinite["rms"][0][0] == "infinite"
    assert infinite["shade"][0][0] is None


def test_without_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the magnitudes is there, and what is missing is named."""
    found = opened(tmp_path, native(State("kv", type_k=Q8_0, row_k=68, arch="llama")))
    find = values.find_spec
    for missing in ("gguf", "numpy"):
        present = {name: find(name) for name in ("numpy", "gguf") if name != missing}
        monkeypatch.setattr(values, "find_spec", present.get)
        page = page_of(found)
        assert page.data["heats"] == []
        assert f"no magnitudes of kv: this needs {missing}: pip install" in page.text
        assert [kind for kind, _ in page.figures()] == ["positions", "cells"]


def test_damaged(tmp_path: Path) -> None:
    """What could be read is shown, with the damage."""
    data = native(PLAIN)
    page = page_of(inspect_file(write(tmp_path, data[:-1])))
    assert "This file is damaged: cut off in" in page.text
    assert [cache["name"] for cache in page.data["cells"]] == ["damaged"]
    assert sum(n for _, _, n, *_ in cells_in(page.data["cells"][0])) == 10
    for end in range(13, len(data), 7):
        page_of(inspect_file(write(tmp_path, data[:end])))


def test_nothing_to_draw(tmp_path: Path) -> None:
    """An empty state is a page without pictures."""
    for state in (State("kv", cells=()), State("none")):
        page = page_of(opened(tmp_path, native(state)))
        assert page.figures() == []
        assert "empty" in page.text


def saved(folder: Path, **given: object) -> Path:
    state = State("kv", cells=text(4, 0), seq=0)
    checkpoint = Checkpoint(
        state.blob(),
        kind="sequence",
        session_version=11,
        source=0,
        **given,  # type: ignore[arg-type]
    )
    checkpoint.save(folder / "c.llst")
    return folder / "c.llst"


def test_digests_of_a_checkpoint(tmp_path: Path) -> None:
    """As the file has them, and which part they show to be damaged."""
    path = saved(tmp_path)
    found = inspect_file(path)
    page = page_of(found)
    assert found.digests is not None
    for part in found.digests.parts:
        assert part.digest.hex() in page.text
    assert "DAMAGED" not in page.text
    data = bytearray(path.read_bytes())
    data[4096 + 5] ^= 1
    path.write_bytes(data)
    page = page_of(inspect_file(path))
    assert page.texts.count("DAMAGED") == 1
    assert "This file is damaged: payload chunk 1 of 1" in page.text


def test_hostile_texts(tmp_path: Path) -> None:
    """Names and metadata are text, wherever they are shown. Page() refuses what they would add."""
    known = Fingerprint(
        {"architecture": ATTACK, ATTACK: ATTACK}, {ATTACK: ATTACK}, {ATTACK: ATTACK}
    )
    path = saved(tmp_path, meta={ATTACK: ATTACK}, fingerprint=known)
    name = os.fsencode("</title><script>alert(1)</script>".replace("/", "\u2215")) + b"\xff\n"
    target = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.rename(target)
    found = inspect_file(target)
    page = page_of(found)
    assert "<script>alert(1)</script>" in page.text
    assert "\\udcff\\n" in page.text
    assert "\u202e" not in page.text
    shown = found.checkpoint._repr_html_() if found.checkpoint else ""
    assert "alert(2)" in shown
    for table in (found._repr_html_(), shown):
        assert "<script" not in table
        assert "<img" not in table
        assert "\u202e" not in table


def test_data_ends_where_its_element_does() -> None:
    """No text in it does, and it is the same when it is read."""
    data = {"a": "</script><!--<script>&amp;\u2028"}
    embedded = web._embedded(data)
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded) == data


def _scattered(n_cell: int, n_layer: int) -> State:
    """Build a state whose cells are in no order, each of a dozen sequences of 64."""
    rng = random.Random(1)
    places = rng.sample(range(0, 2**31 - 2, 3), n_cell)
    cells = tuple((place, tuple(sorted(rng.sample(range(64), 12)))) for place in places)
    return State("kv", cells=cells, n_layer=n_layer, row_k=2, row_v=2, arch="llama")


def test_reduction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for all, blocks of cells and some layers; the page says so."""
    for name, most in (("RUNS", 200), ("POSITIONS", 640), ("VALUES", 10 * 64), ("SQUARES", 200)):
        monkeypatch.setattr(page_data, f"MOST_{name}", most)
    monkeypatch.setattr(markup, "MOST_CHARACTERS", 2000)
    state = _scattered(600, 10)
    page = page_of(opened(tmp_path, native(state, [1])))
    (cache,) = page.data["cells"]
    (stream,) = cache["streams"]
    assert not stream["exact"]
    blocks = [stream["runs"][i : i + 5] for i in range(0, len(stream["runs"]), 5)]
    assert len(blocks) <= 200
    assert sum(n for _, n, *_ in blocks) == 600
    for first, n, low, high, own in blocks:
        inside = state.cells[first : first + n]
        assert (low, high) == (min(p for p, _ in inside), max(p for p, _ in inside))
        owners = sorted({seq_id for _, ids in inside for seq_id in ids})
        assert cache["owners"][own] == [len(owners), *owners[:8]]
    assert sum(len(one["runs"]) for one in cache["sequences"]) <= 2 * 640
    assert "too many to draw: those of up to" in page.text
    assert "There are too many to list" in page.text
    assert "A square is 3 cells" in page.text
    assert [heat["layers"] for heat in page.data["heats"]] == [[0, 2, 4, 6, 8]] * 2
    assert "One of 2 layers" in page.text
    assert "rows for which there is no room: " in page.text


def test_the_largest_pages(tmp_path: Path) -> None:
    """As many cells as are listed one by one, and more layers than there is room for: 2 MiB."""
    cells = render_html(opened(tmp_path, native(_scattered(page_data.MOST_RUNS, 2))))
    (cache,) = Page(cells).data["cells"]
    assert len(cache["streams"][0]["runs"]) == 5 * page_data.MOST_RUNS
    layers = render_html(opened(tmp_path, native(_scattered(70, 500))))
    assert "One of 2 layers" in Page(layers).text
    assert len(cells) + len(layers) <= MOST


def test_holes_are_closed_from_the_smallest() -> None:
    """Those that are left are the largest."""
    cells = Cells(positions=array("i", [0, 2, 10, 12, 30]), owners={0: range(5)}, starts=range(5))
    found = page_data._positions([cells], 3)
    assert found["closed"] == 1
    assert found["sequences"] == [{"id": 0, "cells": 5, "holes": 4, "runs": [0, 2, 10, 12, 30, 30]}]


@pytest.mark.parametrize("suffix", ["", ".state", ".llst"])
def test_pages_have_a_suffix(suffix: str) -> None:
    """So a page never replaces a state whose name was typed by mistake."""
    with pytest.raises(UnsupportedError, match=r"pages are \.html or \.htm, not "):
        require_suffix(suffix)
    require_suffix(".HTML")


def test_tables_in_notebooks(tmp_path: Path) -> None:
    """Of layouts, files, comparisons and reports."""
    a = opened(tmp_path, native(PLAIN, [1]), "a")
    other = State("kv", cells=text(6) + text(5, 1), arch="llama", type_k=F32)
    b = opened(tmp_path, filled(tmp_path, other, 2.0), "b")
    assert a.layout is not None
    shown = a.layout._repr_html_()
    assert "state of a whole context of llama: kv, session version 11" in shown
    assert '<tr><th scope="row">1</th><td>0</td><td>3</td><td>0</td></tr>' in shown
    assert "session file, version 11" in a._repr_html_()
    found = compare(a, b)
    assert "only in the second: 4" in found._repr_html_()
    assert "<p>the states differ</p>" in found._repr_html_()
    assert compare(a, a)._repr_html_() == "<p>the states are equal</p>"
    attacked = Comparison((Difference(ATTACK, ATTACK, 1),), (), (), 0, True)
    rows = (Row(ATTACK, ATTACK, 5, 0.1, outcome="differs", detail=ATTACK),)
    for table in (attacked._repr_html_(), Report(ATTACK, ATTACK, rows)._repr_html_()):
        assert "<script" not in table
        assert "&lt;script&gt;alert(1)" in table
    assert "NOT passed" in Report("m", "l", rows)._repr_html_()
