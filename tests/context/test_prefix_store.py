"""The prefix store with real contexts: what comes back is what was there."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

import llama_state as ls
from llama_state.context.prefixes import Prefixes
from llama_state.store import PrefixStore
from llama_state.store.places.folder import FolderBackend
from llama_state.testing.conformance import nmse
from tests.context.oracle import LIMIT, differences
from tests.kinds import ALL_WINDOWS

pytestmark = pytest.mark.libllama

CUTTABLE = frozenset({"deepseek2", "deepseek32", "llama", "minimax-m3", "qwen2vl"})
"""Wherever a prompt differs, what is before it is found."""

CHUNK = 64
SAME_PIECES = 1e-6
"""Of logits after the same pieces: 1.1e-7 at the most, of jamba with flash attention, whose own
prefill stops at chunk ends. Of other pieces up to 6.7e-5, with or without a store."""

STOPS = (64, 100, 128, 192, 230)
"""Where the first prompt is remembered on the way."""

CONFIGURATIONS = {
    "one": {"n_seq_max": 1},
    "unified": {"n_seq_max": 3, "kv_unified": True},
    "split": {"n_seq_max": 3, "kv_unified": False},
    "unified, no flash": {"n_seq_max": 3, "kv_unified": True, "flash_attn": False},
    "split, no flash": {"n_seq_max": 3, "kv_unified": False, "flash_attn": False},
    "small window": {"n_seq_max": 3, "kv_unified": True, "swa_full": False},
    "q8_0": {"n_seq_max": 3, "kv_unified": True, "type_k": "q8_0", "type_v": "q8_0"},
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    """A store in a folder."""
    with PrefixStore(tmp_path / "kv", capacity_bytes=1 << 30, chunk_tokens=CHUNK) as store:
        yield store
        assert not store.stats().failures


def tokens(seed: int, n: int, n_vocab: int) -> list[int]:
    """Some tokens, the same ones for the same seed."""
    random = Random(seed)
    return [random.randrange(n_vocab) for _ in range(n)]


def context(model: ls.Model, options: Mapping[str, object]) -> ls.Context:
    """A context with 320 cells a sequence."""
    n_seq_max = options["n_seq_max"]
    assert isinstance(n_seq_max, int)
    return model.context(n_ctx=320 * n_seq_max, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_was_there(model: ls.Model, store: PrefixStore, name: str, tmp_path: Path) -> None:
    """A recall leaves what a context held that decoded the same: byte for byte, and its logits.

    Older builds also write the rows in front of a window, which no token sees any more, and which
    are not stored.
    """
    options = CONFIGURATIONS[name]
    seq_id = int(str(options["n_seq_max"])) - 1
    try:
        writer = context(model, options)
    except ls.ModelLoadError:
        return  # quantized rows of this size
    with writer:
        base = tokens(1, STOPS[-1], writer.n_vocab)
        held = {}
        for start, end in zip((0, *STOPS), STOPS, strict=False):
            writer.decode(base[start:end], seq_id)
            store.remember(writer, base[:end], seq_id)
            held[end] = writer.snapshot()
    for shared in (20, 64, 90, 100, 150, 192, 230):
        prompt = [*base[:shared], *tokens(shared, 20, writer.n_vocab)]
        with context(model, options) as reader, context(model, options) as other:
            found = store.find(reader, prompt, seq_id)
            recalled = store.recall(reader, prompt, seq_id)
            n_past = recalled.n_past
            assert recalled.tokens == tuple(prompt[:n_past])
            assert found.n_tokens == n_past
            assert reader.n_past(seq_id) == n_past <= shared
            assert n_past == shared or writer.arch not in CUTTABLE, recalled.why
            if not n_past:
                continue
            other.restore(held[min(end for end in held if end >= n_past)])
            other.seq_rm(seq_id, n_past)
            truth = other.seq_snapshot(seq_id)
            same = reader.seq_snapshot(seq_id) == truth
            if not same:
                assert model.arch in ALL_WINDOWS
                assert ls.load_library().session_version < 10
                assert not differences(other, reader, seq_id, model, tmp_path)
            other.clear()
            other.seq_restore(truth, seq_id)
            for ctx in (reader, other):
                ctx.decode(prompt[n_past:], seq_id)
            assert nmse(other.logits(), reader.logits()) <= (0.0 if same else LIMIT)


def test_other_tokens(llama: ls.Model, store: PrefixStore) -> None:
    """Tokens that the sequence does not hold are not remembered, where its tokens are known."""
    with llama.context(n_ctx=320) as ctx:
        ctx.decode([5, 6, 7])
        with pytest.raises(ValueError, match="token 1 to remember is 9, and sequence 0 has 6"):
            store.remember(ctx, [5, 9])
        assert not store.entries()
        assert store.remember(ctx, [5, 6]).n_tokens == 2


def test_asked_again(model: ls.Model, store: PrefixStore) -> None:
    """After an answer a prompt is still there up to its end, also where a chunk ends close by."""
    prompt = tokens(1, CHUNK + 6, model.n_vocab)
    with model.context(n_ctx=320) as ctx:
        store.prefill(ctx, prompt)
        for token in tokens(2, 20, ctx.n_vocab):
            ctx.decode([token])
        store.remember(ctx, [*prompt, *tokens(2, 20, ctx.n_vocab)])
        ctx.clear()
        assert store.recall(ctx, [*prompt, *tokens(3, 20, ctx.n_vocab)]).n_past == len(prompt)


def test_pinned(model: ls.Model, store: PrefixStore) -> None:
    """A pinned prompt stays as it is when others go on from it, and when all else goes."""
    prompt = tokens(1, CHUNK + 30, model.n_vocab)
    with model.context(n_ctx=320) as ctx:
        store.prefill(ctx, prompt)
        assert store.pin(ctx, prompt) == len(prompt)
        for seed in range(3):
            store.prefill(ctx, [*prompt, *tokens(seed, 20, ctx.n_vocab)])
        assert store.verify().ok
        store.evict(0)
        (entry,) = store.entries()
        assert entry.n_tokens == len(prompt)
        ctx.clear()
        assert store.recall(ctx, [*prompt, 1]).n_past == len(prompt)


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "no flash"])
def test_in_the_same_pieces(model: ls.Model, store: PrefixStore, flash: bool) -> None:
    """A hit goes on as a run whose tokens are decoded in pieces that end where it does."""
    prompt = tokens(1, 230, model.n_vocab)
    options: dict[str, Any] = {"n_ctx": 320, "flash_attn": flash, "n_threads": 1}
    with model.context(**options) as fresh, model.context(**options) as ctx:
        store.prefill(ctx, prompt[:200])
        ctx.clear()
        n_past = len(store.prefill(ctx, prompt).tokens)
        assert n_past == 200
        fresh.decode(prompt[:n_past])
        fresh.decode(prompt[n_past:])
        assert nmse(ctx.logits(), fresh.logits()) < SAME_PIECES


def test_two_keys(model: ls.Model, tmp_path: Path) -> None:
    """Stores with other keys in one folder leave each other's objects alone."""
    prompt = tokens(1, 100, model.n_vocab)
    stores = [
        PrefixStore(tmp_path, capacity_bytes=1 << 30, chunk_tokens=CHUNK, key=key)
        for key in (bytes(16), bytes(range(16)))
    ]
    with model.context(n_ctx=320) as ctx, stores[0], stores[1]:
        stores[0].prefill(ctx, prompt)
        for _ in range(2):
            ctx.clear()
            recalled = stores[1].recall(ctx, prompt)
            assert (recalled.n_past, recalled.why.reason) == (0, "empty")
        assert stores[1].stats().damaged == 0
        again = PrefixStore(tmp_path, capacity_bytes=1 << 30, chunk_tokens=CHUNK, key=bytes(16))
        assert [entry.model for entry in again.entries()] == [ctx.arch]
        assert again.recall(ctx, prompt).n_past == 99 or ctx.arch not in CUTTABLE
        again.close()


