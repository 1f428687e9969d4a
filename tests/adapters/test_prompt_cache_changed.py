"""The prompt cache where its Llama, the adapters or the place are not what it took them for."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state.adapters.llama_cpp import PromptCache
from tests.adapters.llamas import (
    MORE,
    answer,
    llama_cpp,
    load_adapter,
    set_adapters,
    swap,
)
from tests.adapters.prompt_caches import (
    QUESTIONS,
    Make,
    elsewhere,
    files,
    fresh_answer,
    n_stored,
    with_cache,
)
from tests.layout.ggufs import adapter

pytestmark = pytest.mark.llama_cpp


def test_each_llama_needs_its_own(make: Make) -> None:
    """The cache of one refuses what another would keep, and gives it nothing."""
    one, two = make(n_ctx=1024), make(n_ctx=1024)
    cache = with_cache(one)
    two.set_cache(cache)
    with pytest.raises(ls.UnsupportedError, match="each needs its own"):
        answer(two, QUESTIONS[0])
    assert answer(one, QUESTIONS[0])[0]
    two.reset()
    with pytest.raises(ls.UnsupportedError, match="each needs its own"):
        answer(two, QUESTIONS[0])
    assert two.n_tokens == 0
    two.set_cache(PromptCache(two, cache.store))
    assert answer(two, QUESTIONS[0])[0] == answer(one, QUESTIONS[0])[0]


def test_replaced_or_detached(make: Make, tmp_path: Path) -> None:
    """Another cache, or none, finds the Llama as it was; what is in a folder stays."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm, tmp_path, capacity_bytes=1 << 28)
    answer(llm, QUESTIONS[0])
    theirs = llama_cpp.LlamaRAMCache()
    llm.set_cache(theirs)
    answer(llm, QUESTIONS[1])
    (state,) = theirs.cache_state.values()
    assert state.scores.nbytes > 1000
    assert len(cache.store.entries()) == 1
    llm.set_cache(cache)
    cache.detach()
    assert llm.cache is None
    assert not {"save_state", "load_state"} & set(vars(llm))
    llm.load_state(llm.save_state())
    with pytest.raises(ls.ClosedError):
        cache.remember()
    elsewhere(llm)
    with_cache(llm, tmp_path, capacity_bytes=1 << 28)
    assert answer(llm, QUESTIONS[0])[1] < 30


def test_it_does_not_keep_the_llama(make: Make) -> None:
    """A Llama with its cache goes like one without."""
    gc.collect()
    gc.disable()
    try:
        llm = llama_cpp.Llama(str(make.path("llama-dense")), n_ctx=512, verbose=False)
        cache = with_cache(llm)
        answer(llm, "Short.")
        alive = weakref.ref(llm)
        llm.close()
        with pytest.raises(ls.ClosedError):
            cache.remember()
        del llm
        assert alive() is None
    finally:
        gc.enable()
    with pytest.raises(ls.ClosedError):
        cache.remember()
    cache.detach()


def test_a_closed_llama(make: Make) -> None:
    llm = make()
    llm.close()
    with pytest.raises(ls.ClosedError):
        PromptCache(llm)


def test_images_are_refused(make: Make) -> None:
    """Their tokens do not tell one from another."""
    llm = make()

    class Handler:
        clip_model_path = "clip.gguf"

    llm.chat_handler = Handler()
    with pytest.raises(ls.UnsupportedError, match="images"):
        PromptCache(llm)


def test_what_cannot_be_known_is_said_at_once(make: Make, tmp_path: Path) -> None:
    """A model without its file, and an adapter without one: nothing was taken over then."""
    path = tmp_path / "model.gguf"
    shutil.copy(make.path("llama-dense"), path)
    llm = llama_cpp.Llama(str(path), n_ctx=512, verbose=False)
    try:
        path.unlink()
        with pytest.raises(ls.UnsupportedError, match=r"model file: .*cannot be read"):
            PromptCache(llm)
    finally:
        llm.close()
    lora = adapter(tmp_path / "lora.gguf")
    llm = make(n_ctx=1024)
    swap(llm, lora, 4.0)
    llm.lora_path = None
    with pytest.raises(ls.UnsupportedError, match=r"adapters: .*declare it"):
        PromptCache(llm)
    assert not {"save_state", "load_state"} & set(vars(llm))
    with_cache(llm, adapters=[(lora, 4.0)])
    expected = fresh_answer(make, "llama-dense", QUESTIONS[0], lora_path=str(lora), lora_scale=4.0)
    for _ in range(2):
        text, evaluated = answer(llm, QUESTIONS[0])
        assert text == expected
        elsewhere(llm)
    assert evaluated < 30


# -- what goes wrong costs time and no answer


def damaged(folder: Path) -> None:
    for path in files(folder):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def cut_off(folder: Path) -> None:
    for path in files(folder):
        path.write_bytes(path.read_bytes()[:-9])


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def replaced(folder: Path) -> None:
    """No file can be made there any more."""
    shutil.rmtree(folder)
    folder.write_text("no folder")


