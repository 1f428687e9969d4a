"""Tenants of one store: what each finds, sees and can do, with keys of its own and a shared one."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

import llama_state as ls
from llama_state.store import PrefixStore
from llama_state.store.objects import Kind, Name, pack
from llama_state.store.places.backend import name_of
from llama_state.store.places.folder import FolderBackend
from llama_state.store.trust import Trust
from llama_state.testing.conformance import nmse, nmse_limit
from tests.context.oracle import LIMIT

pytestmark = pytest.mark.libllama

ALICE, BOB, PUBLIC = (hashlib.sha256(text).digest() for text in (b"alice", b"bob", b"public"))
CHUNK = 16
N = 40
"""Tokens of the shared part: two chunks and a half."""

SMALL = {"n_ctx": 320, "swa_full": False}
KINDS = ["llama-dense", "jamba-dense", "gemma3-dense"]


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def encrypt(request: pytest.FixtureRequest) -> bool:
    """Whether objects are encrypted."""
    return bool(request.param)


def opened(folder: Path, key: bytes | None, n: int = 0, **options: object) -> PrefixStore:
    """The store of a tenant; with the first *n* tokens under the shared key."""
    made = {"capacity_bytes": 1 << 28, "chunk_tokens": CHUNK, **options}
    if n:
        made |= {"shared_key": PUBLIC, "shared_tokens": n}
    return PrefixStore(folder, key=key, **made)  # type: ignore[arg-type]


def some(seed: int, n: int, n_vocab: int) -> list[int]:
    """Some tokens, the same ones for the same seed."""
    random = Random(seed)
    return [random.randrange(n_vocab) for _ in range(n)]


def names(folder: Path) -> set[Name]:
    """The names of all objects in a folder."""
    found = (name_of(path.name) for path in folder.glob("??/*"))
    return {name for name in found if name is not None}


def keys(named: set[Name]) -> set[bytes]:
    """All keys in names, but that which stands for none."""
    return {key for name in named for key in (name.key, name.parent)} - {bytes(32)}


def evaluated(store: PrefixStore, ctx: ls.Context, prompt: list[int]) -> int:
    """Prefill, and return how many tokens were decoded."""
    ctx.clear()
    decoded = len(prompt) - len(store.prefill(ctx, prompt).tokens)
    assert ctx.n_past() == len(prompt)
    assert not store.stats().failures
    return decoded


def test_keys_of_their_own(llama: ls.Model, tmp_path: Path, encrypt: bool) -> None:
    """Nobody finds or sees what another has: 0 hits, 0 names in common; each finds its own."""
    prompt = some(1, 100, llama.n_vocab)
    with llama.context(n_ctx=320) as ctx:
        seen: list[set[bytes]] = []
        for key in (ALICE, BOB, None):
            before = names(tmp_path)
            with opened(tmp_path, key, encrypt=encrypt and key is not None) as store:
                assert store.find(ctx, prompt).n_tokens == 0
                assert store.entries() == []
                assert evaluated(store, ctx, prompt) == 100
                assert evaluated(store, ctx, prompt) == 1
                assert [entry.n_tokens for entry in store.entries()] == [100]
            seen.append(keys(names(tmp_path) - before))
        assert all(seen)
        assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]
        for key in (ALICE, BOB, None):
            with opened(tmp_path, key, encrypt=encrypt and key is not None) as store:
                assert store.find(ctx, prompt).n_tokens == 99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swa_full", [False, True])
def test_exactly_the_shared_part(
    library: ls.Library, tmp_path: Path, kind: str, swa_full: bool, encrypt: bool
) -> None:
    """Another tenant gets the shared part and no token more, of the same prompt and of others."""
    from tests.libllama import MODELS

    model, own = MODELS[kind], {ALICE: set[Name](), BOB: set[Name]()}
    public, private = some(1, N, model.n_vocab), some(2, 260, model.n_vocab)
    with model.context(n_ctx=320, swa_full=swa_full) as ctx:
        for tenant in (ALICE, BOB):
            before = names(tmp_path)
            with opened(tmp_path, tenant, N, encrypt=encrypt) as store:
                first = evaluated(store, ctx, [*public, *private])
                assert first == (N + 260 if tenant == ALICE else 260)
                logits = memoryview(bytes(ctx.logits())).cast("f")
                assert evaluated(store, ctx, [*public, *private]) <= 1
                assert nmse(ctx.logits(), logits) <= max(LIMIT, nmse_limit(ctx.arch))
                assert evaluated(store, ctx, [*public, *some(3, 9, ctx.n_vocab)]) == 9
                n_tokens = sorted(entry.n_tokens for entry in store.entries())
                assert n_tokens == [N + 9, N + 260]
                assert store.verify().ok
            own[tenant] = names(tmp_path) - before
        assert not keys(own[BOB]) & keys(own[ALICE])
        assert {name.kind for name in own[BOB]} <= {"R", "W", "S", "L"}
        with opened(tmp_path, PUBLIC, encrypt=encrypt) as store:
            assert [entry.n_tokens for entry in store.entries()] == [N]
            assert store.find(ctx, [*public, *private]).n_tokens == N


def test_the_end_of_the_shared_part_stays(library: ls.Library, tmp_path: Path) -> None:
    """Restore points are thinned as a chain grows, but not the one that others go on from."""
    from tests.libllama import MODELS

    with MODELS["jamba-dense"].context(n_ctx=640) as ctx:
        public = some(1, N, ctx.n_vocab)
        prompt = [*public, *some(2, 400, ctx.n_vocab)]
        with opened(tmp_path, ALICE, N) as store:
            for end in range(N + 30, len(prompt), 30):
                evaluated(store, ctx, prompt[:end])
            entry = store.entries()[0]
            assert N in entry.restore_points
            assert len(entry.restore_points) < 12
        with opened(tmp_path, BOB, N) as store:
            assert evaluated(store, ctx, [*public, *some(3, 60, ctx.n_vocab)]) == 60


def test_short_prompts(llama: ls.Model, tmp_path: Path) -> None:
    """A prompt that is shorter than the shared part, or ends with it, is under the shared key."""
    with llama.context(n_ctx=320) as ctx:
        public = some(1, N, ctx.n_vocab)
        for end in (1, 20, N):
            with opened(tmp_path, ALICE, N) as store:
                evaluated(store, ctx, public[:end])
            with opened(tmp_path, BOB, N) as store:
                assert store.find(ctx, [*public[:end], 0]).n_tokens == end


def test_media_across_the_end(llama: ls.Model, tmp_path: Path) -> None:
    """An image that begins in the shared part and ends behind it is the tenant's."""
    with llama.context(n_ctx=320) as ctx:
        text = some(1, 100, ctx.n_vocab)
        prompt = [*text[:20], ls.Media(bytes(16), 30), *text[50:]]
        ctx.decode(text)  # as if a binding had evaluated the image
        with opened(tmp_path, ALICE, N) as store:
            assert store.remember(ctx, prompt).n_tokens == len(prompt)
            assert store.remember(ctx, text).n_tokens == 100  # goes on from there otherwise
            ctx.clear()
            assert store.recall(ctx, prompt).n_past == 99
            assert store.verify().ok
        with opened(tmp_path, BOB, N) as store:
            assert store.find(ctx, prompt).n_tokens == 20
            assert store.find(ctx, text).n_tokens == N


