"""A store in several places, with real contexts: what one place has is a hit, and kept nearer."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

import llama_state as ls
from llama_state.store import PrefixStore
from llama_state.store.places.folder import FolderBackend
from llama_state.testing.conformance import nmse
from tests.context.oracle import differences
from tests.io.faults import FILES, failing_calls
from tests.libllama import MODELS

pytestmark = pytest.mark.libllama

CHUNK = 64
N = 200
MEMORY = "memory:?size=64MiB"


def tokens(model: ls.Model, n: int = N) -> list[int]:
    """Some tokens."""
    random = Random(n)
    return [random.randrange(model.n_vocab) for _ in range(n)]


def folder(path: Path) -> str:
    """A place in a folder."""
    return f"file://{path}?size=64MiB"


def stored(*places: str, **options: Any) -> PrefixStore:
    """A store in these places."""
    return PrefixStore(places, chunk_tokens=CHUNK, **options)


def files(path: Path) -> list[Path]:
    """The files of all objects in a folder."""
    return sorted(path.glob("??/*.*"))


def assert_same(expected: ls.Context, actual: ls.Context, model: ls.Model, folder: Path) -> None:
    """What tokens see of two contexts is the same; some builds write more in front of a window."""
    if actual.seq_snapshot(0) != expected.seq_snapshot(0):
        assert not differences(expected, actual, 0, model, folder)


@pytest.fixture
def dense() -> ls.Model:
    """A model whose memory can be cut."""
    return MODELS["llama-dense"]


@pytest.mark.parametrize("near", ["memory", "folder"])
def test_kept_nearer(model: ls.Model, tmp_path: Path, near: str) -> None:
    """A hit from the far place, after the near one is emptied; the next one is from the near."""
    prompt = tokens(model)
    place = MEMORY if near == "memory" else folder(tmp_path / "near")
    with (
        model.context(n_ctx=320) as ctx,
        model.context(n_ctx=320) as other,
        stored(place, folder(tmp_path / "far")) as store,
    ):
        ctx.decode(prompt)
        store.remember(ctx, prompt)
        before = store.stats()
        assert before.places[0].used_bytes > 0 < before.places[1].used_bytes
        assert before.used_bytes == sum(each.used_bytes for each in before.places)
        far = FolderBackend(tmp_path / "far", 1 << 26)
        nearest = store._backend.tiers[0].backend
        there = {each.name for each in nearest.entries()}
        assert there == {each.name for each in far.entries()}
        nearest.evict(0)
        assert not list(nearest.entries())
        found = store.recall(other, [*prompt, 1])
        assert (found.n_past, found.why.reason) == (N, "all")
        assert_same(ctx, other, model, tmp_path)
        assert store.flush()
        read = {each.name for each in nearest.entries()}
        assert {name for name in there if name.kind in "NRS"} <= read <= there
        assert store.stats().places[0].kept == len(read)

        def no(*_: object) -> None:
            raise AssertionError("the far place was read")

        far_one: Any = store._backend.tiers[1].backend
        far_one.open = far_one.head = no
        other.clear()
        assert store.recall(other, [*prompt, 1]).n_past == N
        assert_same(ctx, other, model, tmp_path)
        assert not store.stats().failures
        assert [entry.n_tokens for entry in store.entries()] == [N]


@pytest.mark.parametrize("at", [-1, 60])
@pytest.mark.parametrize("which", ["near", "far"])
def test_damaged(model: ls.Model, tmp_path: Path, which: str, at: int) -> None:
    """Every object of one place is damaged, in its payload or its header: the other has it."""
    prompt = tokens(model)
    places = [folder(tmp_path / name) for name in ("near", "far")]
    with model.context(n_ctx=320) as ctx, model.context(n_ctx=320) as other:
        with stored(*places) as store:
            ctx.decode(prompt)
            store.remember(ctx, prompt)
        damaged = files(tmp_path / which)
        for path in damaged:
            data = bytearray(path.read_bytes())
            data[at] ^= 1
            path.write_bytes(data)
        with stored(*places) as store:
            assert len(store.verify().damaged) == len(damaged)
            assert store.recall(other, [*prompt, 1]).n_past == N
            assert_same(ctx, other, model, tmp_path)
            assert store.flush()
            if which == "near":  # they were in the way, and are replaced by sound ones
                assert store.stats().damaged > 0 < store.stats().places[0].kept
            store.verify(repair=True)
            store.remember(ctx, prompt)
            assert store.verify().ok
            assert [path.name for path in files(tmp_path / "far")] == [
                path.name for path in damaged
            ]


@pytest.mark.parametrize("which", [0, 1])
def test_failing(dense: ls.Model, tmp_path: Path, which: int) -> None:
    """A folder that cannot be read or written any more: the store goes on with the other."""
    prompt = tokens(dense)
    paths = [tmp_path / "near", tmp_path / "far"]
    with dense.context(n_ctx=320) as ctx, stored(*map(folder, paths)) as store:
        store.prefill(ctx, prompt[:100])
        broken = paths[which]
        broken.rename(tmp_path / "away")
        broken.symlink_to(broken)  # every use of it fails
        ctx.clear()
        assert store.prefill(ctx, prompt).n_past == 100
        assert (ctx.n_past(), len(ctx.logits()) > 0) == (N, True)
        ctx.clear()
        assert store.recall(ctx, [*prompt, 1]).n_past == N
        stats = store.stats()
        assert stats.places[1 - which].used_bytes > 0 == stats.places[which].used_bytes
        assert any(str(broken) in kind for kind in stats.failures)
        assert store.pin(ctx, prompt) == N
        assert max(entry.n_tokens for entry in store.entries()) == N
        assert store.remember(ctx, prompt).n_tokens == N
        store.flush()
        # It is there again: what it lacks is written, in the far place at the next time.
        broken.unlink()
        (tmp_path / "away").rename(broken)
        assert store.recall(ctx, [*prompt, 1]).n_past == N
        store.remember(ctx, prompt)
        assert store.flush()
    if which == 1:
        with stored(folder(broken)) as alone, dense.context(n_ctx=320) as other:
            assert alone.recall(other, [*prompt, 1]).n_past == N
            assert alone.verify().ok


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lasting", [False, True])
def test_any_call_failing(dense: ls.Model, tmp_path: Path, *, lasting: bool) -> None:
    """Some call of the system fails, or all from there on: the prompt is there, and right."""
    prompt = tokens(dense)
    paths = [tmp_path / "near", tmp_path / "far"]
    with dense.context(n_ctx=320, flash_attn=False) as ctx:
        ctx.decode(prompt)
        truth = ctx.logits()
        turn = 3
        while True:
            for path in paths:
                shutil.rmtree(path, ignore_errors=True)
            ctx.clear()
            with stored(folder(paths[1])) as store:
                store.prefill(ctx, prompt[:150])
            ctx.clear()
            with stored(*map(folder, paths)) as store:
                with failing_calls(turn, lambda: OSError(5, "x"), FILES, lasting=lasting) as calls:
                    store.prefill(ctx, prompt)
                    store.flush()
                assert nmse(ctx.logits(), truth) < 1e-6
                ctx.clear()
                store.prefill(ctx, prompt)
                store.remember(ctx, prompt)
                assert store.flush() or store.stats().failures
                assert nmse(ctx.logits(), truth) < 1e-6
                store.verify(repair=True)
                assert store.verify().ok
                ctx.clear()
                assert store.recall(ctx, [*prompt, 1]).n_past >= 150
            if not calls.raised:
                break
            turn += 29
        assert turn > 100


def test_near_full(dense: ls.Model, tmp_path: Path) -> None:
    """A near place that is too small keeps what it can; the hit is whole."""
    prompt = tokens(dense)
    with dense.context(n_ctx=320) as ctx, dense.context(n_ctx=320) as other:
        ctx.decode(prompt)
        with stored(folder(tmp_path / "far")) as store:
            store.remember(ctx, prompt)
            small = f"memory:?size={store.stats().used_bytes // 2}"
        with stored(small, folder(tmp_path / "far")) as store:
            for _ in range(2):
                other.clear()
                assert store.recall(other, [*prompt, 1]).n_past == N
                assert store.flush()
            assert_same(ctx, other, dense, tmp_path)
            near, far = store.stats().places
            assert 0 < near.used_bytes <= near.capacity_bytes
            assert near.refused > 0 == far.refused
            assert store.remember(ctx, prompt).new_tokens == 0
            assert store.verify().ok


def test_readonly(dense: ls.Model, tmp_path: Path) -> None:
    """Nothing is written to the folder of a store for reading; memory keeps what was found."""
    prompt = tokens(dense)
    with dense.context(n_ctx=320) as ctx:
        ctx.decode(prompt)
        with stored(folder(tmp_path)) as store:
            store.remember(ctx, prompt[:100])
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with stored(MEMORY, str(tmp_path), readonly=True) as store:
            assert store.remember(ctx, prompt).new_tokens == 0
            ctx.clear()
            assert store.recall(ctx, prompt).n_past == 100
            assert store.flush()
            assert store.stats().places[0].kept > 0
            assert store.forget(ctx, prompt) == 0
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_forget(dense: ls.Model, tmp_path: Path) -> None:
    """What is forgotten is in no place any more, also what waits to be kept nearer."""
    prompt = tokens(dense)
    with dense.context(n_ctx=320) as ctx:
        ctx.decode(prompt)
        with stored(folder(tmp_path)) as store:
            store.remember(ctx, prompt)
        with stored(MEMORY, folder(tmp_path)) as store:
            ctx.clear()
            assert store.recall(ctx, [*prompt, 1]).n_past == N
            assert store.forget(ctx, prompt) > 0
            assert store.flush()
            assert not store.entries()
            assert store.evict(0) == 0 or not store.stats().places[0].used_bytes
            assert store.recall(ctx, [*prompt, 1]).why.reason == "held"
            ctx.clear()
            assert not store.recall(ctx, [*prompt, 1]).n_past
