"""What a store gives of chains that are damaged, and what it leaves alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state.store import PrefixStore
from llama_state.store.objects import NO_PARENT
from tests.io.faults import failing_calls
from tests.libllama import MODELS

pytestmark = pytest.mark.libllama

CHUNK = 16
PROMPT = [3 + i % 40 for i in range(20 * CHUNK)]
"""Of more chunks than any fixed number of attempts."""
KEYS = (bytes(16), bytes(range(16)))


def opened(folder: Path, **options: Any) -> PrefixStore:
    """Open a store."""
    return PrefixStore(folder, capacity_bytes=1 << 30, chunk_tokens=CHUNK, **options)


def context(kind: str) -> ls.Context:
    """Make a context."""
    return MODELS[kind].context(n_ctx=512, n_threads=1, flash_attn=False)


@pytest.fixture
def ctx() -> Iterator[ls.Context]:
    """A context of a plain model."""
    with context("llama-dense") as ctx:
        yield ctx


def objects(folder: Path, kind: str) -> list[Path]:
    """The files of a kind along the chain."""
    found = {path.name[:64]: path for path in folder.glob(f"??/*.{kind}")}
    every = {path.name[:64]: path for path in folder.glob("??/*.R")}
    (at,) = (path.name.split("-")[1] for path in folder.glob("??/*.N"))
    chain = []
    while at in every:
        chain += [found[at]] if at in found else []
        at = every[at].name.split("-")[1]
    return chain


def damage(path: Path, at: int = -1) -> None:
    """Change a byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    ("kind", "of"), [("llama-dense", "R"), ("gemma3-dense", "W"), ("jamba-dense", "S")]
)
def test_much_is_damaged(kind: str, of: str, tmp_path: Path, *, readonly: bool) -> None:
    """However many objects of a chain are damaged, what lies before them is found.

    Also where nothing can be set aside.
    """
    with context(kind) as ctx, opened(tmp_path) as store:
        for end in range(CHUNK, len(PROMPT) + 1, CHUNK):
            ctx.decode(PROMPT[ctx.n_past() : end])
            store.remember(ctx, PROMPT[:end])
            if of == "S":
                # They would be thinned out.
                for path in objects(tmp_path, "S"):
                    os.utime(path)
        found = objects(tmp_path, of)
        assert len(found) > 3
        for path in found[1:]:
            damage(path)
        with opened(tmp_path, readonly=readonly) as again:
            ctx.clear()
            recalled = again.recall(ctx, PROMPT)
            assert recalled.n_past >= CHUNK
            assert recalled.why.reason == "damaged"
            assert again.stats().damaged
            assert not again.stats().failures


def test_each_is_read_once_more(ctx: ls.Context, tmp_path: Path) -> None:
    """A damaged end does not make a store put the beginning in again and again."""
    with opened(tmp_path) as store:
        store.prefill(ctx, PROMPT)
    for path in objects(tmp_path, "R")[10:]:
        damage(path)
    ctx.clear()
    with opened(tmp_path) as store, failing_calls(1 << 30, KeyboardInterrupt) as calls:
        assert store.recall(ctx, PROMPT).n_past == 10 * CHUNK
    assert calls.count < 50 * len(PROMPT) // CHUNK


