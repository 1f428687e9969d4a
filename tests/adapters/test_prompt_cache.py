"""The prompt cache: used by an unchanged Llama it spares what it says, and answers stay the same.

Every answer is compared with that of a Llama without a cache, which evaluates the whole prompt.
"""

from __future__ import annotations

import gc
import logging
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state.adapters.llama_cpp import PromptCache, prompt_cache
from tests.adapters.llamas import (
    CUT,
    GREEDY,
    KINDS,
    Counter,
    answer,
    llama_cpp,
    load_adapter,
    set_adapters,
    swap,
)
from tests.layout.ggufs import adapter

pytestmark = pytest.mark.llama_cpp

Make = Callable[..., Any]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
PREFIX = "You are a helpful assistant; the state of a context is saved and brought back. " * 3
QUESTIONS = [f"{PREFIX}Question {i}: {'x' * i}?" for i in range(5)]


def with_cache(llm: Any, **options: Any) -> PromptCache:
    cache = PromptCache(llm, **options)
    llm.set_cache(cache)
    return cache


def fresh_answer(make: Make, kind: str, prompt: Any, **options: Any) -> str:
    return answer(make(kind, n_ctx=1024, **options), prompt)[0]


def streamed(llm: Any, prompt: str) -> list[str]:
    parts = llm.create_completion(prompt, max_tokens=12, stream=True, **GREEDY)
    return [part["choices"][0]["text"] for part in parts]


def elsewhere(llm: Any) -> None:
    """Let the Llama hold something else."""
    llm.reset()
    llm.eval(list(range(100, 140)))


def test_it_is_a_cache_of_theirs(make: Make) -> None:
    llm = make()
    cache = with_cache(llm)
    assert isinstance(cache, llama_cpp.BaseLlamaCache)
    assert issubclass(PromptCache, llama_cpp.llama_cache.BaseLlamaCache)
    assert cache.cache_size == 0
    assert cache  # a Llama asks
    assert [1, 2] not in cache
    with pytest.raises(KeyError):
        cache[[1, 2]]


@EVERY_KIND
def test_answers_stay_the_same(make: Make, kind: str) -> None:
    """The same prompts in turns, over and over, streamed or not: each answer is that of a Llama
    that has evaluated it all."""
    llm = make(kind, n_ctx=1024)
    cache = with_cache(llm)
    expected = [fresh_answer(make, kind, prompt) for prompt in QUESTIONS[:3]]
    streams = [streamed(make(kind, n_ctx=1024), prompt) for prompt in QUESTIONS[:3]]
    for _ in range(3):
        for prompt, text, stream in zip(QUESTIONS, expected, streams, strict=False):
            assert answer(llm, prompt)[0] == text
            assert streamed(llm, prompt) == stream
    # One state for each prompt and its answer, however often.
    assert len(cache.prompts()) == 3


@pytest.mark.parametrize("kind", CUT)
def test_a_shared_prefix_is_evaluated_once(make: Make, kind: str) -> None:
    llm = make(kind, n_ctx=1024)
    with_cache(llm)
    prefix = len(llm.tokenize(PREFIX.encode()))
    total = 0
    for prompt in QUESTIONS:
        text, evaluated = answer(llm, prompt)
        assert text == fresh_answer(make, kind, prompt)
        total += evaluated
        elsewhere(llm)
    assert prefix < total < prefix + 60 * len(QUESTIONS)


@EVERY_KIND
def test_a_prefix_that_was_remembered(make: Make, kind: str) -> None:
    """remember() keeps a prefix for every memory, also one that cannot be cut."""
    llm = make(kind, n_ctx=1024)
    cache = with_cache(llm)
    prefix = llm.tokenize(PREFIX.encode())
    llm.eval(prefix)
    cache.remember()
    assert cache.prompts() == [tuple(prefix)]
    for prompt in QUESTIONS:
        elsewhere(llm)
        expected = fresh_answer(make, kind, prompt)
        text, evaluated = answer(llm, prompt)
        assert text == expected
        assert evaluated < 60
        # What the Llama holds now shares more, but is of no use to a memory that is not cut.
        assert answer(llm, prompt + "!")[1] < 60
    assert tuple(prefix) in cache.prompts()


