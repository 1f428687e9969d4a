"""What a model's metadata says of the layout of its states."""

from __future__ import annotations

from typing import Any

import pytest

from llama_state.layout import Module, Traits, Window, is_known, model_traits


def metadata(arch: str, **values: int) -> Any:
    keys = {f"{arch}.{name.replace('__', '.')}": str(value) for name, value in values.items()}
    return keys.get


def modules(arch: str, values: Any = None, **flags: Any) -> list[Module]:
    return [traits.module for traits in model_traits(arch, values, **flags)]


@pytest.mark.parametrize(
    ("arch", "module", "k_only", "ext"),
    [
        ("llama", "kv", False, False),
        ("qwen2vl", "kv", False, True),
        ("gemma2", "iswa", False, False),
        ("mamba2", "recurrent", False, False),
        ("jamba", "hybrid", False, False),
        ("qwen35", "hybrid", False, True),
        ("kimi-linear", "hybrid", True, False),
        ("lfm2moe", "hybrid", False, False),
        ("glm5-next", "hybrid-idx", True, False),
        ("deepseek32", "dsa", True, False),
        ("dots3note", "dsa-iswa", True, False),
        ("minimax-m3", "msa", False, False),
        ("deepseek4", "dsv4", True, False),
        ("bert", "none", False, False),
    ],
)
def test_an_architecture_that_has_one_layout(
    arch: str, module: Module, k_only: bool, ext: bool
) -> None:
    """Its name is enough."""
    assert is_known(arch)
    assert model_traits(arch) == (Traits(arch, module, k_only=k_only, ext=ext),)


def test_a_window_decides() -> None:
    """A sliding-window key of 0, or none, is no window; unknown metadata leaves both."""
    assert modules("gemma3", metadata("gemma3", attention__sliding_window=512)) == ["iswa"]
    assert modules("gemma3", metadata("gemma3", attention__sliding_window=0)) == ["kv"]
    assert modules("gemma3", metadata("gemma3")) == ["kv"]
    assert modules("gemma3") == ["iswa", "kv"]
    assert modules("gemma3", n_swa=1024) == ["iswa"]
    assert modules("lfm2", metadata("lfm2", attention__sliding_window=4)) == ["hybrid-iswa"]
    assert modules("lfm2", metadata("lfm2")) == ["hybrid"]
    assert modules("llama4", metadata("llama4")) == ["iswa"]
    assert modules("llama4", metadata("llama4", attention__sliding_window=0)) == ["kv"]
    assert modules("llama4", n_swa=8192) == ["iswa"]
    assert modules("llama4", n_swa=0) == ["kv"]
    assert modules("exaone4", metadata("exaone4", block_count=64), n_swa=4096) == ["iswa"]
    assert modules("exaone4", metadata("exaone4", block_count=30), n_swa=4096) == ["kv"]


@pytest.mark.parametrize(
    ("arch", "flags", "window"),
    [
        ("gemma2", {"n_swa": 4096}, Window("standard", 4096)),
        ("gemma2", {"metadata": metadata("gemma2", attention__sliding_window=9)}, ("standard", 9)),
        ("gemma2", {}, None),
        ("llama4", {}, Window("chunked", 8192)),
        ("llama4", {"n_swa": 16}, Window("chunked", 16)),
        ("smallthinker", {}, Window("standard", 4096)),
        ("llama", {"n_swa": 4096}, None),
        ("nova", {"n_swa": 4096}, None),
    ],
)
def test_windows(arch: str, flags: dict[str, Any], window: Any) -> None:
    """Kind and size of a window, where memory has one and both are known."""
    expected = Window(*window) if isinstance(window, tuple) else window
    assert model_traits(arch, **flags)[0].window == expected


def test_window_arithmetic() -> None:
    """The first position that does not look back to a missing one."""
    assert Window("standard", 4).first_after(5) == 9
    assert [Window("chunked", 4).first_after(p) for p in (0, 3, 4)] == [4, 4, 8]


def test_latent_attention() -> None:
    """deepseek2 stores no V in files that have both lengths; older files do."""
    keys = {"attention__key_length_mla": 192, "attention__value_length_mla": 128}
    (traits,) = model_traits("deepseek2", metadata("deepseek2", **keys))
    assert traits.k_only
    (traits,) = model_traits("deepseek2", metadata("deepseek2"))
    assert not traits.k_only
    assert [traits.k_only for traits in model_traits("deepseek2")] == [False, True]