def test_written_anew(ctx: ls.Context, tmp_path: Path) -> None:
    """An object that another process evicted and wrote again, in other bytes, is no damage."""
    with opened(tmp_path) as one, opened(tmp_path) as two:
        one.prefill(ctx, PROMPT[:40])
        ctx.clear()
        assert one.recall(ctx, PROMPT).n_past == 40
        before = {path.name: path.read_bytes() for path in objects(tmp_path, "R")}
        two.evict(0)
        ctx.clear()
        for token in PROMPT[:40]:  # one by one: other bytes under the same names
            ctx.decode([token])
        two.remember(ctx, PROMPT[:40])
        after = {path.name: path.read_bytes() for path in objects(tmp_path, "R")}
        assert after.keys() == before.keys()
        assert after != before
        ctx.clear()
        recalled = one.recall(ctx, PROMPT)
        assert recalled.n_past == 40
        assert one.stats().damaged == 0
        assert not list(tmp_path.glob("damaged/*"))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_unreadable_now(
    ctx: ls.Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What cannot be read for the moment is not set aside, and what lies before it is found."""
    with opened(tmp_path) as store:
        store.prefill(ctx, PROMPT)
    third = objects(tmp_path, "R")[2]
    original = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path) == str(third):
            raise OSError(number, os.strerror(number))
        return original(path, *arguments, **options)

    with opened(tmp_path) as store:
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", refuse)
            ctx.clear()
            assert store.recall(ctx, PROMPT).n_past == 2 * CHUNK
            assert len(store.stats().failures) == 1
            with pytest.raises(OSError, match=os.strerror(number)):
                store.verify(repair=True)
        ctx.clear()
        assert store.recall(ctx, PROMPT).n_past == len(PROMPT) - 1
        assert store.stats().damaged == 0


def test_objects_of_another_key(ctx: ls.Context, tmp_path: Path) -> None:
    """Whoever looks after its own objects leaves those of another key alone."""
    for key in (*KEYS, None):
        ctx.clear()
        with opened(tmp_path, key=key) as store:
            store.prefill(ctx, PROMPT)
    n_each = len(list(tmp_path.glob("??/*.[RN]"))) // 3
    for key in (*KEYS, None):
        with opened(tmp_path, key=key) as store:
            assert [entry.n_tokens for entry in store.entries()] == [len(PROMPT)]
            found = store.verify(repair=True)
            assert found.ok
            assert (found.n_objects, found.foreign) == (3 * n_each, 2 * n_each)
            ctx.clear()
            assert store.recall(ctx, PROMPT).n_past == len(PROMPT) - 1
            assert store.stats().damaged == 0
    # Its own damage is found all the same.
    with opened(tmp_path, key=KEYS[0]) as store:
        own = store.entries()[0].key
        (last,) = tmp_path.glob(f"??/*-{own}-*.R")
        damage(last, 40)
        assert store.verify().damaged == (f"{own}.R",)
        assert store.verify(repair=True).damaged
        assert store.verify().ok
        assert not last.exists()
    assert len(list(tmp_path.glob("??/*.[RN]"))) == 3 * n_each - 1


def test_a_damaged_description(ctx: ls.Context, tmp_path: Path) -> None:
    """A repair sets it aside, and keeps the prompts: they are found without it."""
    with opened(tmp_path) as store:
        store.prefill(ctx, PROMPT)
    (described,) = tmp_path.glob(f"{NO_PARENT.hex()[:2]}/*.N")
    damage(described)
    with opened(tmp_path) as store:
        found = store.verify(repair=True)
        assert [name[-1] for name in found.damaged] == ["N"]
        assert not found.orphans
        assert store.verify().ok
        ctx.clear()
        assert store.prefill(ctx, [*PROMPT, 1]).n_past == len(PROMPT)
        assert [entry.model for entry in store.entries()] == ["llama"]


def test_orphans_of_its_own(ctx: ls.Context, tmp_path: Path) -> None:
    """What nothing leads to is removed, and only what this store can read."""
    for key in KEYS:
        ctx.clear()
        with opened(tmp_path, key=key) as store:
            store.prefill(ctx, PROMPT)
    paths = {path.name: path for path in tmp_path.glob("??/*.R")}
    (first,) = (path for path in paths.values() if path.name[:64] == _root_of(tmp_path, KEYS[0]))
    first.unlink()
    with opened(tmp_path, key=KEYS[1]) as store:
        found = store.verify(repair=True)
        assert found.ok
    with opened(tmp_path, key=KEYS[0]) as store:
        found = store.verify(repair=True)
        assert len(found.orphans) == len(PROMPT) // CHUNK - 1
        assert store.verify().ok


def _root_of(folder: Path, key: bytes) -> str:
    with opened(folder, key=key) as store:
        tree = store._tree()
        roots = (path.name.split("-")[1] for path in folder.glob("??/*.N"))
        return next(root for root in roots if tree._header(tree._nodes[bytes.fromhex(root)]))
