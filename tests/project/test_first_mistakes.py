"""What newcomers type in Python: each mistake gets an error of the right type that says what to do.

A row is what is typed, the error (None: it is right), and words of its text, or of the ``repr`` of
what comes back. After each error the context is as it was. The command has its own table beside
this one.
"""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import llama_state as ls
from llama_state import aio
from llama_state._llama.discovery import advice
from llama_state.testing import write_model

pytestmark = pytest.mark.libllama


class Row(NamedTuple):
    """What is typed, and what comes of it."""

    typed: str
    error: type[BaseException] | None
    words: tuple[str, ...]
    not_words: tuple[str, ...] = ()


def _typed(row: Row) -> str:
    return row.typed


FROM_ZERO = "positions count from 0; to mean the end of a sequence leave end out"

POSITIONS = [
    Row("ctx.seq_rm(0, 4, -1)", ValueError, ("end must be 0 to", FROM_ZERO)),
    Row("ctx.seq_rm(0, -1, -1)", ValueError, ("start must be 0 to", FROM_ZERO)),
    Row("ctx.seq_rm(0, -3)", ValueError, ("start must be 0 to", "not -3", FROM_ZERO)),
    Row("ctx.seq_cp(0, 1, 0, -1)", ValueError, ("end must be 0 to", FROM_ZERO)),
    Row("ctx.seq_cp(0, 1, -1, -1)", ValueError, ("start must be 0 to", FROM_ZERO)),
    Row("ctx.seq_cp(0, 1, -3)", ValueError, ("start must be 0 to", FROM_ZERO)),
    Row("ctx.seq_rm(0, 7, 3)", ValueError, ("start is 7, behind end, which is 3",)),
]

ARGUMENTS = [
    # llama-cpp-python takes bytes here, and only bytes.
    Row('model.tokenize(b"hello")', TypeError, ("text must be a str", "decode it first")),
    Row("ctx.checkpoint(prompt)", TypeError, ("seq_id must be an integer", "tokens=")),
    Row("ctx.checkpoint(0, [1])", TypeError, ("positional", "by name", "tokens")),
    Row('ctx.resume("chat.llst")', TypeError, ("a Checkpoint", "Checkpoint.load(path)")),
    Row('ctx.resume(b"bytes")', TypeError, ("a Checkpoint", "Checkpoint.from_bytes(data)")),
    Row("ls.Context(model)", TypeError, ("Model.context()", "attach()")),
    Row("ls.Context()", TypeError, ("Model.context()", "attach()")),
    Row('ctx.decode("text")', TypeError, ("tokens must be token ids", "Model.tokenize()")),
    Row('ctx.decode(b"abc")', TypeError, ("tokens must be token ids", "Model.tokenize()")),
    Row("ctx.decode([True, False])", TypeError, ("tokens[0] must be an integer", "bool True")),
    Row("ctx.decode(np.array([True]))", TypeError, ("tokens[0] must be an integer",)),
    # None is the default, no tokens: what was a FormatError then is right now.
    Row('ctx.save_state("x", None)', None, ()),
    Row('ctx.save_state("x", "text")', TypeError, ("tokens must be token ids",)),
    Row("ctx.checkpoint(meta=[1])", TypeError, ("meta must be a mapping, not list",)),
    Row("model.context(n_ctx=-1)", ValueError, ("n_ctx must be 0 to", "not -1"), ("need", "have")),
    Row('model.context(n_ctx="512")', TypeError, ("n_ctx must be an integer",), ("tokens=",)),
    Row('ctx.seq_snapshot("0")', TypeError, ("seq_id must be an integer, not str '0'",)),
    Row(
        'model.context(type_v="q8_0", flash_attn=False)',
        ls.ContextError,
        ("flash_attn=False", "type_v='q8_0'", "requires flash_attn"),
        ("type_v=8", "flash_attn=0"),
    ),
    Row('model.context(type_v="q8_9")', ls.UnsupportedError, ("'q8_9'", "q8_0")),
    Row('model.context(flash_attn="yes")', ValueError, ("flash_attn", "'yes'", "auto")),
    # Tokens of another length are warned of, not refused: of images there are more positions.
    Row(
        "ctx.checkpoint(0, tokens=[1])",
        ls.IdentityWarning,
        ("1 token", "10 positions", "tokens="),
    ),
    Row('checkpoint.save("c", key="short")', TypeError, ("key must be bytes, not str",)),
    Row('checkpoint.save("c", key="a long secret text")', TypeError, ("key must be bytes",)),
    Row('checkpoint.save("c", key=b"short")', ValueError, ("16 bytes", "secrets.token_bytes")),
]

