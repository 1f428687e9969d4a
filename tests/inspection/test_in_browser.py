"""Pages of states in a real browser: no script error, no request, what pointing at them says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from llama_state import Checkpoint
from llama_state.cli import main
from tests.inspection.browser import Shown, find_chromium, launched
from tests.inspection.test_diff import KINDS
from tests.layout.blobs import State, text
from tests.layout.statefiles import native, write

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = find_chromium()

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="it needs Chromium: none is installed")

Opened: TypeAlias = Callable[..., Shown]

# Positions 0 to 29 of two sequences, of which the second has a hole from 10 to 19.
SHARED = tuple((p, (0,) if 10 <= p < 20 else (0, 1)) for p in range(30))
ATTACK = "</script><script>window.hit = 1</script><img src=http://127.0.0.1:9/x onerror=hit=1>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    pytest.importorskip("playwright", reason="it needs playwright: pip install '.[browser]'")
    assert CHROMIUM is not None
    with launched(CHROMIUM) as found:
        yield found


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Opened]:
    """Return a function that opens the page of a file; it may report no error, nor ask for more."""
    windows: list[Shown] = []
    target = tmp_path / "report.html"

    def opened(source: Path, **window: Any) -> Shown:
        assert main(["inspect", str(source), "--html", str(target)]) == 0
        windows.append(Shown(browser, **window))
        windows[-1].open(target)
        return windows[-1]

    yield opened
    for window in windows:
        problems, requests = window.problems, window.requests
        window.close()
        assert problems == []
        assert [url for url in requests if not url.startswith("data:")] == [target.as_uri()]


def box(shown: Shown, index: int) -> dict[str, float]:
    """Scroll to a picture; return where it is drawn, without its names: x, y, width, height."""
    found: dict[str, float] = shown.value(
        f"(c => {{ c.scrollIntoView({{block: 'center', behavior: 'instant'}});"
        " const r = c.getBoundingClientRect();"
        " return {x: r.x + 97, y: r.y + 1, width: r.width - 106, height: r.height}; })"
        f"(document.querySelectorAll('canvas')[{index}])"
    )
    return found


def said(shown: Shown, index: int) -> Any:
    return shown.value(f"document.querySelectorAll('output')[{index}].textContent")


def point(shown: Shown, index: int, across: float, down: float) -> Any:
    """Point at a picture, *down* in pixels; return what it says."""
    where = box(shown, index)
    shown.page.mouse.move(where["x"] + across * where["width"], where["y"] + down)
    return said(shown, index)


@pytest.mark.parametrize("state", KINDS)
def test_every_kind(state: State, opened: Opened, tmp_path: Path) -> None:
    """Each picture is there, has something in it, and says something where it is pointed at."""
    shown = opened(write(tmp_path, native(state, [1])))
    n = shown.value("document.querySelectorAll('figure').length")
    assert n > 0
    for index in range(n):
        assert shown.value(f"document.querySelectorAll('canvas')[{index}].clientWidth") > 500
        drawn = shown.value(
            f"(c => new Uint32Array(c.getContext('2d').getImageData(104, 4, c.width - 120,"
            " c.height - 30).data.buffer).some(p => p !== 0))"
            f"(document.querySelectorAll('canvas')[{index}])"
        )
        assert drawn
        hint = said(shown, index)
        assert point(shown, index, 0.02, 8) not in ("", hint)


def test_hover_and_zoom(opened: Opened, tmp_path: Path) -> None:
    """Cells by sequence and position, in their order, and magnitudes; by mouse and by key."""
    shown = opened(write(tmp_path, native(State("kv", cells=SHARED, arch="llama"))))
    column = 1 / 30
    assert point(shown, 0, 5.5 * column, 13) == (
        "sequence 0, position 5: cell 5, shared: sequences 0, 1"
    )
    assert point(shown, 0, 12.5 * column, 13) == "sequence 0, position 12: cell 12"
    assert point(shown, 0, 12.5 * column, 39) == "sequence 1, position 12: not there"
    assert point(shown, 1, 0.01, 7) == "cell 0: position 0, sequences 0, 1"
    assert point(shown, 1, 0.99, 35) == "cell 29: position 29, sequences 0, 1"
    assert "RMS" in point(shown, 2, 0.99, 25)
    assert said(shown, 2).startswith("layer 1, position 29: RMS ")
    assert said(shown, 0) == said(shown, 1) == "Point at it, or use the arrow keys."

    # Twice as near around the same place: the neighbour is twice as far.
    point(shown, 0, 12.5 * column, 13)
    where = box(shown, 0)
    middle = where["x"] + 12.5 * column * where["width"], where["y"] + 13
    shown.page.mouse.click(*middle)
    shown.page.keyboard.press("+")
    assert point(shown, 0, 0.5 * column, 13).startswith("sequence 0, position 6:")
    shown.page.keyboard.press("0")
    assert point(shown, 0, 0.5 * column, 13).startswith("sequence 0, position 0:")
    shown.page.keyboard.press("ArrowRight")
    shown.page.keyboard.press("ArrowDown")
    assert said(shown, 0).startswith("sequence 1, position 1: cell 1, shared")
    shown.page.mouse.move(*middle)
    shown.page.mouse.wheel(0, -200)
    assert not point(shown, 0, 0.5 * column, 13).startswith("sequence 0, position 0:")
    shown.value("document.querySelectorAll('button')[2].click()")
    assert point(shown, 0, 0.5 * column, 13).startswith("sequence 0, position 0:")


def test_images(opened: Opened, tmp_path: Path) -> None:
    """The cells of an image have one position; all of them are named."""
    state = State("kv", ext=True, cells=((0, (0,)), *((1, (0,)) for _ in range(5)), (2, (0,))))
    shown = opened(write(tmp_path, native(state)))
    assert point(shown, 0, 0.5, 13) == (
        "sequence 0, position 1: cell 1; cell 2; cell 3; and 2 more cells"
    )


def test_owners_that_are_not_named(opened: Opened, tmp_path: Path) -> None:
    """A cell of more sequences than are listed is not said to be of one that it may not be of."""
    ten = tuple(range(10))
    state = State("kv", cells=((0, ten), (0, (10,)), (1, ten[1:]), (1, (0,))))
    shown = opened(write(tmp_path, native(state)))
    shared = "shared: sequences 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert point(shown, 0, 0.25, 13) == f"sequence 0, position 0: cell 0, {shared}"
    assert point(shown, 0, 0.25, 9 * 26 + 13) == f"sequence 9, position 0: cell 0, {shared}"
    assert point(shown, 0, 0.75, 13) == "sequence 0, position 1: cell 3"


def test_reduced(opened: Opened, tmp_path: Path) -> None:
    """A state of more cells than are listed or drawn one by one."""
    places = random.Random(1).sample(range(0, 60_000, 3), 20_000)
    state = State("kv", cells=tuple((p, (0,)) for p in places), row_k=2, row_v=2, n_layer=1)
    shown = opened(write(tmp_path, native(state)))
    assert "among cells " in point(shown, 1, 0.001, 3)
    said_of_it = point(shown, 0, 0.0001, 13)
    assert said_of_it.endswith(": there, or in a hole of up to 2 positions")


def test_hostile_texts(opened: Opened, tmp_path: Path) -> None:
    """Nothing that a file says is run or asked for."""
    state = State("kv", cells=text(4, 0), seq=0)
    checkpoint = Checkpoint(
        state.blob(), kind="sequence", session_version=11, source=0, meta={ATTACK: ATTACK}
    )
    source = tmp_path / "<img src=x onerror=hit=1>.llst"
    checkpoint.save(source)
    shown = opened(source)
    assert shown.value("typeof hit") == "undefined"
    assert shown.value("document.images.length") == 0
    assert ATTACK in shown.value("document.body.innerText")
    # Were a text not escaped, the policy of the page would not let it run either.
    shown.value("(document.body.innerHTML += '<img src=x onerror=\"window.hit = 1\">', 1)")
    shown.value("new Promise(done => setTimeout(done, 200))")
    assert shown.value("typeof hit") == "undefined"
    assert shown.problems
    assert all("Content Security" in problem for problem in shown.problems), shown.problems
    shown.problems.clear()
    del shown.requests[1:]  # the image's was stopped by that policy


def test_dark_and_narrow(opened: Opened, tmp_path: Path) -> None:
    """Text is read on either ground, and nothing is wider than a phone."""
    source = write(tmp_path, native(State("kv", cells=SHARED, arch="llama")))
    colours = "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
    found = {}
    for scheme in ("light", "dark"):
        shown = opened(source, color_scheme=scheme)
        text_colour, page_colour = shown.value(colours)
        assert contrast(text_colour, page_colour) > 7
        quiet = shown.value("getComputedStyle(document.querySelector('tbody th')).color")
        assert contrast(quiet, page_colour) > 4.5
        found[scheme] = page_colour
    assert found["light"] != found["dark"]
    shown.page.set_viewport_size({"width": 390, "height": 800})
    assert shown.value("document.documentElement.scrollWidth") <= 390


def contrast(a: str, b: str) -> float:
    """Return the contrast of two colours by the formula of WCAG."""
    light, dark = sorted(map(_luminance, (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    shares = [int(part) / 255 for part in colour[4:-1].split(",")]
    red, green, blue = (s / 12.92 if s <= 0.03928 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_without_scripts(opened: Opened, tmp_path: Path) -> None:
    """The text is there, and that the pictures are not."""
    source = write(tmp_path, native(State("kv", cells=SHARED, arch="llama")))
    seen = opened(source, java_script_enabled=False).accessible()
    names = {node["name"]["value"] for node in seen if "name" in node}
    assert "The pictures need JavaScript; the text does not." in names
    assert "30 cells, positions 0-29" in names
    assert not {"Cache kv", "Magnitudes by layer"} & names
    assert not [node for node in seen if node.get("role", {}).get("value") == "Canvas"]


def test_names(opened: Opened, tmp_path: Path) -> None:
    """A screen reader finds what each picture and each button is."""
    shown = opened(write(tmp_path, native(State("kv", cells=SHARED, arch="llama"))))
    named: dict[str, list[str]] = {}
    for node in shown.accessible():
        name = node.get("name", {}).get("value", "")
        named.setdefault(node["role"]["value"], []).append(name)
    assert len(named["application"]) == 4
    assert named["application"][0].startswith("Positions of each sequence. Arrow keys move")
    assert set(named["button"]) == {"zoom in", "zoom out", "show all"}
    assert all(named["heading"])
    assert len(named["status"]) == 4
