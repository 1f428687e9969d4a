"""Whatever is passed: an error that names the argument, and nothing has changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import llama_state as ls

from .argument_cases import ALL, DANGEROUS, World, rows, wrongs

pytestmark = pytest.mark.libllama


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("arguments"))
    yield made
    made.close()


def test_every_function_has_a_valid_call(world: World) -> None:
    """A new public function needs one."""
    assert set(ALL.names) - set(world.calls()) - {"describe"} == set()


@pytest.mark.parametrize("name", ALL.names)
def test_every_parameter_has_a_row(name: str) -> None:
    """A new parameter needs a row: what it may not be."""
    assert [one for one, bad in rows(name, ALL.functions[name]).items() if bad is None] == []


@pytest.mark.parametrize("name", [n for n in ALL.names if n not in (*DANGEROUS, "describe")])
def test_bad_values_are_refused(world: World, name: str) -> None:
    """The error is ours, a ValueError or a TypeError, and names the argument."""
    assert wrongs(world, name, ALL.functions[name]) == []


@pytest.mark.parametrize("name", DANGEROUS)
def test_bad_values_do_not_kill(name: str) -> None:
    """What llama.cpp would abort on does not reach it."""
    command = [sys.executable, "-m", "tests.context.argument_cases", name]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr[-500:]


def test_positions_say_how_to_write_them(make: Callable[..., ls.Context]) -> None:
    """llama.cpp's -1, a count from the end, and a start behind the end."""
    ctx = make(n_seq_max=2)
    ctx.decode([1, 2, 3, 4])
    for start, end, words in ((0, -1, "leave end out"), (-3, None, "from 0"), (3, 2, "behind end")):
        with pytest.raises(ValueError, match=words):
            ctx.seq_rm(0, start, end)
        with pytest.raises(ValueError, match=words):
            ctx.seq_cp(0, 1, start, end)
    assert (ctx.n_past(0), ctx.n_past(1)) == (4, 0)


def test_mistakes_are_told_what_to_do(world: World) -> None:
    """Text to decode, a path to resume, tokens first in checkpoint, a model as a context."""
    ctx = world.ctx
    for call, words in (
        (lambda: ctx.decode("text"), "tokenize"),
        (lambda: ctx.resume("file"), "Checkpoint.load"),
        (lambda: ctx.resume(b"data"), "Checkpoint.from_bytes"),
        (lambda: ctx.restore("file"), "load_state"),
        (lambda: ctx.checkpoint([1, 2]), "tokens="),
        (lambda: ls.Context(world.model), "Model.context"),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(TypeError, match="positional"):
        ctx.checkpoint(0, [1, 2])  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "enum"),
    [("on", 1), ("off", 0), ("auto", -1), (True, 1), (False, 0), (None, -1), (1, 1), (-1, -1)],
)
def test_flash_attention_is_what_was_said(given: object, enum: int, world: World) -> None:
    """States record the transposed V of a context without it."""
    with world.model.context(n_ctx=256, n_threads=1, flash_attn=given) as ctx:  # type: ignore[arg-type]
        ctx.decode([1, 2])
        caches = ls.layout.parse_whole(
            ctx.snapshot(), version=ctx.library.session_version
        ).geometry.caches
    assert caches[0].v_trans is (enum == 0)


def test_positions_end_before_int32(make: Callable[..., ls.Context]) -> None:
    """The last position is one that llama.cpp can remove again."""
    ctx = make()
    ctx.decode([1])
    blob = bytearray(ctx.snapshot())
    at = blob.index(b"\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00")  # position, owners, id
    blob[at : at + 4] = (2**31 - 3).to_bytes(4, "little")
    ctx.restore(blob)
    ctx.decode([1])
    before = ctx.snapshot()
    with pytest.raises(ls.CapacityError, match="positions"):
        ctx.decode([1])
    assert ctx.snapshot() == before


@pytest.mark.parametrize(
    "given",
    [
        {"n_batch": 2, "n_seq_max": 4},
        {"n_batch": 3, "n_seq_max": 4, "kv_unified": True},
        {"n_ctx": 100, "n_seq_max": 256},
        {"n_ctx": 100, "n_seq_max": 101, "kv_unified": True},
    ],
)
def test_combinations_do_not_kill(given: dict[str, object], world: World) -> None:
    """llama.cpp computes with a token of each sequence at once, and aborts where it cannot."""
    code = (
        "import sys, llama_state as ls\n"
        f"try: ls.Model(sys.argv[1]).context(**{given!r})\n"
        "except ls.CapacityError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(world.model_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith("n_")
