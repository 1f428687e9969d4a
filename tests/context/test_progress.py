"""Progress: every step is told, and what is raised at any of them leaves everything as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama_state as ls
from llama_state import cli
from llama_state._io import lease
from llama_state.cli.progress import shown

pytestmark = pytest.mark.libllama

PIECE = 16384
Save = Callable[..., int]
Load = Callable[..., ls.Restored]


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def source(llama: ls.Model) -> Iterator[ls.Context]:
    with llama.context(n_ctx=256) as ctx:
        ctx.decode(range(100))
        yield ctx


@pytest.fixture(scope="module")
def target(llama: ls.Model) -> Iterator[ls.Context]:
    with llama.context(n_ctx=256) as ctx:
        ctx.decode(range(30))
        yield ctx


@pytest.fixture(params=["whole", "sequence"])
def scope(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["mapped", "copied"])
def small_pieces(
    request: pytest.FixtureRequest, small_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small pieces, and files read in one of the two ways."""
    worth = 0 if request.param == "mapped" else 1 << 40
    monkeypatch.setattr(lease, "_WORTH_MAPPING", worth)


def methods(ctx: ls.Context, scope: str) -> tuple[Save, Load]:
    if scope == "whole":
        return ctx.save_state, ctx.load_state
    return ctx.seq_save_state, ctx.seq_load_state


def stopping_at(step: int) -> Callable[[int, int], None]:
    calls = iter(range(step))

    def progress(done: int, total: int) -> None:
        if next(calls, None) is None:
            raise Interrupted

    return progress


def assert_steps(steps: list[tuple[int, int]], nbytes: int) -> None:
    done = [step[0] for step in steps]
    assert {total for _, total in steps} == {nbytes}
    assert (done[0], done[-1]) == (0, nbytes)
    assert all(0 <= b - a <= PIECE for a, b in pairwise(done))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("memory_limit", [None, 0])
def test_every_step_is_told(
    source: ls.Context,
    target: ls.Context,
    scope: str,
    memory_limit: int | None,
    tmp_path: Path,
) -> None:
    """From nothing to all, in steps no longer than a piece."""
    save, _ = methods(source, scope)
    _, load = methods(target, scope)
    steps: list[tuple[int, int]] = []

    def progress(*step: int) -> None:
        steps.append(step)  # type: ignore[arg-type]

    options: dict[str, Any] = {"progress": progress, "memory_limit": memory_limit}
    nbytes = save(tmp_path / "state", tokens=range(7), durable=False, **options)
    assert_steps(steps, nbytes)
    assert len(steps) > 5
    steps.clear()
    assert load(tmp_path / "state", **options).nbytes == nbytes
    assert_steps(steps, nbytes)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("memory_limit", [None, 0])
def test_a_save_that_is_stopped(
    source: ls.Context, scope: str, memory_limit: int | None, tmp_path_factory: Any
) -> None:
    """Stopped at any step: the old file, nothing beside it, the context as it was."""
    before = source.snapshot()
    save, _ = methods(source, scope)

    @given(step=st.integers(0, 12), old=st.none() | st.binary(max_size=50))
    def stop(step: int, old: bytes | None) -> None:
        folder = tmp_path_factory.mktemp("stopped")
        path = folder / "state"
        if old is not None:
            path.write_bytes(old)
        stopped = False
        try:
            save(path, progress=stopping_at(step), durable=False, memory_limit=memory_limit)
        except Interrupted:
            stopped = True
        if stopped:
            assert [p.read_bytes() for p in folder.iterdir()] == ([] if old is None else [old])
        else:
            assert [p.name for p in folder.iterdir()] == ["state"]
        assert source.snapshot() == before

    stop()


@pytest.mark.usefixtures("small_pieces")
def test_a_load_that_is_stopped(
    source: ls.Context, target: ls.Context, scope: str, tmp_path: Path
) -> None:
    """Stopped at any step: the context is as it was, and the file can be written to."""
    target.clear()
    target.decode(range(30))
    before = target.snapshot()
    save, _ = methods(source, scope)
    _, load = methods(target, scope)
    path = tmp_path / "state"
    save(path, durable=False)
    step = 0
    while True:
        with suppress(Interrupted):
            load(path, progress=stopping_at(step))
            break
        assert target.snapshot() == before
        with path.open("r+b"):
            step += 1
    assert step > 5
    assert target.n_past() == 100


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("error", [ValueError("mine"), OSError(5, "mine"), KeyboardInterrupt()])
def test_what_is_raised_is_passed_on(
    source: ls.Context, scope: str, error: BaseException, tmp_path: Path
) -> None:
    """Also what looks like an error of the file system is not taken for one."""
    save, load = methods(source, scope)
    save(tmp_path / "state", durable=False)

    def progress(done: int, total: int) -> None:
        if done:
            raise error

    for work in (save, load):
        with pytest.raises(type(error)) as caught:
            work(tmp_path / "state", progress=progress)
        assert caught.value is error


def test_nothing_is_shown_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    """Not at a terminal, nothing is shown unless asked; then lines, ten and one."""
    for enabled in (None, False):
        with shown("saving", enabled=enabled) as progress:
            assert progress is None
    with shown("saving", enabled=True) as progress:
        assert progress is not None
        for done in range(0, 101):
            progress(done << 20, 100 << 20)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"saving: {n} of 100 MiB" for n in range(0, 101, 10)]


def test_a_bar_at_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a terminal there is a bar, with what is being done."""
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with shown("saving") as progress:
        assert progress is not None
        progress(0, 100)
        progress(100, 100)
    assert "saving" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "inspect", "convert"])
def test_commands_at_a_terminal(
    source: ls.Context,
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Commands that read or write whole files show how far they are, on stderr alone."""
    path = tmp_path / "a.llst"
    source.checkpoint().save(path)
    monkeypatch.setitem(sys.modules, "rich.progress", None)  # lines, which are kept
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    arguments = [str(path), str(tmp_path / "native")] if command == "convert" else [str(path)]
    assert cli.main([command, *arguments]) == 0
    out, err = capsys.readouterr()
    assert " of 0 MiB" in err
    assert " MiB" not in out