def test_who_writes_the_shared_part(llama: ls.Model, tmp_path: Path, encrypt: bool) -> None:
    """Who has the shared key alone writes it for all, also while they have it read-only."""
    with llama.context(n_ctx=320) as ctx:
        public = some(1, N, ctx.n_vocab)
        with opened(tmp_path, PUBLIC, encrypt=encrypt) as store:
            evaluated(store, ctx, public)
            evaluated(store, ctx, [*public, *some(9, 30, ctx.n_vocab)])
        before = names(tmp_path)
        with opened(tmp_path, ALICE, N, encrypt=encrypt, readonly=True) as store:
            assert evaluated(store, ctx, [*public, *some(2, 60, ctx.n_vocab)]) == 60
        assert names(tmp_path) == before
        with opened(tmp_path, ALICE, N, encrypt=encrypt) as store:
            assert evaluated(store, ctx, [*public, *some(2, 60, ctx.n_vocab)]) == 60
            assert store.stats().damaged == 0
            assert store.verify(repair=True).ok
            assert before <= names(tmp_path)


def test_other_lengths_of_the_shared_part(llama: ls.Model, tmp_path: Path) -> None:
    """Stores that share more or less do not spoil each other, and find the least of both."""
    with llama.context(n_ctx=320) as ctx:
        prompt = some(1, 100, ctx.n_vocab)
        found = {}
        for n in (N, 64, 24, 90):
            with opened(tmp_path, ALICE if n % 16 else BOB, n) as store:
                found[n] = evaluated(store, ctx, prompt)
                assert store.stats().damaged == 0
                assert store.verify(repair=True).ok
        for n in found:
            with opened(tmp_path, ALICE if n % 16 else BOB, n) as store:
                assert evaluated(store, ctx, prompt) == 1
                assert store.stats().damaged == 0
        assert not list((tmp_path / "damaged").glob("*")) if (tmp_path / "damaged").exists() else 1


