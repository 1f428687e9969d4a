"""What must be equal in a state and a context, and how a difference is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llama_state.layout import Geometry, Layout, Traits, Window, differences, merge
from tests.layout.blobs import F32, Q8_0, State, text
from tests.layout.test_parse import CHAT, PAIRS, make_state, parse

KV = State("kv", cells=CHAT)
THINNER, WIDER = ("32 values", "16 values"), ("16 values", "32 values")


def said(saved: State | Geometry, current: State | Geometry) -> list[tuple[str, Any, Any]]:
    a, b = (parse(one).geometry if isinstance(one, State) else one for one in (saved, current))
    return [(name, was, now) for name, was, now in differences(a, b)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"arch": "other"}, [("architecture", "made-up", "other")]),
        ({"module": "recurrent"}, [("kind of memory", "kv", "recurrent")]),
        ({"split": 4}, [("n_stream", 1, 4)]),
        ({"v_trans": True}, [("flash attention", "on", "off (V transposed)")]),
        ({"type_k": F32}, [("type_k", "f16", "f32"), ("K row size", *THINNER)]),
        ({"type_k": F32, "row_k": 128}, [("type_k", "f16", "f32")]),
        ({"type_v": Q8_0, "row_v": 34}, [("type_v", "f16", "q8_0"), ("V row size", *WIDER)]),
        ({"row_k": 66}, [("K row size", "32 values", "33 values")]),
        ({"n_layer": 3}, [("layer count", 2, 3)]),
        ({"rotation": (128, 64)}, [("n_rot_k", 0, 128), ("n_rot_v", 0, 64)]),
        ({"k_only": True}, [("V layer count", 2, 0)]),
        ({"cells": text(1)}, []),
        ({"cells": ()}, []),
    ],
)
def test_differences(changes: dict[str, Any], expected: list[tuple[str, Any, Any]]) -> None:
    """Each difference has a name for people, and both values."""
    assert said(KV, replace(KV, **changes)) == expected


def test_one_layer_that_differs_is_named() -> None:
    """What is the same in all layers is said once, else for each layer that differs."""
    geometry = parse(KV).geometry
    (cache,) = geometry.caches
    other = replace(geometry, caches=(replace(cache, k=((1, 64), (8, 68))),))
    assert said(geometry, other) == [
        ("type_k (layer 1)", "f16", "q8_0"),
        ("K row size (layer 1)", "32 values", "64 values"),
    ]


def test_the_cache_that_differs_is_named() -> None:
    """A difference of all sub-caches is said once, that of one says of which."""
    state = State("hybrid-iswa", cells=CHAT)
    assert said(state, replace(state, type_k=Q8_0, row_k=34)) == [("type_k", "f16", "q8_0")]
    assert (
        said(state, replace(state, n_recurrent=4))
        == [
            ("layer count of recurrent", 5, 6),
            ("R layer count", 3, 4),
            ("S layer count", 3, 4),
        ][:1]
    )
    assert said(state, replace(state, row_s=44)) == [("S row size", "10 values", "11 values")]


def test_deepseek4_differences() -> None:
    """Of its compressed parts too."""
    state = make_state("dsv4", "shared")
    geometry = parse(state).geometry
    caches = {cache.name: cache for cache in geometry.caches}
    for name, change, expected in (
        ("csa", {"k": ((0, 128),)}, ("K row size of csa", "16 values", "32 values")),
        ("csa state", {"ratio": 8}, ("ratio of csa state", 4, 8)),
        ("lid state", {"layers": (4,)}, ("layers of lid state", (3,), (4,))),
    ):
        changed = caches | {name: replace(caches[name], **change)}
        assert said(geometry, replace(geometry, caches=tuple(changed.values()))) == [expected]


@pytest.mark.parametrize(("module", "form"), PAIRS)
def test_whole_and_sequence_agree(module: str, form: str) -> None:
    """Whole, sequence, partial and empty states of one context do not differ."""
    whole = make_state(module, form)
    states = [whole, whole.only(0), replace(whole.only(0), partial=True), replace(whole, cells=())]
    layouts: list[Layout] = [parse(state) for state in states]
    for a in layouts:
        for b in layouts:
            assert differences(a.geometry, b.geometry) == ()
        assert merge(layouts[0].geometry, a.geometry) == layouts[0].geometry
        assert hash(a.geometry) == hash(a.geometry)


def test_merge_fills_in_what_is_not_known() -> None:
    """An empty context tells its streams; a filled state of it the rest."""
    empty = parse(replace(KV, split=3, cells=())).geometry
    full = parse(replace(KV, split=3, seq=0)).geometry
    assert merge(empty, full) == replace(full, arch="made-up")
    assert merge(full, empty) == merge(empty, full)
    partial = parse(State("hybrid", seq=0, partial=True)).geometry
    both = merge(partial, parse(State("hybrid", seq=0)).geometry)
    assert {cache.name for cache in both.caches} == {"attn", "recurrent"}


@pytest.mark.parametrize(
    ("module", "window", "expected"),
    [
        ("kv", None, 0),
        ("msa", None, 0),
        ("dsa", None, 0),
        ("iswa", None, 0),
        ("iswa", ("standard", 4), 9),
        ("dsa-iswa", ("standard", 4), 9),
        ("hybrid", None, 10),
        ("recurrent", None, 10),
        ("dsv4", None, 10),
    ],
)
def test_rewind_min(module: str, window: Any, expected: int) -> None:
    """A sequence of ten can be cut back to what its caches still allow."""
    state = State(module, cells=text(10), split=1, window=window and window[1], seq=0)
    traits = Traits("", module, window=window and Window(*window))  # type: ignore[arg-type]
    assert parse(state, traits=traits).rewind_min(0) == expected
    assert parse(state, traits=traits).rewind_min(1) == 0


def test_rewind_min_of_windows() -> None:
    """It follows what is really missing, not where the sequence starts."""
    begun_late = State("iswa", cells=text(10, 0, start=5), window=20)
    assert parse(begun_late).rewind_min(0) == 5
    cut = State("iswa", cells=text(10), window=4, seq=0)
    unknown = parse(cut, traits=Traits("", "iswa"))
    assert unknown.rewind_min(0) == 10
    chunked = parse(cut, traits=Traits("", "iswa", window=Window("chunked", 3)))
    assert chunked.rewind_min(0) == 6
    partial = replace(cut, partial=True)
    assert parse(partial).rewind_min(0) == 9