def test_damaged_description(model: ls.Model, tmp_path: Path) -> None:
    """What a namespace is described by is written again where it is damaged."""
    prompt = tokens(1, 100, model.n_vocab)
    with model.context(n_ctx=320) as ctx:
        ctx.decode(prompt)
        for _ in range(2):
            with PrefixStore(tmp_path, capacity_bytes=1 << 30, chunk_tokens=CHUNK) as store:
                store.remember(ctx, prompt)
                assert [entry.model for entry in store.entries()] == [ctx.arch]
            (described,) = tmp_path.glob("??/*.N")
            described.write_bytes(bytes(100))


def test_no_room(model: ls.Model, tmp_path: Path) -> None:
    """Where a chunk has no room, nothing is written that would go on from it."""
    prompt = tokens(1, 2 * CHUNK + 1, model.n_vocab)
    with model.context(n_ctx=320) as ctx:
        ctx.decode(prompt)
        with PrefixStore("memory:", capacity_bytes=1 << 30, chunk_tokens=CHUNK) as store:
            store.remember(ctx, prompt)
            whole = store.stats().used_bytes
        for tenths in range(1, 11):
            place = f"file://{tmp_path}/{tenths}?size={whole * tenths // 10}"
            with PrefixStore(place, chunk_tokens=CHUNK) as store:
                store.remember(ctx, prompt)
                assert store.verify().ok