@EVERY_KIND
def test_two_chats_on_one_llama(make: Make, kind: str) -> None:
    """create_chat_completion: each turn evaluates what is new in its chat, whoever spoke before."""
    llm, calm = make(kind, n_ctx=1024), make(kind, n_ctx=1024)
    with_cache(llm)
    chats: list[list[dict[str, str]]] = [[], []]
    for turn in range(4):
        for number, chat in enumerate(chats):
            chat.append({"role": "user", "content": f"Turn {turn} of chat {number}. " * 3})
            calm.reset()
            expected = calm.create_chat_completion(chat, max_tokens=6, **GREEDY)
            with Counter(llm) as counter:
                got = llm.create_chat_completion(chat, max_tokens=6, **GREEDY)
            message = got["choices"][0]["message"]
            assert message == expected["choices"][0]["message"]
            if turn and kind in CUT:
                assert counter.total < 140
            chat.append(message)


def test_a_hit_stays_and_copies_no_scores(make: Make) -> None:
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    answer(llm, QUESTIONS[0])
    (tokens,) = cache.prompts()
    for _ in range(3):
        elsewhere(llm)
        hit = cache[[*tokens, 65]]
        assert hit.input_ids.tolist() == list(tokens)
        llm.load_state(hit)
        assert llm._requires_eval
        assert ls.attach(llm).tokens == tokens
    assert cache.prompts() == [tokens]
    state = llm.save_state()
    assert isinstance(state, llama_cpp.LlamaState)
    assert state.scores.nbytes < 100
    assert state.llama_state is hit.llama_state  # the very same: not even taken again


def test_the_random_numbers_are_left_alone(make: Make) -> None:
    """A hit does not bring back the seed of the time when it was saved."""
    llm = make(n_ctx=1024)
    with_cache(llm)
    answer(llm, QUESTIONS[0])
    elsewhere(llm)
    llm.set_seed(4321)
    llm.load_state(llm.cache[llm.tokenize(QUESTIONS[1].encode())])
    assert llm._seed == 4321


def test_nothing_is_pickled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    llm = make(n_ctx=1024)
    with_cache(llm)
    for prompt in QUESTIONS[:2]:
        answer(llm, prompt)


# -- the limit


class Watched(prompt_cache.Memory):
    """A store that knows the most that it ever held."""

    most = 0

    def put(self, key: bytes, value: bytes) -> None:
        super().put(key, value)
        self.most = max(self.most, sum(len(k) + len(v) for k, v in self.items()))


def test_the_limit_holds(make: Make) -> None:
    """All bytes counted, before and after; the least recently used go first."""
    llm = make(n_ctx=1024)
    store = Watched()
    cache = with_cache(llm)
    answer(llm, QUESTIONS[-1])
    room = 3 * cache.cache_size + 4096
    cache = with_cache(llm, capacity_bytes=room, store=store)
    for prompt in QUESTIONS:
        answer(llm, prompt)
        assert sum(len(k) + len(v) for k, v in store.items()) < cache.cache_size <= room
    assert store.most <= room
    kept = cache.prompts()
    assert len(kept) == 3
    assert [key[16:] for key in store] == [prompt_cache.prefixes.pack(tokens) for tokens in kept]
    # One that is used is not the next to go.
    elsewhere(llm)
    llm.load_state(cache[[*kept[0], 65]])
    assert cache.prompts() == [kept[1], kept[2], kept[0]]
    answer(llm, "Something that is as long as the others are. " + PREFIX)
    assert kept[0] in cache.prompts()
    assert kept[1] not in cache.prompts()
    assert cache.cache_size <= room