@pytest.fixture
def filled(llama: ls.Model, tmp_path: Path) -> Iterator[tuple[ls.Context, list[int]]]:
    """A context, and a prompt of which a tenant has stored the shared part, and its own."""
    with llama.context(n_ctx=320) as ctx, opened(tmp_path, ALICE, N) as store:
        prompt = some(1, 100, ctx.n_vocab)
        evaluated(store, ctx, prompt)
        yield ctx, prompt


def forged(
    folder: Path, secret: bytes, parent: bytes, words: list[int], end: int, **change: int
) -> Name:
    """Put an object into a folder that somebody made with a key that is not the tenant's."""
    trust = Trust(secret)
    packed = struct.pack(f"<{len(words)}i", *words)
    n = change.get("n_positions", len(words))
    name = Name(parent, trust.at(end).keys.next(parent, n, packed), n, "R")
    options = {"first": end - n, "end": end, "session_version": 11, "keyed": True}
    place = FolderBackend(folder, 1 << 28)
    root = next(name.key for name in names(folder) if name.kind == "N")
    payload = b"what the victim is to continue"
    place.remove(name)
    assert place.put(name, pack(name, root, packed, [payload], trust.at(end).seal, **options))  # type: ignore[arg-type]
    return name


def chain(folder: Path, prompt: list[int], kind: Kind = "R") -> dict[int, Name]:
    """The objects of a prompt, by their ends, as the tenant ALICE names them."""
    trust, found = Trust(ALICE, PUBLIC, N), {}
    by_parent = {}
    for name in names(folder):
        by_parent.setdefault(name.parent, []).append(name)
    from llama_state.store.prompt import Prompt

    whole = Prompt.of(prompt)
    at = next(name.key for name in names(folder) if name.kind == "N")
    end = 0
    while end < len(prompt):
        at = trust.onward(at, end, whole)
        name = next(each for each in by_parent[at] if each.kind == kind)
        at, end = name.key, end + name.n_positions
        found[end] = name
    return found