def test_indexer_and_ngrams() -> None:
    """Scalar keys tell of an indexer and of n-gram embeddings."""
    assert modules("hy_v4", metadata("hy_v4", attention__indexer__top_k=64)) == ["dsa"]
    assert modules("hy_v4", metadata("hy_v4")) == ["kv"]
    assert modules("hy_v4") == ["dsa", "kv"]
    (traits,) = model_traits("qwen4exp", metadata("qwen4exp", ple__ngram_size=2))
    assert traits.ple
    assert [traits.ple for traits in model_traits("qwen4exp")] == [False, True]


def test_rope_sections_are_told_by_the_library() -> None:
    """They are an array, which metadata lookups do not give: without rope type both are tried."""
    assert [traits.ext for traits in model_traits("glm4", metadata("glm4"))] == [False, True]
    for rope_type, ext in ((-1, False), (0, False), (2, False), (8, True), (24, False), (40, True)):
        assert [t.ext for t in model_traits("glm4", rope_type=rope_type)] == [ext]
    assert [traits.ext for traits in model_traits("llama", rope_type=8)] == [True]


def test_an_unknown_architecture_is_narrowed_by_what_the_library_says() -> None:
    """What is left is tried, most common first."""
    assert not is_known("nova")
    assert modules("nova")[0] == "kv"
    assert set(modules("nova", recurrent=True, hybrid=False)) == {"recurrent"}
    assert set(modules("nova", hybrid=True)) == {*("hybrid", "hybrid-iswa", "hybrid-idx", "dsv4")}
    plain = modules("nova", recurrent=False, hybrid=False, n_swa=0)
    assert set(plain) == {"kv", "dsv4", "dsa", "dsa-iswa", "msa", "none"}
    assert {traits.ext for traits in model_traits("nova", rope_type=0)} == {False}
    assert len(model_traits("nova")) == len(set(model_traits("nova")))


def test_where_library_and_table_contradict_each_other_both_are_tried() -> None:
    """Either may be out of date; of equal readings the table's is the first."""
    assert modules("llama", hybrid=True) == ["kv", *modules("nova", hybrid=True)]
    assert modules("jamba", recurrent=False, hybrid=True) == ["hybrid"]
    assert modules("mamba2", recurrent=False, hybrid=False)[0] == "recurrent"


@pytest.mark.parametrize("hybrid", [True, False])
def test_deepseek4_may_be_called_hybrid_or_not(hybrid: bool) -> None:
    """Builds differ; it is the same memory, with a window of which the API says nothing."""
    size = metadata("deepseek4", attention__sliding_window=128)
    (found,) = model_traits("deepseek4", size, recurrent=False, hybrid=hybrid, n_swa=0)
    assert (found.module, found.window) == ("dsv4", Window("standard", 128))


def test_text_that_is_no_number_leaves_it_open() -> None:
    """A value that cannot be read is not taken for 0."""
    assert modules("gemma3", {"gemma3.attention.sliding_window": "[1, 2]"}.get) == ["iswa", "kv"]


@pytest.mark.parametrize(
    ("traits", "span", "expected"),
    [
        (Traits("", "kv"), (3, 9), 3),
        (Traits("", "dsa"), (0, 9), 0),
        (Traits("", "kv"), (-1, -1), 0),
        (Traits("", "recurrent"), (9, 9), 10),
        (Traits("", "hybrid-iswa", window=Window("standard", 4)), (9, 9), 10),
        (Traits("", "dsv4"), (6, 9), 10),
        (Traits("", "iswa", window=Window("standard", 4)), (0, 9), 0),
        (Traits("", "iswa", window=Window("standard", 4)), (6, 9), 9),
        (Traits("", "iswa", window=Window("standard", 9)), (6, 9), 10),
        (Traits("", "iswa", window=Window("chunked", 4)), (8, 9), 8),
        (Traits("", "iswa"), (6, 9), 10),
        (Traits("", "iswa"), (-1, -1), 0),
    ],
)
def test_rewind_min(traits: Traits, span: tuple[int, int], expected: int) -> None:
    """How far a sequence can be cut back, as far as its span tells."""
    assert traits.rewind_min(*span) == expected