FILES = [
    Row(
        'ctx.load_state("chat.llst")',
        ls.FormatError,
        ("chat.llst: this is a checkpoint", "Checkpoint.load()", "Context.resume()"),
    ),
    Row(
        'ls.Checkpoint.load("chat.state")',
        ls.FormatError,
        ("chat.state: this is", "session file", "load_state()", "Checkpoint.from_native()"),
    ),
    Row('ctx.load_state("tiny.gguf")', ls.FormatError, ("tiny.gguf: this is a GGUF", "a model")),
    Row('ls.Checkpoint.load("tiny.gguf")', ls.FormatError, ("tiny.gguf: this is a GGUF",)),
    Row('ctx.load_state("folder")', IsADirectoryError, ("it is a folder", "'folder'")),
    Row('ls.Checkpoint.load("folder")', IsADirectoryError, ("it is a folder", "'folder'")),
    *(
        Row(f'{call}("{name}")', error, (f"{name}: ", *words))
        for call in ("ctx.load_state", "ctx.seq_load_state", "ls.Checkpoint.load", "ls.Model")
        for name, words, error in (
            ("empty", ("the file is empty",), ls.StateError),
            ("cut", (), ls.StateError),
            ("text.txt", ("begins with the bytes",), ls.StateError),
            ("picture.png", ("begins with the bytes",), ls.StateError),
        )
    ),
    Row('ls.Model("folder")', ls.ModelLoadError, ("folder: it is a folder",)),
    Row('ls.Model("fifo")', ls.ModelLoadError, ("fifo: it is not a regular file",)),
    Row('ctx.load_state("fifo")', OSError, ("not a regular file", "'fifo'")),
    Row('ls.model_fields("fifo")', OSError, ("not a regular file", "fifo'")),
    *(
        Row(f'{call}("none")', FileNotFoundError, ("none", "o such file"))
        for call in ("ls.Model", "ctx.load_state", "ls.Checkpoint.load", "ls.inspect_file")
    ),
    Row('ls.Model("none")', ls.ModelLoadError, ("none: there is no such file",)),
    Row('ctx.save_state("none/x")', ls.SaveError, ("there is no folder", "none/x")),
    Row('ls.Model("chat.state")', ls.ModelLoadError, ("chat.state: this is", "load_state()")),
    Row('ls.inspect_file("tiny.gguf")', ls.FormatError, ("tiny.gguf: ", "a GGUF file")),
    Row(
        'deep.load_state("chat.state")', ls.MismatchError, ("chat.state: ", "layer count: saved 2")
    ),
    Row(
        'one.load_state("two.state")',
        ls.CapacityError,
        ("two.state: ", "sequences: need 2, have 1"),
    ),
]

OBJECTS = [
    Row("copy.copy(ctx)", TypeError, ("a context", "cannot be copied")),
    Row("copy.deepcopy(ctx)", TypeError, ("a context", "cannot be copied")),
    Row("copy.copy(model)", TypeError, ("a model", "cannot be copied")),
    Row("pickle.dumps(ctx)", TypeError, ("a context", "cannot be", "pickled")),
    Row('ctx.load_state("long.state")', None, ("100000 in all",)),
    Row('ls.inspect_file("chat.state").layout', None, ("<Layout of", "llama", "10 cells")),
    Row("actx", None, ("AsyncContext", "llama", "512 cells", "2 sequences")),
    Row(
        "actx.n_ctx, actx.n_batch, actx.n_seq_max, actx.n_vocab, actx.arch, actx.library",
        None,
        ("(512, 512, 2, 260, 'llama', <Library",),
    ),
]

# What was right from the first: other models, positions, closed contexts, paths, ids.
GOOD = [
    Row("ctx.decode([1, 300])", ls.DecodeError, ("token 300 is outside the vocabulary",)),
    Row("ctx.decode([1] * 600)", ls.CapacityError, ("need 610, have 256",)),
    Row("closed.decode([1])", ls.ClosedError, ("the context was closed",)),
    Row('ctx.load_state(Path("chat.state"))', None, ("Restored(",)),
    Row('ctx.save_state(Path("chat.state"), [1])', None, ()),  # over a file that is there
    Row("ctx.decode(np.array([1, 2]))", None, ()),
    Row("ctx.decode([1], 5)", ls.SequenceIdError, ("sequence id 5 is outside 0 .. 1",)),
    Row("ctx.seq_rm(2)", ls.SequenceIdError, ("sequence id 2",)),
    Row("ctx.restore(np.frombuffer(blob, np.uint8))", None, ("Restored(",)),
]