def test_planted_behind_the_shared_part(
    filled: tuple[ls.Context, list[int]], tmp_path: Path
) -> None:
    """Who has the shared key cannot make an object that another tenant goes on with."""
    ctx, prompt = filled
    objects = chain(tmp_path, prompt)
    other = [*prompt[:N], *some(5, 60, ctx.n_vocab)]
    words = other[N : N + CHUNK]
    end_of_shared = objects[N].key
    first_own = objects[N + CHUNK].parent
    assert first_own != end_of_shared
    for secret in (PUBLIC, BOB):
        for parent in (end_of_shared, first_own):
            for end, n in ((N + CHUNK, CHUNK), (N, CHUNK), (N, 0), (N - CHUNK, CHUNK), (N, 1)):
                for some_words in (words, []):
                    name = forged(tmp_path, secret, parent, some_words, end, n_positions=n)
                    with opened(tmp_path, ALICE, N) as store:
                        assert store.find(ctx, other).n_tokens == N
                        assert store.recall(ctx, other).n_past == N
                    FolderBackend(tmp_path, 1 << 28).remove(name)
                forged(tmp_path, secret, parent, words, end, n_positions=n)
    for tenant in (ALICE, BOB):
        with opened(tmp_path, tenant, N) as store:
            assert store.find(ctx, other).n_tokens == N
            assert evaluated(store, ctx, other) == 60
            assert evaluated(store, ctx, other) == 1


def test_planted_beside_what_is_there(filled: tuple[ls.Context, list[int]], tmp_path: Path) -> None:
    """No object in the place of a tenant's own: of the same name, made with the shared key."""
    ctx, prompt = filled
    objects = chain(tmp_path, prompt)
    victim = objects[N + CHUNK]
    place = FolderBackend(tmp_path, 1 << 28)
    words = struct.pack(f"<{CHUNK}i", *prompt[N : N + CHUNK])
    root = next(name.key for name in names(tmp_path) if name.kind == "N")
    for end in (N + CHUNK, N):
        place.remove(victim)
        options = {"first": end - CHUNK, "end": end, "session_version": 11, "keyed": True}
        seal = Trust(PUBLIC).at(end).seal
        assert place.put(victim, pack(victim, root, words, [b"forged"], seal, **options))  # type: ignore[arg-type]
        with opened(tmp_path, ALICE, N) as store:
            assert store.find(ctx, prompt).n_tokens == N
            assert evaluated(store, ctx, prompt) == 60
            assert evaluated(store, ctx, prompt) == 1


def test_no_test_of_a_guess(filled: tuple[ls.Context, list[int]], tmp_path: Path) -> None:
    """A chunk of the shared key that says that it is shorter than its tokens takes no one along.

    A tenant whose own tokens were guessed would go on from it, and its key would be in a name.
    """
    ctx, prompt = filled
    objects = chain(tmp_path, prompt)
    before = objects[N].parent
    start = N - objects[N].n_positions
    bait = forged(tmp_path, PUBLIC, before, prompt[start : N + 5], N, n_positions=N - start)
    with opened(tmp_path, ALICE, N) as store:
        evaluated(store, ctx, [*prompt[: N + 5], 1, 2, 3])
    trust = Trust(ALICE, PUBLIC, N)
    assert not {bait.key, *trust.onwards(bait.key, N)} & {name.parent for name in names(tmp_path)}


def test_nobody_is_set_aside(filled: tuple[ls.Context, list[int]], tmp_path: Path) -> None:
    """What one tenant looks after, mends or forgets leaves that of another where it is."""
    ctx, prompt = filled
    of_alice = names(tmp_path)
    with opened(tmp_path, BOB, N) as store:
        evaluated(store, ctx, prompt)
        verified = store.verify(repair=True)
        assert verified.ok
        assert verified.foreign > 0
        assert of_alice <= names(tmp_path)
        assert [entry.n_tokens for entry in store.entries()] == [100]
        assert store.forget(ctx, prompt) > 0
        assert store.find(ctx, prompt).n_tokens == N
        assert names(tmp_path) == of_alice
    with opened(tmp_path, ALICE, N) as store:
        assert evaluated(store, ctx, prompt) == 1
        store.forget(ctx, prompt)
        assert store.find(ctx, prompt).n_tokens == N
        store.forget(ctx, prompt[:N])
        assert not [name for name in names(tmp_path) if name.kind != "N"]


