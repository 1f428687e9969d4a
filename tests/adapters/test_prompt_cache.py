"""The prompt cache: used by an unchanged Llama it spares what it says, and answers stay the same.

Every answer is compared with that of a Llama without a cache, which evaluates the whole prompt.
Evaluated tokens are counted where llama.cpp is given them.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from ast import literal_eval
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
)
from tests.adapters.prompt_caches import (
    PREFIX,
    QUESTIONS,
    Make,
    elsewhere,
    files,
    fresh_answer,
    n_stored,
    with_cache,
)

pytestmark = pytest.mark.llama_cpp

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def streamed(llm: Any, prompt: str) -> list[str]:
    parts = llm.create_completion(prompt, max_tokens=12, stream=True, **GREEDY)
    return [part["choices"][0]["text"] for part in parts]


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
