"""Slot files of a real llama-server, and the media that llama.cpp itself can read."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state.errors import FormatError, VersionError
from llama_state.inspection import convert_file
from llama_state.testing.models import write_model
from tests.context.c_files import Native
from tests.layout.slots import AUDIO, IMAGE, audio, image, packed
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama

SERVER = """
import json, sys, urllib.request
import xllamacpp

folder, model, checkpoints = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = model
params.slot_save_path = folder + "/"
params.n_ctx, params.n_parallel, params.warmup, params.port = 256, 1, False, 0
params.n_ctx_checkpoints = int(checkpoints)
params.cache_ram_mib = 0  # what a slot holds comes from its file alone
params.swa_full = params.n_ctx_checkpoints == 0  # else a windowed slot is decoded anew
server = xllamacpp.Server(params)
for line in sys.stdin:
    path, data = json.loads(line)
    request = urllib.request.Request(server.listening_address + path, json.dumps(data).encode())
    print(json.dumps(json.load(urllib.request.urlopen(request, timeout=60))), flush=True)
"""
NEXT = 99
TEXT = (5, 6, 7, 8)
MIXED = (5, -1, -1, 8)
MEDIA = {1: image(2, 1, "cat")}

Post = Callable[[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture(
    params=[
        "llama-dense",
        "gemma3-dense",
        "mamba2-dense",
        "jamba-dense",
        "lfm2-dense",
        "deepseek4-moe",
    ]
)
def gguf(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with cells, windows, a recurrent state, cells and one, windows and one, or dsv4."""
    return write_model(tmp_path / "m.gguf", request.param, text=True)


@pytest.fixture
def post(tmp_path: Path, gguf: Path) -> Iterator[Post]:
    """Asks a llama-server with one slot, whose files are in the folder of the test."""
    with started(tmp_path, gguf, 0) as post:
        yield post


@pytest.fixture
def keeping(tmp_path: Path, gguf: Path) -> Iterator[Post]:
    """Asks a llama-server that keeps restore points, as it does unless told otherwise."""
    with started(tmp_path, gguf, 8) as post:
        yield post