class World:
    """What the rows name, and the files, in the current folder."""

    def __init__(self) -> None:
        self.model = ls.Model(write_model("tiny.gguf", text=True))
        self.ctx = self.model.context(n_ctx=512, n_seq_max=2, n_threads=1)
        self.ctx.decode(range(10))
        self.blob = self.ctx.snapshot()
        self.checkpoint = self.ctx.checkpoint()
        self.actx = aio.AsyncContext(self.ctx)
        self.closed = self.model.context(n_ctx=256, n_threads=1)
        self.closed.close()
        deep_model = ls.Model(write_model("deep.gguf", overrides={"block_count": 3}))
        self.deep = deep_model.context(n_ctx=512, n_seq_max=2, n_threads=1)
        self.one = self.model.context(n_ctx=512, n_threads=1)
        self._write_files()

    def _write_files(self) -> None:
        self.ctx.save_state("chat.state")
        self.ctx.save_state("long.state", range(100_000))
        self.checkpoint.save("chat.llst")
        self.ctx.decode([1], 1)
        self.ctx.save_state("two.state")
        self.ctx.restore(self.blob)
        Path("cut").write_bytes(Path("chat.state").read_bytes()[:100])
        Path("empty").touch()
        Path("text.txt").write_text("some text, and no state\n" * 9)
        Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
        Path("folder").mkdir()
        os.mkfifo("fifo")

    def names(self) -> dict[str, Any]:
        """Return what a row can name."""
        prompt = [*range(10)]
        modules = {"ls": ls, "np": np, "copy": copy, "pickle": pickle, "Path": Path}
        return {**vars(self), **modules, "prompt": prompt}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("mistakes"))
        yield World()


@pytest.fixture(autouse=True)
def as_at_first(world: World) -> None:
    world.ctx.restore(world.blob)


@pytest.mark.parametrize("row", [*POSITIONS, *ARGUMENTS, *FILES, *OBJECTS, *GOOD], ids=_typed)
def test_what_is_typed(row: Row, world: World) -> None:
    """The error, or the answer, that was asked for; after an error all is as it was."""
    text = _answer(row, world)
    assert [word for word in row.words if word not in text] == [], text
    assert [word for word in row.not_words if word in text] == [], text
    assert len(text) < 1000


def test_names_after_a_dot() -> None:
    """What a user can want, and nothing that the package happens to have imported."""

    assert hasattr(ls, "checkpoint")
    modules = {"aio", "errors", "inspection", "layout", "store", "testing"}
    assert {name for name in dir(ls) if not name.startswith("__")} == {
        *(name for name in ls.__all__ if not name.startswith("__")),
        *modules,
    }
    assert all(hasattr(ls, name) for name in dir(ls))


def test_threads_and_event_loops(world: World) -> None:
    """Three threads on two contexts, and a blocking call in a coroutine, are right."""
    contexts = [world.model.context(n_ctx=256, n_threads=1) for _ in range(2)]
    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(contexts[turn % 2].decode, [turn]) for turn in range(20)]
        assert [future.result() for future in done] == [None] * 20
    assert [ctx.n_past() for ctx in contexts] == [10, 10]

    async def blocking() -> int:
        contexts[0].decode([1])
        return contexts[0].n_past()

    assert asyncio.run(blocking()) == 11
    for ctx in contexts:
        ctx.close()


def test_the_headline_names_what_is_missing() -> None:
    """Not "install an engine" where one is installed that cannot be opened on a slim image."""
    why = "cannot be opened: libgomp.so.1: cannot open shared object file: No such file"
    text = advice(None, [("installed package xllamacpp", why)])
    assert text.startswith("installed package xllamacpp needs libgomp.so.1")
    assert "apt install libgomp1" in text


def _answer(row: Row, world: World) -> str:
    """Return the text of the error of a row, or the ``repr`` of what it gives."""
    if row.error is None:
        return repr(eval(row.typed, world.names()))  # noqa: S307
    files = sorted(Path().iterdir())
    with pytest.raises(row.error) as caught:
        eval(row.typed, world.names())  # noqa: S307
    assert world.ctx.snapshot() == world.blob
    assert sorted(Path().iterdir()) == files
    return str(caught.value)