def test_a_state_that_never_fits(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """It is not kept, nothing is let go for it, and the answer comes all the same."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    answer(llm, "Short.")
    cache.capacity_bytes = cache.cache_size + 1000
    short = cache.prompts()
    expected = fresh_answer(make, "llama-dense", QUESTIONS[0])
    with caplog.at_level(logging.WARNING, "llama_state.prompt_cache"):
        assert answer(llm, QUESTIONS[0])[0] == expected
    assert "over capacity_bytes" in caplog.text
    with pytest.raises(ls.CapacityError):
        cache.remember()
    assert cache.prompts() == short
    state = llm.save_state()
    assert state.n_tokens == llm.n_tokens
    llm.reset()
    llm.load_state(state)
    assert ls.attach(llm).n_past() == state.n_tokens


# -- windows


@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("kind", ["gemma3-dense", "lfm2-dense"])
def test_a_window_is_not_cut_where_it_may_not_be(make: Make, kind: str, swa_full: bool) -> None:
    """A Llama cuts back whatever it holds; with the cache it is right even where cells are gone."""
    options = {"swa_full": swa_full, "n_batch": 32, "n_ubatch": 32}
    llm = make(kind, n_ctx=1024, **options)
    with_cache(llm)
    long = list(llm.tokenize((PREFIX * 2).encode()))
    for prompt in (long, [*long[:100], *b"Something else."], [*long[:300], 65, 66], long):
        expected = fresh_answer(make, kind, prompt, **options)
        assert answer(llm, prompt)[0] == expected


# -- whose it is


def test_each_llama_needs_its_own(make: Make) -> None:
    """The cache of one is refused by the states of another."""
    one, two = make(n_ctx=1024), make(n_ctx=1024)
    cache = with_cache(one)
    two.set_cache(cache)
    with pytest.raises(ls.UnsupportedError, match="each needs its own"):
        answer(two, QUESTIONS[0])
    two.set_cache(PromptCache(two))
    assert answer(two, QUESTIONS[0])[0] == answer(one, QUESTIONS[0])[0]


def test_replaced_or_detached(make: Make) -> None:
    """Another cache, or none, finds the Llama as it was."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    answer(llm, QUESTIONS[0])
    theirs = llama_cpp.LlamaRAMCache()
    llm.set_cache(theirs)
    answer(llm, QUESTIONS[1])
    (state,) = theirs.cache_state.values()
    assert state.scores.nbytes > 1000
    assert len(cache.prompts()) == 1
    llm.set_cache(cache)
    cache.detach()
    assert llm.cache is None
    assert cache.cache_size == 0
    assert not {"save_state", "load_state"} & set(vars(llm))
    llm.load_state(llm.save_state())


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


# -- what goes wrong costs time and no answer


class Leaky(prompt_cache.Memory):
    """A store that has lost everything, or kept it badly."""

    damage: Callable[[bytes], bytes | None] = staticmethod(lambda blob: blob)

    def get(self, key: bytes, default: Any = None) -> Any:
        blob = super().get(key)
        return blob if blob is None else self.damage(blob)


@pytest.mark.parametrize("damage", [lambda blob: None, lambda blob: blob[:-1]])
def test_a_store_that_fails(make: Make, damage: Callable[[bytes], bytes | None]) -> None:
    """A lost or damaged state is a miss, and is forgotten."""
    llm = make(n_ctx=1024)
    store = Leaky()
    cache = with_cache(llm, store=store)
    expected = answer(llm, QUESTIONS[0])[0]
    elsewhere(llm)
    store.damage = damage
    (tokens,) = cache.prompts()
    assert answer(llm, QUESTIONS[0])[0] == expected
    store.damage = lambda blob: blob
    elsewhere(llm)
    assert answer(llm, QUESTIONS[0]) == (expected, answer(llm, QUESTIONS[0])[1])
    assert cache.prompts() == [tokens]


def test_a_cache_that_somebody_else_changed(make: Make) -> None:
    """Where Llama and cache do not agree nothing is kept, and nothing is refused."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    llm.eval([65, 66, 67])
    llm._ctx.kv_cache_seq_rm(0, 1, -1)
    with pytest.raises(ls.StateError):
        cache.remember()
    state = llm.save_state()
    cache[[65, 66, 67]] = state
    assert cache.prompts() == []
    assert answer(llm, QUESTIONS[0])[0] == fresh_answer(make, "llama-dense", QUESTIONS[0])
    assert len(cache.prompts()) == 1


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
    kept = cache.prompts()
    assert len(kept) == 3
    changed_by(llm, cache, way, None)
    text, evaluated = answer(llm, prompt)
    assert (text, evaluated < len(prompt)) == (plain, True)
    assert sorted(cache.prompts()) == sorted(kept)


def test_adapters_that_change_unsaid_while_it_goes(make: Make, loras: list[Path]) -> None:
    """What was evaluated under both is not kept, under either name."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    llm.eval([1, 2, 3])
    swap(llm, loras[0])
    with pytest.raises(ls.StateError, match="declare them first"):
        cache.remember()
    saved = llm.save_state()
    cache[[1, 2, 3, 4]] = saved
    assert cache.prompts() == []
    cache.declare(adapters=[(loras[0], 1.0)])
    assert llm.n_tokens == 0
    llm.eval([1, 2, 3])
    cache.remember()
    assert cache.prompts() == [(1, 2, 3)]
    # Declaring the same again changes nothing.
    cache.declare(adapters=[(loras[0], 1.0)])
    assert llm.n_tokens == 3


def test_a_state_that_was_saved_before_a_declaration(make: Make, loras: list[Path]) -> None:
    """It is kept under the adapters that it was evaluated with."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    llm.eval([1, 2, 3])
    before = llm.save_state()
    set_adapters(llm, (load_adapter(llm, loras[0]), 1.0))
    cache.declare(adapters=[(loras[0], 1.0)])
    cache[[1, 2, 3, 4]] = before
    assert [1, 2, 3, 4] not in cache
    set_adapters(llm)
    cache.declare(adapters=[])
    assert [1, 2, 3, 4] in cache