def test_written_behind(model: ls.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written behind is what would be written at once; until then it is not found."""
    prompt = tokens(1, 150, model.n_vocab)
    gate = threading.Event()
    put = FolderBackend.put

    def later(backend: FolderBackend, *arguments: Any) -> bool:
        assert gate.wait(30)
        return put(backend, *arguments)

    options: dict[str, Any] = {"capacity_bytes": 1 << 30, "chunk_tokens": CHUNK}
    with (
        model.context(n_ctx=320, n_seq_max=2, kv_unified=True) as ctx,
        model.context(n_ctx=320) as other,
        PrefixStore(tmp_path / "once", **options) as once,
        PrefixStore(tmp_path / "behind", **options) as store,
    ):
        for end in (100, 150):
            ctx.decode(prompt[ctx.n_past() : end])
            at_once = once.remember(ctx, prompt[:end])
            with monkeypatch.context() as patched:
                patched.setattr(FolderBackend, "put", later)
                gate.clear()
                before = store.find(other, prompt).n_tokens
                assert store.remember(ctx, prompt[:end], wait=False) == at_once
                again = store.remember(ctx, prompt[:end], wait=False)
                assert (again.n_tokens, again.new_tokens) == (end, 0)
                assert store.find(other, prompt).n_tokens == before
                assert store.stats().pending_bytes > 0
                ctx.decode([1], 1)  # goes on meanwhile, and overwrites nothing that was copied
                ctx.seq_rm(1)
                gate.set()
                assert store.flush(30)
        for place in ("once", "behind"):
            assert not list((tmp_path / place).rglob(".*.part"))
        files = [
            {path.name: path.read_bytes() for path in (tmp_path / place).glob("??/*")}
            for place in ("once", "behind")
        ]
        assert files[0] == files[1]
        assert store.verify().ok
        assert store.recall(other, [*prompt, 1]).n_past == once.find(ctx, [*prompt, 1]).n_tokens


def test_dropped(model: ls.Model, tmp_path: Path) -> None:
    """What has no room to wait is dropped and counted, and can be remembered later."""
    prompt = tokens(1, 150, model.n_vocab)
    place = f"file://{tmp_path}?size=1GiB"
    with (
        model.context(n_ctx=320) as ctx,
        PrefixStore(place, chunk_tokens=CHUNK, pending_bytes=100) as store,
    ):
        ctx.decode(prompt)
        assert store.remember(ctx, prompt, wait=False).n_tokens == 0
        assert store.stats().dropped > 0
        assert not store.flush()
        assert store.flush()
        assert store.remember(ctx, prompt).n_tokens == 150
        assert store.verify().ok


def test_forgotten_while_it_waits(model: ls.Model, tmp_path: Path) -> None:
    """What is forgotten does not come back; close writes what waits."""
    prompt = tokens(1, 150, model.n_vocab)
    place = f"file://{tmp_path}?size=1GiB"
    with model.context(n_ctx=320) as ctx:
        ctx.decode(prompt)
        with PrefixStore(place, chunk_tokens=CHUNK) as store:
            store.remember(ctx, prompt, wait=False)
            assert store.forget(ctx, prompt) > 0
            assert store.flush()
            assert not store.entries()
            store.remember(ctx, prompt, wait=False)
        with PrefixStore(place, chunk_tokens=CHUNK) as store:
            assert [entry.n_tokens for entry in store.entries()] == [150]


def rows_kept(store: PrefixStore) -> int:
    """The tokens of all rows that are stored, those that are stored twice counted twice."""
    return sum(
        stored.name.n_positions for stored in store._backend.entries() if stored.name.kind == "R"
    )


@pytest.mark.parametrize("shared", [2 * CHUNK + 50, 2 * CHUNK + 20, 2 * CHUNK + 2])
@pytest.mark.parametrize("own", [5, 30, 70])
def test_many_chats(model: ls.Model, tmp_path: Path, shared: int, own: int) -> None:
    """What chats have in common is kept once, and at most one chunk of it twice."""
    n_chats = 6
    with (
        model.context(n_ctx=320) as ctx,
        PrefixStore(tmp_path, capacity_bytes=1 << 30, chunk_tokens=CHUNK) as store,
    ):
        system = tokens(1, shared, ctx.n_vocab)
        store.prefill(ctx, system)
        for chat in range(n_chats):
            ctx.clear()
            question = [chat, *tokens(100 + chat, own - 1, ctx.n_vocab)]
            recalled = store.prefill(ctx, [*system, *question])
            assert recalled.n_past == shared or ctx.arch not in CUTTABLE
        assert store.verify().ok
        if ctx.arch in CUTTABLE:
            few = CHUNK // 16 - 1  # so few that they share do not have a chunk of their own
            tail = shared % CHUNK
            most = 0 if tail >= CHUNK // 2 else CHUNK if tail > few else few * n_chats
            assert shared + n_chats * own <= rows_kept(store) <= shared + n_chats * own + most


def test_growing(model: ls.Model, tmp_path: Path) -> None:
    """A conversation that grows by a few tokens at a time is kept once, in no small pieces."""
    with (
        model.context(n_ctx=320) as ctx,
        PrefixStore(tmp_path, capacity_bytes=1 << 30, chunk_tokens=CHUNK) as store,
    ):
        prompt = tokens(1, 300, ctx.n_vocab)
        for end in range(10, 301, 10):
            ctx.decode(prompt[end - 10 : end])
            assert store.remember(ctx, prompt[:end]).n_tokens == end
        assert store.verify().ok
        if ctx.arch in CUTTABLE:
            assert rows_kept(store) == 300
            (entry,) = store.entries()
            assert len(list(store._tree().chunks(bytes.fromhex(entry.key)))) <= 300 // (CHUNK // 2)


def test_other_chunks(model: ls.Model, tmp_path: Path) -> None:
    """Stores with chunks of other sizes in one folder do not break each other's chains."""
    prompt = tokens(1, 200, model.n_vocab)
    with model.context(n_ctx=320) as ctx:
        ctx.decode(prompt)
        for size in (24, CHUNK, 100, 16):
            with PrefixStore(tmp_path, capacity_bytes=1 << 30, chunk_tokens=size) as store:
                assert store.remember(ctx, prompt).n_tokens == 200
                assert store.verify().ok


def test_evicted_meanwhile(
    model: ls.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another process evicts a chain that is being gone on from, nothing goes on from it."""
    prompt = tokens(1, 3 * CHUNK, model.n_vocab)
    options: dict[str, Any] = {"capacity_bytes": 1 << 30, "chunk_tokens": CHUNK}
    take = Prefixes.take
    with (
        model.context(n_ctx=320) as ctx,
        PrefixStore(tmp_path, **options) as store,
        PrefixStore(tmp_path, **options) as other,
    ):
        ctx.decode(prompt[: 2 * CHUNK])
        store.remember(ctx, prompt[: 2 * CHUNK])
        ctx.decode(prompt[2 * CHUNK :])

        def late(prefixes: Prefixes, *arguments: Any, **more: Any) -> None:
            assert other.evict(0) > 0
            take(prefixes, *arguments, **more)

        with monkeypatch.context() as patched:
            patched.setattr(Prefixes, "take", late)
            assert store.remember(ctx, prompt).new_tokens == 0 or ctx.arch not in CUTTABLE
        assert store.verify().ok or ctx.arch not in CUTTABLE
        assert store.remember(ctx, prompt).n_tokens == len(prompt)
        assert store.verify().ok


def test_gone_on_from_meanwhile(
    model: ls.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short end that another process goes on from stays, though what is written has all of it."""
    prompt = tokens(1, CHUNK, model.n_vocab)
    others = [*prompt[:20], *tokens(2, 20, model.n_vocab)]
    take = Prefixes.take
    with (
        model.context(n_ctx=320) as ctx,
        model.context(n_ctx=320) as second,
        PrefixStore(tmp_path, capacity_bytes=1 << 30, chunk_tokens=CHUNK) as store,
        PrefixStore(tmp_path, capacity_bytes=1 << 30, chunk_tokens=20) as other,
    ):
        ctx.decode(prompt[:20])
        store.remember(ctx, prompt[:20])
        ctx.decode(prompt[20:])
        second.decode(others)

        def late(prefixes: Prefixes, *arguments: Any, **more: Any) -> None:
            monkeypatch.setattr(Prefixes, "take", take)
            assert other.remember(second, others).n_tokens == len(others)
            take(prefixes, *arguments, **more)

        monkeypatch.setattr(Prefixes, "take", late)
        assert store.remember(ctx, prompt).n_tokens == len(prompt)
        assert store.verify().ok
        assert other.find(ctx, [*others, 1]).n_tokens == len(others) or ctx.arch not in CUTTABLE


def test_a_chat_goes_on_beside_another(model: ls.Model, store: PrefixStore) -> None:
    """All of a chat is found, also where another one cut its first chunk; nothing is kept twice."""
    if model.arch not in CUTTABLE:
        return  # a restore point is needed where they part
    system = tokens(1, 22, model.n_vocab)
    chats = [[*system, *tokens(2 + n, 8, model.n_vocab)] for n in range(2)]
    with model.context(n_ctx=320) as ctx:
        for turn in range(3):
            for n, chat in enumerate(chats):
                recalled = store.prefill(ctx, chat)
                known = len(chat) - 20 if turn else (0, len(system))[n]
                assert recalled.n_past >= known, recalled.why
                chat += tokens(10 + turn + 4 * n, 20, model.n_vocab)
    assert sorted(entry.n_tokens for entry in store.entries()) == [70, 70]
    assert store.verify().ok