def test_pinned(filled: tuple[ls.Context, list[int]], tmp_path: Path) -> None:
    """A pinned shared part stays for all; without it what goes on from it is found again later."""
    ctx, prompt = filled
    of_alice = {each.key for end, each in chain(tmp_path, prompt).items() if end > N}
    shared = {each for end, each in chain(tmp_path, prompt).items() if end <= N}
    with opened(tmp_path, ALICE, N) as store:
        for name in shared:
            FolderBackend(tmp_path, 1 << 28).remove(name)
        assert store.find(ctx, prompt).n_tokens == 0
        assert of_alice <= keys(names(tmp_path))
        evaluated(store, ctx, prompt[:N])
        assert store.find(ctx, prompt).n_tokens == 99
        assert store.pin(ctx, prompt[:N]) == N
        store.evict(0)
        assert not of_alice & keys(names(tmp_path))
    with opened(tmp_path, BOB, N) as store:
        assert store.find(ctx, prompt).n_tokens == N


def test_damage(filled: tuple[ls.Context, list[int]], tmp_path: Path) -> None:
    """What is damaged, of the shared part or one's own, costs what is behind it, and mends."""
    ctx, prompt = filled
    ends = [0, *sorted(chain(tmp_path, prompt))]
    for before, end in pairwise(ends):
        for at in (24, 170, 4200):
            path = next(tmp_path.glob(f"??/{chain(tmp_path, prompt)[end].parent.hex()}-*.R"))
            data = bytearray(path.read_bytes())
            data[at] ^= 1
            path.write_bytes(data)
            with opened(tmp_path, ALICE, N) as store:
                assert evaluated(store, ctx, prompt) == 100 - before
                assert store.stats().damaged == 1
                assert evaluated(store, ctx, prompt) == 1


def test_dropped_key(llama: ls.Model, tmp_path: Path) -> None:
    """Of an encrypted store nothing can be read without the key, not even a token."""
    with llama.context(n_ctx=320) as ctx:
        prompt = some(1, 100, ctx.n_vocab)
        with opened(tmp_path, ALICE, N, encrypt=True) as store:
            evaluated(store, ctx, prompt)
        whole = b"".join(path.read_bytes() for path in tmp_path.glob("??/*"))
        for n in range(0, 96, 4):
            assert struct.pack("<4i", *prompt[n : n + 4]) not in whole
        assert b"architecture" not in whole
        for options in (
            {"key": PUBLIC, "encrypt": True},
            {"key": BOB, "n": N, "encrypt": True},
            {"key": ALICE},
            {"key": ALICE, "n": N},
            {"key": None},
        ):
            with opened(tmp_path, **options) as store:  # type: ignore[arg-type]
                found = store.find(ctx, prompt).n_tokens
                assert found == (N if options.get("key") != ALICE and "encrypt" in options else 0)
                assert sum(entry.n_tokens for entry in store.entries()) == found
                assert store.verify(repair=True).ok
        with opened(tmp_path, ALICE, N, encrypt=True) as store:
            assert evaluated(store, ctx, prompt) == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"shared_tokens": 5}, "shared_tokens without key"),
        ({"shared_tokens": 5, "key": ALICE}, "shared_tokens without shared_key"),
        ({"shared_tokens": 5, "shared_key": PUBLIC}, "shared_tokens without key"),
        ({"key": ALICE, "shared_key": PUBLIC}, "shared_key without shared_tokens"),
        ({"key": ALICE, "shared_key": ALICE, "shared_tokens": 5}, "the same"),
        ({"key": ALICE, "shared_key": b"short", "shared_tokens": 5}, "16 bytes or more"),
        ({"encrypt": True}, "encrypt=True needs a key"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, object], why: str) -> None:
    """What is of no use without something else is refused, and says what that is."""
    with pytest.raises(ValueError, match=why):
        PrefixStore(tmp_path / "kv", capacity_bytes=1 << 20, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "kv").exists()