@pytest.mark.parametrize("trouble", [damaged, cut_off, removed, replaced])
@pytest.mark.parametrize("kind", ["llama-dense", "jamba-dense"])
def test_a_store_that_fails(
    make: Make, kind: str, trouble: Callable[[Path], None], tmp_path: Path
) -> None:
    """What is lost or damaged is evaluated again, and stored again once that was seen."""
    folder = tmp_path / "store"
    llm = make(kind, n_ctx=1024)
    cache = with_cache(llm, folder, capacity_bytes=1 << 28)
    expected = answer(llm, QUESTIONS[0])[0]
    more = [*ls.attach(llm).tokens, *MORE]
    other = fresh_answer(make, kind, more)
    trouble(folder)
    for _ in range(4):  # of a chain one object after the other is met
        elsewhere(llm)
        text, evaluated = answer(llm, more)
        assert text == other
        elsewhere(llm)
        assert answer(llm, QUESTIONS[0])[0] == expected
    stats = cache.store.stats()
    assert (stats.damaged > 0) is (trouble in (damaged, cut_off))
    assert bool(stats.failures) is (trouble in (removed, replaced))
    assert (evaluated < 30) is (trouble in (damaged, cut_off))


def test_a_cache_that_somebody_else_changed(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Where Llama and cache do not agree nothing is kept, and nothing is refused."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    llm.eval([65, 66, 67])
    llm._ctx.kv_cache_seq_rm(0, 1, -1)
    with pytest.raises(ls.StateError):
        cache.remember()
    state = llm.save_state()
    with caplog.at_level(logging.WARNING, "llama_state.prompt_cache"):
        cache[[65, 66, 67]] = state
    assert "not cached" in caplog.text
    assert (cache.stats().kept, cache.stats().not_kept) == (0, 1)
    assert cache.store.entries() == []
    assert answer(llm, QUESTIONS[0])[0] == fresh_answer(make, "llama-dense", QUESTIONS[0])
    assert len(cache.store.entries()) == 1


# -- adapters


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    return [adapter(tmp_path / f"{seed}.gguf", seed=seed) for seed in (0, 1)]


def changed_by(llm: Any, cache: PromptCache, way: str, lora: Path | None) -> None:
    """Give the Llama an adapter, or none, in one of the ways that there are."""
    if way == "read":
        swap(llm, lora, 4.0)
        return
    set_adapters(llm, *[(load_adapter(llm, lora), 4.0)] if lora else [])
    cache.declare(adapters=[(lora, 4.0)] if lora else [])


@pytest.mark.parametrize("way", ["read", "declared"])
def test_a_state_is_served_under_its_own_adapters(make: Make, way: str, loras: list[Path]) -> None:
    """Nor is what the Llama holds gone on with; and what was kept is found again."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    prompt = llm.tokenize(QUESTIONS[0].encode())
    plain = fresh_answer(make, "llama-dense", prompt)
    assert answer(llm, prompt)[0] == plain
    for lora in loras:
        expected = fresh_answer(make, "llama-dense", prompt, lora_path=str(lora), lora_scale=4.0)
        assert expected != plain
        changed_by(llm, cache, way, lora)
        assert prompt not in cache
        text, evaluated = answer(llm, prompt)
        assert (text, evaluated >= len(prompt)) == (expected, True)
        elsewhere(llm)
        text, evaluated = answer(llm, prompt)
        assert (text, evaluated < len(prompt)) == (expected, True)
    kept = n_stored(cache)
    assert len(kept) == 3
    changed_by(llm, cache, way, None)
    text, evaluated = answer(llm, prompt)
    assert (text, evaluated < len(prompt)) == (plain, True)
    assert n_stored(cache) == kept


def test_adapters_that_change_unsaid_while_it_goes(make: Make, loras: list[Path]) -> None:
    """What was evaluated under both is not kept, under either name."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    llm.eval([1, 2, 3])
    swap(llm, loras[0])
    with pytest.raises(ls.StateError, match="declare them first"):
        cache.remember()
    cache[[1, 2, 3, 4]] = llm.save_state()
    assert cache.store.entries() == []
    cache.declare(adapters=[(loras[0], 1.0)])
    assert llm.n_tokens == 0
    llm.eval([1, 2, 3])
    cache.remember()
    assert n_stored(cache) == [3]
    # Declaring the same again changes nothing.
    cache.declare(adapters=[(loras[0], 1.0)])
    assert llm.n_tokens == 3


def test_adapters_that_are_not_known(
    make: Make, loras: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is found and nothing kept, the answer is theirs, and the log says why."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    plain = answer(llm, QUESTIONS[0])[0]
    swap(llm, loras[0], 4.0)
    llm.lora_path = None
    expected = fresh_answer(
        make, "llama-dense", QUESTIONS[0], lora_path=str(loras[0]), lora_scale=4.0
    )
    with caplog.at_level(logging.WARNING, "llama_state.prompt_cache"):
        assert answer(llm, QUESTIONS[0])[0] == expected != plain
    assert "declare it" in caplog.text
    assert len(cache.store.entries()) == 1
