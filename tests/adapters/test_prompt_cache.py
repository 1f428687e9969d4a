"""The prompt cache: used by an unchanged Llama it spares what it says, and answers stay the same.

Every answer is compared with that of a Llama without a cache, which evaluates the whole prompt.
Evaluated tokens are counted where llama.cpp is given them.
"""

from __future__ import annotations

import gc
import logging
import pickle
import shutil
import subprocess
import sys
import weakref
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state.adapters.llama_cpp import PromptCache
from llama_state.store import PrefixStore
from tests.adapters.llamas import (
    CUT,
    GREEDY,
    KINDS,
    MORE,
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


def with_cache(llm: Any, *arguments: Any, **options: Any) -> PromptCache:
    cache = PromptCache(llm, *arguments, **options)
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


def n_stored(cache: PromptCache) -> list[int]:
    """Tokens of each stored prompt that no other goes on from."""
    return sorted(entry.n_tokens for entry in cache.store.entries())


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_it_is_a_cache_of_theirs(make: Make) -> None:
    llm = make()
    cache = with_cache(llm)
    assert isinstance(cache, llama_cpp.BaseLlamaCache)
    assert issubclass(PromptCache, llama_cpp.llama_cache.BaseLlamaCache)
    assert (cache.cache_size, cache.capacity_bytes) == (0, 2 << 30)
    assert cache  # a Llama asks
    assert [1, 2] not in cache
    with pytest.raises(KeyError, match="nothing is stored"):
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
    # Each prompt and its answer once, however often.
    assert len(cache.store.entries()) == 3
    assert not cache.store.stats().failures


def test_what_it_did_is_counted(make: Make) -> None:
    """Lookups by what came of them, what was kept, and the store's own figures."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    assert (cache.stats().lookups, cache.stats().store.recalls) == (0, 0)
    answer(llm, QUESTIONS[0])  # a miss
    answer(llm, QUESTIONS[1])
    llm.eval(llm.tokenize(b"all of this", add_bos=False))
    assert cache[llm.input_ids[: llm.n_tokens].tolist()]
    stats = cache.stats()
    assert (stats.lookups, stats.hits, stats.as_it_was, stats.failed) == (3, 1, 1, 0)
    assert (stats.kept, stats.not_kept, stats.forgotten) == (2, 0, 0)
    assert stats.store == cache.store.stats()
    assert (stats.store.recalls, stats.store.hits) == (2, 1)


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
    assert cache.remember().new_tokens == len(prefix)
    assert n_stored(cache) == [len(prefix)]
    assert cache.remember().new_tokens == 0
    for prompt in QUESTIONS:
        elsewhere(llm)
        expected = fresh_answer(make, kind, prompt)
        text, evaluated = answer(llm, prompt)
        assert text == expected
        assert evaluated < 60
        # What the Llama holds now shares more, but is of no use to a memory that is not cut.
        assert answer(llm, prompt + "!")[1] < 60


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


# -- restart, sharing, and what a turn costs


def conversation(llm: Any, turns: int) -> list[int]:
    """Go on for so many turns; return all tokens."""
    tokens = list(llm.tokenize(PREFIX.encode()))
    for turn in range(turns):
        answer(llm, [*tokens, *f"Turn {turn}: and now?".encode()])
        tokens = list(ls.attach(llm).tokens)
    return tokens


@EVERY_KIND
def test_a_restart_finds_the_conversation(make: Make, kind: str, tmp_path: Path) -> None:
    """Another Llama and another store on the same folder evaluate only what is new."""
    first = make(kind, n_ctx=1024)
    with_cache(first, tmp_path, capacity_bytes=1 << 28)
    tokens = conversation(first, 3)
    first.close()
    for _ in range(3):
        tokens += MORE
        llm = make(kind, n_ctx=1024)
        with_cache(llm, str(tmp_path), capacity_bytes=1 << 28)
        said, evaluated = answer(llm, tokens)
        assert said == fresh_answer(make, kind, tokens)
        # The question and its answer, the last token of which is not decoded.
        now = list(ls.attach(llm).tokens)
        assert evaluated == len(now) - len(tokens) + len(MORE)
        tokens = now


def test_a_restart_with_memory_in_front(make: Make, tmp_path: Path) -> None:
    """Several places: after a restart the folder has the conversation, and memory has it then."""
    places = ["memory:?size=1GiB", f"file://{tmp_path}?size=1GiB"]
    tokens: list[int] = []
    for turn in range(2):
        llm = make("llama-dense", n_ctx=1024)
        cache = with_cache(llm, places)
        assert cache.capacity_bytes == 2 << 30
        if turn:
            said, evaluated = answer(llm, [*tokens, *MORE])
            assert said == fresh_answer(make, "llama-dense", [*tokens, *MORE])
            assert evaluated < len(tokens)
            assert cache.store.flush()
            assert cache.store.stats().places[0].kept > 0
        else:
            tokens = conversation(llm, 3)
        cache.detach()


def test_a_restart_of_the_program(make: Make, tmp_path: Path) -> None:
    """Two processes, one after the other."""
    program = """
import sys
from tests.adapters.llamas import answer, llama_cpp
from llama_state.adapters.llama_cpp import PromptCache
model, folder, text = sys.argv[1:]
llm = llama_cpp.Llama(model, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
llm.set_cache(PromptCache(llm, folder, capacity_bytes=1 << 28))
print(ascii(answer(llm, text)))
"""
    said = []
    for _ in range(2):
        command = [sys.executable, "-c", program, str(make.path("llama-dense"))]
        done = subprocess.run(
            [*command, str(tmp_path), PREFIX], capture_output=True, text=True, check=True
        )
        said.append(literal_eval(done.stdout))
    n_prompt = len(make().tokenize(PREFIX.encode()))
    assert said[0][0] == said[1][0]
    assert said[0][1] - said[1][1] == n_prompt - 1


@EVERY_KIND
def test_llamas_share_a_store(make: Make, kind: str) -> None:
    """What one has evaluated the other finds, and detach() leaves the store open."""
    one, two = make(kind, n_ctx=1024), make(kind, n_ctx=1024, n_batch=64)
    with PrefixStore("memory:?size=1GiB", chunk_tokens=64) as store:
        cache = with_cache(one, store)
        with_cache(two, store)
        tokens = conversation(one, 2)
        said, evaluated = answer(two, [*tokens, *MORE])
        assert said == fresh_answer(make, kind, [*tokens, *MORE])
        assert evaluated == two.n_tokens - len(tokens)
        cache.detach()
        # Of restore points that are near to each other some go.
        assert len(tokens) - 64 < store.find(ls.attach(one), tokens).n_tokens < len(tokens)


@pytest.mark.parametrize("kind", CUT)
def test_a_turn_writes_what_is_new(make: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the whole state, and without a copy of it by the Llama."""

    def refuse(*_: object) -> None:
        raise AssertionError("a whole state was saved")

    monkeypatch.setattr(llama_cpp.Llama, "save_state", refuse)
    llm = make(kind, n_ctx=2048)
    store = PrefixStore("memory:?size=1GiB", chunk_tokens=64)
    with_cache(llm, store)
    written = []
    text = PREFIX * 4
    for _ in range(3):
        before = store.stats().bytes_written
        text += answer(llm, text)[0] + " More."
        written.append(store.stats().bytes_written - before)
    # Nearly a thousand tokens, and then a last chunk and what is new.
    assert llm.n_tokens > 900
    assert max(written[1:]) < written[0] / 5


def test_whoever_else_saves_a_state_gets_it(make: Make) -> None:
    """save_state() gives what it always gives, and what it gives can be put into the cache."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    answer(llm, QUESTIONS[0])
    state = llm.save_state()
    assert isinstance(state, llama_cpp.LlamaState)
    elsewhere(llm)
    llm.load_state(state)
    assert llm.n_tokens == state.n_tokens == ls.attach(llm).n_past()
    llm.eval([65, 66])
    cache[[1]] = llm.save_state()
    assert n_stored(cache) == [state.n_tokens + 2]


def test_a_lookup_brings_it_back(make: Make) -> None:
    """What it returns can be loaded as any state, also later."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    answer(llm, QUESTIONS[0])
    tokens = ls.attach(llm).tokens
    truth = ls.attach(llm).seq_snapshot(0)
    for _ in range(2):
        elsewhere(llm)
        assert [*tokens, 65] in cache
        hit = cache[[*tokens, 65]]
        for _ in range(2):
            assert hit.input_ids.tolist() == list(tokens) == list(ls.attach(llm).tokens)
            assert llm._requires_eval
            assert ls.attach(llm).seq_snapshot(0) == truth
            elsewhere(llm)
            llm.load_state(hit)


def test_logits_that_are_there_are_used(make: Make) -> None:
    """A prompt that the Llama has just evaluated is sampled from as it is."""
    llm = make(n_ctx=1024)
    with_cache(llm)
    prompt = llm.tokenize(QUESTIONS[0].encode())
    expected = fresh_answer(make, "llama-dense", prompt)
    llm.eval(prompt)
    text, evaluated = answer(llm, prompt)
    assert text == expected
    assert evaluated <= 12


def test_logits_of_before_are_not_stored(make: Make) -> None:
    """Those that a store put beside a context are not of what its Llama has evaluated since."""
    llm = make("jamba-dense", n_ctx=1024)
    store = PrefixStore("memory:?size=1GiB")
    cache = with_cache(llm, store)
    ctx = ls.attach(llm)
    a, b = list(range(65, 105)), list(range(75, 115))
    llm.eval(b)
    expected = llm._ctx.get_logits_ith(-1)[: llm.n_vocab()]
    for _ in range(2):
        store.prefill(ctx, a)
    llm.reset()
    llm.eval(b)
    cache.remember()
    store.prefill(ctx, a)
    store.prefill(ctx, b)
    assert ctx.logits().tolist() == pytest.approx(expected, abs=1e-4)


def test_the_random_numbers_are_left_alone(make: Make) -> None:
    """A hit does not bring back the seed of the time when it was saved."""
    llm = make(n_ctx=1024)
    with_cache(llm)
    answer(llm, QUESTIONS[0])
    elsewhere(llm)
    llm.set_seed(4321)
    llm.load_state(llm.cache[llm.tokenize(QUESTIONS[1].encode())])
    assert llm._seed == 4321


def test_nothing_is_pickled(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    llm = make(n_ctx=1024)
    with_cache(llm, tmp_path, capacity_bytes=1 << 28)
    for prompt in QUESTIONS[:2]:
        answer(llm, prompt)


# -- where it is kept, and how much


def test_the_limit_holds(make: Make, tmp_path: Path) -> None:
    """Of everything in the folder; the least recently used goes first."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm)
    answer(llm, "0" + QUESTIONS[0])
    room = 3 * cache.cache_size
    cache = with_cache(llm, tmp_path, capacity_bytes=room)
    for number in range(6):  # which have no beginning in common
        answer(llm, f"{number}{QUESTIONS[0]}")
        assert sum(path.stat().st_size for path in files(tmp_path)) <= room
        assert 0 < cache.cache_size <= room == cache.capacity_bytes
    elsewhere(llm)
    # But for the token in front of all.
    found = [
        cache.store.find(ls.attach(llm), llm.tokenize(f"{number}{QUESTIONS[0]}".encode())).n_tokens
        for number in range(6)
    ]
    assert found[0] == found[1] <= 2
    assert found[5] > 200


def test_what_never_fits(make: Make) -> None:
    """It is not kept, and the answer comes all the same."""
    llm = make(n_ctx=1024)
    cache = with_cache(llm, capacity_bytes=5000)
    expected = fresh_answer(make, "llama-dense", QUESTIONS[0])
    for _ in range(2):
        assert answer(llm, QUESTIONS[0])[0] == expected
        elsewhere(llm)
    assert cache.cache_size <= 5000
    assert cache.store.stats().refused


def test_places_and_capacities(make: Make, tmp_path: Path) -> None:
    llm = make()
    with pytest.raises(ValueError, match="needs a capacity"):
        PromptCache(llm, tmp_path)
    with pytest.raises(ValueError, match="that of the store"):
        PromptCache(llm, PrefixStore("memory:?size=1MB"), capacity_bytes=1 << 20)
    assert PromptCache(llm, "memory:?size=1MB").capacity_bytes == 10**6
    assert PromptCache(llm, capacity_bytes=12345).capacity_bytes == 12345
    with pytest.raises(ValueError, match="is for one place"):
        PromptCache(llm, ["memory:?size=1MB", tmp_path], capacity_bytes=1 << 20)
    assert vars(llm).keys() >= {"save_state", "load_state"}


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


@pytest.mark.parametrize("kind", ["gemma3-dense", "lfm2-dense"])
def test_a_remembered_prefix_stays_where_a_window_moves_on(make: Make, kind: str) -> None:
    """Longer prompts lack the rows of the window that are needed at its end."""
    options = {"swa_full": False, "n_batch": 32, "n_ubatch": 32}
    llm = make(kind, n_ctx=1024, **options)
    cache = with_cache(llm)
    prefix = list(llm.tokenize(PREFIX.encode()))
    llm.eval(prefix)
    cache.remember()
    for question in (b"Say this: " * 20, b"Something else, please. " * 9, b"What?"):
        prompt = [*prefix, *question]
        text, evaluated = answer(llm, prompt)
        assert text == fresh_answer(make, kind, prompt, **options)
        assert evaluated <= len(question) + 24
        elsewhere(llm)


# -- whose it is


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