@contextmanager
def started(tmp_path: Path, gguf: Path, checkpoints: int) -> Iterator[Post]:
    command = [sys.executable, "-c", SERVER, str(tmp_path), str(gguf), str(checkpoints)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        asked, answered = server.stdin, server.stdout

        def post(path: str, data: dict[str, Any]) -> dict[str, Any]:
            print(json.dumps([path, data]), file=asked, flush=True)
            line = answered.readline()
            assert line, (tmp_path / "log").read_text()[-2000:]
            answer: dict[str, Any] = json.loads(line)
            return answer

        yield post


def completion(post: Post, prompt: Sequence[int], n_predict: int = 1) -> tuple[list[int], int]:
    """Return the likeliest tokens after a prompt, and how much of it the slot held."""
    settings = {"id_slot": 0, "temperature": 0, "return_tokens": True}
    answer = post("/completion", {"prompt": list(prompt), "n_predict": n_predict, **settings})
    return answer["tokens"], answer["timings"]["cache_n"]


def save_slot(post: Post, folder: Path, end: int = 100) -> tuple[Path, tuple[int, ...]]:
    """Let the server save a slot; return the file, and the tokens that it decoded before."""
    prompt = range(40, end)  # more than the windows
    predicted, _ = completion(post, prompt, 4)
    tokens = (*prompt, *predicted[:-1])  # the last one was not decoded
    saved = post("/slots/0?action=save", {"filename": "slot"})
    path = folder / "slot"
    assert (saved["n_saved"], saved["n_written"]) == (len(tokens), path.stat().st_size)
    return path, tokens


def likeliest(ctx: ls.Context) -> int:
    """Return the token that a server would choose after NEXT."""
    ctx.decode([NEXT])
    logits = list(ctx.logits())
    return logits.index(max(logits))


def greedy(ctx: ls.Context, tokens: Sequence[int], n: int) -> list[int]:
    """Decode *tokens*, and return the *n* tokens that a server would choose after them."""
    chosen: list[int] = []
    for _ in range(n):
        ctx.decode(chosen[-1:] or tokens)
        logits = list(ctx.logits())
        chosen.append(logits.index(max(logits)))
    return chosen


def test_slot_files_of_a_server_load(post: Post, gguf: Path, tmp_path: Path) -> None:
    """The tokens come with the state, and the state goes on as the server's does."""
    path, tokens = save_slot(post, tmp_path)
    found = ls.inspect_file(path, model=gguf)
    assert (found.kind, found.problem, tuple(found.tokens)) == ("slot file", None, tokens)
    if found.version != LIBRARY.sequence_version:
        return  # no build reads the files of another version
    (expected,), held = completion(post, [*tokens, NEXT])
    assert held == len(tokens)
    checkpoint = ls.Checkpoint.from_native(path)
    assert (checkpoint.tokens, checkpoint.media) == (tokens, ())
    native = Native(LIBRARY)
    checkpoint.to_native(tmp_path / "again")
    with ls.Model(gguf, LIBRARY) as opened, opened.context(n_ctx=256) as ctx:
        for restored in (ctx.seq_load_state(path), ctx.resume(checkpoint, check="off")):
            assert (restored.tokens, restored.media) == (tokens, ())
            assert restored.sequences[0].n_past == len(tokens)
        assert likeliest(ctx) == expected
        ctx.clear()
        words = checkpoint.packed_tokens
        assert native.seq_load(ctx, tmp_path / "again", 0) == (path.stat().st_size, words)
        assert likeliest(ctx) == expected


def test_a_server_loads_our_files(post: Post, gguf: Path, tmp_path: Path) -> None:
    """With its own list, as ``to_native`` writes it, and with plain tokens."""
    path, tokens = save_slot(post, tmp_path)
    (expected,), _ = completion(post, [*tokens, NEXT])
    ls.Checkpoint.from_native(path).to_native(tmp_path / "converted")
    convert_file(path, tmp_path / "c")
    convert_file(tmp_path / "c", tmp_path / "back")
    names = ["converted", "back"]
    if ls.inspect_file(path).version == LIBRARY.sequence_version:
        with ls.Model(gguf, LIBRARY) as opened, opened.context(n_ctx=256) as ctx:
            restored = ctx.seq_load_state(path)
            ctx.seq_save_state(tmp_path / "plain", 0, restored.tokens)
            ctx.checkpoint(0, tokens=restored.tokens).to_native(tmp_path / "taken")
        names += ["plain", "taken"]
    for name in names:
        assert completion(post, [70, 71])[1] == 0  # something else is in the slot
        read = post("/slots/0?action=restore", {"filename": name})
        assert read["n_restored"] == len(tokens)
        assert completion(post, [*tokens, NEXT]) == ([expected], len(tokens))
    for name in ("converted", "back"):
        assert (tmp_path / name).read_bytes() == path.read_bytes()


def test_slot_files_with_restore_points(keeping: Post, gguf: Path, tmp_path: Path) -> None:
    """They load with and without their points, and a point takes the sequence back."""
    path, tokens = save_slot(keeping, tmp_path, 200)  # for short prompts it keeps none
    found = ls.inspect_file(path)
    assert (found.problem, tuple(found.tokens)) == (None, tokens)
    if found.version != LIBRARY.sequence_version:
        return  # no build reads the files of another version
    (expected,), _ = completion(keeping, [*tokens, NEXT])
    with ls.Model(gguf, LIBRARY) as opened, opened.context(n_ctx=256) as ctx:
        for validate in (True, False):
            restored = ctx.seq_load_state(path, validate=validate)
            assert (restored.tokens, restored.restore_points) == (tokens, ())
            assert likeliest(ctx) == expected
        points = ctx.seq_load_state(path, restore_points=True).restore_points
        assert [point.n_tokens for point in points] == [p.n_tokens for p in found.restore_points]
        assert points or found.layout is None or found.layout.module == "kv"
        for point in reversed(points):
            ctx.seq_restore(point.blob, partial=True)
            assert ctx.n_past() == point.n_tokens
            back = likeliest(ctx)
            ctx.clear()
            ctx.decode(tokens[: point.n_tokens])
            assert back == likeliest(ctx)
            ctx.seq_load_state(path)


def test_going_back_as_the_server_does(keeping: Post, gguf: Path, tmp_path: Path) -> None:
    """To its own restore point, and on from there: what is decoded is only what is new."""
    path, tokens = save_slot(keeping, tmp_path, 200)
    found = ls.inspect_file(path)
    if found.version != LIBRARY.sequence_version:
        return
    at = max((point.n_tokens for point in found.restore_points), default=len(tokens) - 2)
    branch = [*tokens[: at + 2], 7, 8, 9]
    completion(keeping, [70, 71])
    keeping("/slots/0?action=restore", {"filename": "slot"})
    expected, held = completion(keeping, branch, 8)
    with ls.Model(gguf, LIBRARY) as opened, opened.context(n_ctx=256) as ctx:
        points = ctx.seq_load_state(path, restore_points=True).restore_points
        if points:
            ctx.seq_restore(points[-1].blob, partial=True)
        else:
            ctx.seq_rm(0, at + 2)
        assert ctx.n_past() >= held
        assert greedy(ctx, branch[ctx.n_past() :], 8) == expected


def through_checkpoints(ctx: ls.Context, point: ls.RestorePoint, folder: Path) -> list[str]:
    """Write the names of slot files with a restore point: each went another way."""
    tokens = folder / "ours"
    listed = ls.inspect_file(tokens).tokens
    ctx.checkpoint(0, tokens=listed, restore_points=[point]).save(folder / "taken")
    ls.Checkpoint.load(folder / "taken").to_native(folder / "of taken")
    convert_file(tokens, folder / "converted")
    convert_file(folder / "converted", folder / "of converted")
    ctx.clear()
    resumed = ctx.resume(ls.Checkpoint.load(folder / "taken"))
    ctx.seq_save_state(
        folder / "of resumed", tokens=resumed.tokens, restore_points=resumed.restore_points
    )
    return ["of taken", "of converted", "of resumed"]


def test_a_server_goes_back_to_our_restore_points(
    keeping: Post, gguf: Path, tmp_path: Path
) -> None:
    """It evaluates what is new after the point, not the whole prompt."""
    path, tokens = save_slot(keeping, tmp_path, 200)  # for short prompts it keeps none
    if ls.inspect_file(path).version != LIBRARY.sequence_version:
        return
    at, same = 50, 120  # for some windows llama-server wants the point further back
    branch = [*tokens[:same], 7, 8, 9]
    with ls.Model(gguf, LIBRARY) as opened, opened.context(n_ctx=256) as ctx:
        ctx.decode(tokens[:at])
        module = ctx.checkpoint(0).layout.module
        point = ls.RestorePoint(at, ctx.seq_snapshot(partial=True))
        ctx.decode(tokens[at:])
        ctx.seq_save_state(tmp_path / "ours", tokens=tokens, restore_points=[point])
        n = ctx.seq_save_state(
            tmp_path / "pages", tokens=tokens, restore_points=[point], memory_limit=0
        )
        assert n == (tmp_path / "pages").stat().st_size
        (again,) = ctx.seq_load_state(tmp_path / "ours", restore_points=True).restore_points
        assert (again.n_tokens, again.blob) == (at, point.blob)
        plain = ctx.seq_save_state(tmp_path / "without", tokens=tokens)
        assert ls.inspect_file(tmp_path / "without").restore_points == ()
        assert plain < n
        for name in ("pages", *through_checkpoints(ctx, point, tmp_path)):
            assert (tmp_path / name).read_bytes() == (tmp_path / "ours").read_bytes()
    completion(keeping, [70, 71])
    expected, held = completion(keeping, branch, 8)
    assert held == 0  # this is what the server itself makes of it
    keeping("/slots/0?action=restore", {"filename": "ours"})
    predicted, held = completion(keeping, branch, 8)
    assert predicted == expected
    # Of windows llama-server evaluates the last token again; a plain cache can be cut anywhere.
    assert held == {"kv": same, "iswa": at - 1}.get(module, at)


@pytest.mark.parametrize("kind", ["llama-dense", "gemma3-dense", "mamba2-dense", "lfm2-dense"])
def test_restore_points_are_found_where_llama_cpp_stops(kind: str, tmp_path: Path) -> None:
    """Without validation too: damaged ones are refused only where they are wanted."""
    if not LIBRARY.sequence_head:
        return  # a build that is older than restore points, whose blobs have no head
    path = tmp_path / "slot"
    with MODELS[kind].context(n_ctx=256) as ctx:
        ctx.decode(TEXT)
        point = ls.RestorePoint(len(TEXT), ctx.seq_snapshot(partial=True))
        plain = ctx.seq_save_state(path, restore_points=[])
        ctx.seq_save_state(path, restore_points=[point, point])
        data = path.read_bytes()
        state = ctx.seq_snapshot()
        ctx.clear()
        restored = ctx.seq_load_state(path, validate=False, restore_points=True)
        assert [one.blob for one in restored.restore_points] == [point.blob] * 2
        assert ctx.seq_snapshot() == state
        ctx.decode([9])
        kept = ctx.seq_snapshot()
        path.write_bytes(data[:-1])
        with pytest.raises(ls.TruncatedError, match="further blobs") as caught:
            ctx.seq_load_state(path, validate=False, restore_points=True)
        assert (caught.value.have, caught.value.path) == (len(data) - 1, str(path))
        assert ctx.seq_snapshot() == kept
        path.write_bytes(data[:plain] + b"SCKQ" + data[plain + 4 :])
        for options in ({"validate": False}, {"validate": False, "restore_points": True}):
            with pytest.raises(ls.RestoreError) as refused:
                ctx.seq_load_state(path, **options)
            assert refused.value.rolled_back
        with pytest.raises(ls.FormatError, match="first bytes are damaged"):
            ctx.seq_load_state(path)
        assert ctx.seq_snapshot() == kept
        path.write_bytes(data[:-1])
        assert ctx.seq_load_state(path, validate=False).restore_points == ()
        assert ctx.seq_snapshot() == state


@pytest.mark.parametrize("kind", ["gemma3-dense", "mamba2-dense", "lfm2-dense"])
def test_restore_points_that_are_none_are_not_written(kind: str, tmp_path: Path) -> None:
    with MODELS[kind].context(n_ctx=256) as ctx:
        ctx.decode(TEXT)
        blob = ctx.seq_snapshot(partial=True)
        for wrong in (
            lambda: ls.RestorePoint(3, blob),
            lambda: ls.RestorePoint(5, blob),
            lambda: ls.RestorePoint(4, blob[:-1]),
            lambda: ls.RestorePoint(4, b"no state"),
            lambda: ls.RestorePoint(0, blob),
        ):
            with pytest.raises(ValueError, match=r"restore point|n_tokens"):
                ctx.seq_save_state(tmp_path / "slot", restore_points=[wrong()])
        with pytest.raises(TypeError, match="restore_points"):
            ctx.seq_save_state(tmp_path / "slot", restore_points=[blob])  # type: ignore[list-item]
    assert not (tmp_path / "slot").exists()


@pytest.fixture
def ctx() -> Iterator[ls.Context]:
    """A context with four tokens in sequence 0 and two in sequence 1."""
    with MODELS["llama-dense"].context(n_ctx=256, n_seq_max=2) as ctx:
        ctx.decode(TEXT)
        ctx.decode(TEXT[:2], 1)
        yield ctx


def test_text_comes_back_as_tokens(ctx: ls.Context, tmp_path: Path) -> None:
    """Also where the state is not validated, and into another sequence."""
    ctx.seq_save_state(tmp_path / "slot", 0, packed(TEXT))
    for validate in (True, False):
        restored = ctx.seq_load_state(tmp_path / "slot", 1, validate=validate)
        assert (restored.tokens, restored.media) == (TEXT, ())
    assert "tokens=(5, 6, 7, 8), sequences" in repr(restored)
    assert "media" not in repr(restored)


def test_media_come_back_as_such(ctx: ls.Context, tmp_path: Path) -> None:
    """The state is restored; no tokens are said to give it."""
    before = ctx.seq_snapshot(0)
    ctx.seq_save_state(tmp_path / "slot", 0, packed(MIXED, MEDIA))
    ctx.seq_rm(0)
    checkpoint = ls.Checkpoint.from_native(tmp_path / "slot")
    for restored in (
        ctx.seq_load_state(tmp_path / "slot"),
        ctx.seq_load_state(tmp_path / "slot", validate=False),
        ctx.resume(checkpoint, check="off"),
    ):
        assert restored.tokens == ()
        assert [(chunk.kind, chunk.n_tokens) for chunk in restored.media] == [("image", 2)]
        assert repr(restored).endswith(", media=<1>)")
        assert ctx.seq_snapshot(0) == before


def test_lists_that_cannot_be_read(ctx: ls.Context, tmp_path: Path) -> None:
    """They are refused before anything is touched, or there are no tokens."""
    path = tmp_path / "slot"
    ctx.seq_save_state(path, 0, packed(TEXT))
    data = bytearray(path.read_bytes())
    data[16] = 2  # the version of the list
    path.write_bytes(data)
    before = ctx.snapshot()
    with pytest.raises(VersionError, match="packed token list") as caught:
        ctx.seq_load_state(path, 1)
    assert (caught.value.offset, caught.value.path) == (16, str(path))
    assert ctx.snapshot() == before
    restored = ctx.seq_load_state(path, 1, validate=False)
    assert (restored.tokens, restored.media, ctx.n_past(1)) == ((), (), 4)


def test_no_file_is_written_that_cannot_be_read(ctx: ls.Context, tmp_path: Path) -> None:
    """A list that starts with -1 is a packed one in files of one sequence, and only there."""
    with pytest.raises(FormatError, match="starts with -1"):
        ctx.seq_save_state(tmp_path / "slot", 0, (-1, 259))
    assert not (tmp_path / "slot").exists()
    ctx.save_state(tmp_path / "session", (-1, 259))
    assert ctx.load_state(tmp_path / "session").tokens == (-1, 259)


@pytest.mark.parametrize(("chunk", "kind"), [(image, IMAGE), (audio, AUDIO)])
def test_media_chunks_are_those_of_llama_cpp(chunk: Callable[..., bytes], kind: int) -> None:
    """llama.cpp's own reader understands the chunks that the parser is tested with."""
    native = ctypes.CDLL(str(LIBRARY.path))
    if not hasattr(native, "mtmd_input_chunk_load"):  # a library without llama-server, or older
        return
    native.mtmd_input_chunk_load.restype = ctypes.c_void_p
    native.mtmd_input_chunk_load.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    native.mtmd_input_chunk_get_id.restype = ctypes.c_char_p
    native.mtmd_input_chunk_get_id.argtypes = [ctypes.c_void_p]
    native.mtmd_input_chunk_get_n_tokens.restype = ctypes.c_size_t
    native.mtmd_input_chunk_get_n_tokens.argtypes = [ctypes.c_void_p]
    native.mtmd_input_chunk_get_type.argtypes = [ctypes.c_void_p]
    native.mtmd_input_chunk_free.argtypes = [ctypes.c_void_p]
    sizes = (4, 3) if kind == IMAGE else (12,)
    written = (chunk(*sizes, "a hash", version=version) for version in (1, 2))
    (loaded,) = filter(None, (native.mtmd_input_chunk_load(raw, len(raw)) for raw in written))
    assert native.mtmd_input_chunk_get_type(loaded) == kind
    assert native.mtmd_input_chunk_get_id(loaded) == b"a hash"
    assert native.mtmd_input_chunk_get_n_tokens(loaded) == 12
    native.mtmd_input_chunk_free(loaded)
