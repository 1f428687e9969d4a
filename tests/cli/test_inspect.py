"""The commands for state files, on real files of every kind of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state.errors import UnsupportedError
from tests.cli.commands import Run, llama_state
from tests.inspection.pages import Page
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama

KEY = b"0123456789abcdef"
TOKENS = [3, 4, 5, 6, 7, 8, 9, 10] * 8


def narrow(text: str, *paths: Path) -> bool:
    """Whether a text fits 80 columns, but for the paths in it."""
    lines = text.splitlines()
    return all(len(line) <= 80 or any(str(path) in line for path in paths) for line in lines)


@pytest.fixture(params=[False, True], ids=["split", "unified"])
def chat(request: pytest.FixtureRequest, model: ls.Model) -> Iterator[ls.Context]:
    """Three sequences, of which one may share its beginning."""
    with model.context(n_ctx=768, n_seq_max=3, kv_unified=request.param) as ctx:
        ctx.decode(TOKENS, 0)
        ctx.decode(TOKENS[:20], 1)
        if request.param:
            ctx.seq_cp(0, 2)
        else:
            ctx.decode(TOKENS[:9], 2)
        with suppress(UnsupportedError):  # not all memory can lose what is in the middle
            ctx.seq_rm(1, 5, 9)
        yield ctx


def sequences_of(about: Any) -> dict[int | None, tuple[int, int, int]]:
    return {
        one["id"]: (one["pos_min"], one["pos_max"], one["rewind_min"])
        for one in about["state"]["sequences"]
    }


def test_inspect(chat: ls.Context, model: ls.Model, run: Run, tmp_path: Path) -> None:
    """What is shown of each kind of file is what the context holds."""
    whole, single = tmp_path / "whole", tmp_path / "single"
    chat.save_state(whole, TOKENS)
    chat.seq_save_state(single, 1, TOKENS[:20])
    (tmp_path / "wblob").write_bytes(chat.snapshot())
    (tmp_path / "sblob").write_bytes(chat.seq_snapshot(1))
    expected = {
        seq_id: (span.pos_min, span.pos_max, span.rewind_min)
        for seq_id, span in chat.restore(chat.snapshot()).sequences.items()
    }
    for name, kind in (
        ("whole", "session file"),
        ("single", "sequence file"),
        ("wblob", "whole blob"),
        ("sblob", "sequence blob"),
    ):
        path = tmp_path / name
        status, out, err = run("inspect", path, "--json", "--model", model.path)
        about = json.loads(out)
        assert (status, err, about["kind"], about["problem"]) == (0, "", kind, None)
        assert LIBRARY.session_version in about["session_versions"]
        assert sum(about["bytes"].values()) == path.stat().st_size
        assert about["state"]["alternatives"] == []
        found = sequences_of(about)
        if name in ("whole", "wblob"):
            assert about["state"]["architecture"] == model.arch
            assert found == expected
        else:
            assert [span[1] for span in found.values()] == [expected[1][1]]
        if "blob" not in name:
            assert about["tokens"]["count"] == (64 if name == "whole" else 20)
        status, out, err = run("inspect", path)
        assert (status, err) == (0, "")
        assert narrow(out, path)
        status, out, _ = run("verify", path)
        assert status == 0
        assert "sound" in out


def test_inspect_without_the_model(chat: ls.Context, run: Run, tmp_path: Path) -> None:
    """A sequence file reads without it too; the kind of memory is among what is named."""
    chat.seq_save_state(tmp_path / "s", 0)
    status, out, _ = run("inspect", tmp_path / "s", "--json")
    about = json.loads(out)["state"]
    status_with, out, _ = run("inspect", tmp_path / "s", "--json", "--model", chat_model(chat))
    module = json.loads(out)["state"]["module"]
    assert (status, status_with) == (0, 0)
    named = {about["module"], *(text.split(",")[0] for text in about["alternatives"])}
    assert module in named


def chat_model(chat: ls.Context) -> str:
    return next(model.path for model in MODELS.values() if model.arch == chat.arch)


def test_diff(chat: ls.Context, run: Run, tmp_path: Path) -> None:
    """Equal to itself and after a restore; different after a token more; 2 in trouble."""
    a, b, c = (tmp_path / name for name in "abc")
    chat.save_state(a, TOKENS)
    chat.restore(chat.snapshot())
    chat.save_state(b, TOKENS)
    status, out, err = run("diff", a, b)
    assert (status, err) == (0, "")
    assert out.rstrip().endswith("the states are equal")
    chat.decode([11], 0)
    chat.save_state(c, TOKENS)
    status, out, _ = run("diff", a, c)
    assert status == 1
    assert "only in the second: 64" in out
    assert narrow(out)
    status, out, _ = run("diff", "--json", a, c)
    assert status == 1
    assert json.loads(out)["equal"] is False
    c.write_bytes(c.read_bytes()[:-1])
    for other in (c, tmp_path / "none", tmp_path):
        status, out, err = run("diff", a, other)
        assert (status, out) == (2, "")
        assert str(other) in err


def test_diff_by_layer(llama: ls.Model, run: Run, tmp_path: Path) -> None:
    """Another token in the middle changes its own row and all behind, but not those before."""
    with llama.context(n_ctx=256) as ctx:
        for name, token in (("a", 3), ("b", 4)):
            ctx.clear()
            ctx.decode([*TOKENS[:10], token, *TOKENS[:5]])
            ctx.save_state(tmp_path / name)
    _, out, _ = run("diff", "--json", tmp_path / "a", tmp_path / "b")
    rows = {(row["name"], row["layer"]): row for row in json.loads(out)["rows"]}
    assert {row["n_row"] for row in rows.values()} == {16}
    # The first layer sees the tokens alone, the second what is before them too.
    assert (rows["K", 0]["n_differ"], rows["V", 0]["n_differ"]) == (1, 1)
    assert 1 < rows["K", 1]["n_differ"] <= 6
    assert 0 < rows["K", 1]["relative"] < 10


def test_plot(chat: ls.Context, run: Run, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A picture of every kind of memory; none of a damaged state."""
    suffix = ".svg" if "unified" in request.node.name else ".png"
    chat.save_state(tmp_path / "s")
    picture = tmp_path / f"picture{suffix}"
    status, _, err = run("inspect", tmp_path / "s", "--plot", picture)
    assert (status, err) == (0, "")
    assert picture.read_bytes()[:4] in (b"\x89PNG", b"<?xm")
    before = picture.read_bytes()
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:-1])
    status, _, err = run("inspect", tmp_path / "s", "--plot", picture)
    assert status == 1
    assert picture.read_bytes() == before


def test_plots_that_cannot_be(llama: ls.Model, run: Run, tmp_path: Path) -> None:
    """Other formats, and places where nothing can be written."""
    with llama.context(n_ctx=256) as ctx:
        ctx.decode(TOKENS[:6])
        ctx.save_state(tmp_path / "s")
    for name, sentence in (
        ("p.jpg", f"{tmp_path / 'p.jpg'}: pictures are .png or .svg, not .jpg"),
        ("none/p.png", f"{tmp_path / 'none/p.png'}: No such file or directory"),
    ):
        found = run("inspect", tmp_path / "s", "--plot", tmp_path / name)
        assert found == (2, "", f"{sentence}\n")


def test_page(chat: ls.Context, model: ls.Model, run: Run, tmp_path: Path) -> None:
    """A page of every kind of memory, with what is printed; of a damaged state what is left."""
    chat.save_state(tmp_path / "s", TOKENS)
    target = tmp_path / "report.html"
    target.write_text("an older one")
    status, out, err = run("inspect", tmp_path / "s", "--model", model.path, "--html", target)
    assert (status, err) == (0, "")
    page = Page(target.read_bytes())
    # The same words in the same order; a page indents no names, and repeats none.
    words = iter(page.text.split())
    assert all(word in words for word in out.replace(str(tmp_path / "s"), "").split())
    about = json.loads(run("inspect", tmp_path / "s", "--json", "--model", model.path)[1])
    cells = {one["name"]: sum(one["cells"]) for one in about["state"]["caches"] if "cells" in one}
    drawn = {
        one["name"]: sum(stream["cells"] for stream in one["streams"]) for one in page.data["cells"]
    }
    assert drawn == {name: number for name, number in cells.items() if number}
    assert page.data["heats"]
    before = target.read_bytes()
    assert run("inspect", tmp_path / "s", "--json", "--model", model.path, "--html", target)[0] == 0
    assert target.read_bytes() == before
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:-1])
    status, _, err = run("inspect", tmp_path / "s", "--html", target)
    assert status == 1
    assert "This file is damaged" in Page(target.read_bytes()).text


def test_page_and_picture(llama: ls.Model, run: Run, tmp_path: Path) -> None:
    """Both at once; no file that is not named like a page is replaced."""
    with llama.context(n_ctx=256) as ctx:
        ctx.decode(TOKENS[:6])
        ctx.save_state(tmp_path / "s")
    page, picture = tmp_path / "p.html", tmp_path / "p.png"
    assert run("inspect", tmp_path / "s", "--html", page, "--plot", picture)[0] == 0
    assert Page(page.read_bytes()).figures()
    assert picture.read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "s").read_bytes()
    for name, sentence in (
        ("s", f"{tmp_path / 's'}: pages are .html or .htm, not without a suffix"),
        ("none/p.html", f"{tmp_path / 'none/p.html'}: No such file or directory"),
    ):
        found = run("inspect", tmp_path / "s", "--html", tmp_path / name)
        assert found == (2, "", f"{sentence}\n")
    assert (tmp_path / "s").read_bytes() == before


def test_convert(chat: ls.Context, run: Run, tmp_path: Path) -> None:
    """To a checkpoint and back, both of which contexts take."""
    key = tmp_path / "key"
    key.write_bytes(KEY)
    for name in ("whole", "single"):
        path, made, back = tmp_path / name, tmp_path / f"{name}.c", tmp_path / f"{name}.n"
        if name == "whole":
            chat.save_state(path, TOKENS)
        else:
            chat.seq_save_state(path, 0, TOKENS)
        options = ("--key-file", key, "--model", chat_model(chat))
        status, out, err = run("convert", path, made, *options)
        assert (status, err) == (0, "")
        assert ": checkpoint, " in out
        restored = chat.resume(ls.Checkpoint.load(made, key=KEY), check="off")
        assert list(restored.tokens) == TOKENS
        assert run("convert", made, back, "--key-file", key)[0] == 0
        assert back.read_bytes() == path.read_bytes()
        assert run("inspect", made)[0] == 1
        status, out, _ = run("inspect", made, "--key-file", key)
        assert status == 0
        assert f"architecture {chat.arch}" in out
        assert narrow(out, made)
        assert run("verify", "--key-file", key, made)[0] == 0
        status, out, _ = run("verify", made)
        assert status == 1
        assert "LOCKED checkpoint" in " ".join(out.split())
        assert run("verify", "--key-file", key, made, path)[0] == 1
        status, out, _ = run("diff", made, path, *options)
        assert status == 0
        status, _, err = run("convert", path, made)
        assert status == 2
        assert err == f"{made}: exists; --force replaces it\n"
        with pytest.raises(ls.MismatchError, match="adapters: saved not known"):
            chat.resume(ls.Checkpoint.load(made, key=KEY))
        status, _, err = run("convert", path, made, "--plain")
        assert (status, err) == (2, "--plain says how a model was used: give --model too\n")
        assert run("convert", path, made, "--force", "--plain", *options)[0] == 0
        assert list(chat.resume(ls.Checkpoint.load(made, key=KEY)).tokens) == TOKENS


def test_checkpoints_of_contexts(chat: ls.Context, run: Run, tmp_path: Path) -> None:
    """Fingerprint, logits and tokens of the real thing; which chunk of a damaged one is bad."""
    path = tmp_path / "c"
    chat.checkpoint(1, tokens=TOKENS[:20], meta={"who": "me"}).save(path)
    status, out, err = run("inspect", path)
    assert (status, err) == (0, "")
    for part in ('{"who": "me"}', "all sound", f"architecture {chat.arch}", "20: 3, 4, 5"):
        assert part in out
    assert narrow(out, path)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    status, out, err = run("inspect", path)
    assert status == 1
    assert "payload chunk 1 of 1 is not what was written" in err
    assert '{"who": "me"}' in out
    status, out, err = run("verify", path)
    assert status == 1
    assert "DAMAGED checkpoint: payload chunk 1 of 1" in " ".join(out.split())


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_damage(kind: str, run: Run, tmp_path: Path) -> None:
    """Cuts and flips anywhere are found or described, and never more than that."""
    with MODELS[kind].context(n_ctx=256) as ctx:
        ctx.decode(TOKENS[:6])
        ctx.save_state(tmp_path / "s", TOKENS[:6])
    data = (tmp_path / "s").read_bytes()
    path = tmp_path / "damaged"
    for length in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:length])
        status, out, err = run("inspect", path)
        assert status == (1 if out else 2)  # of the shortest it cannot be said what they are
        assert err.startswith(f"{path}: ")
        assert narrow(out, path)
        assert run("verify", path)[0] == 1
    for at in [*range(0, 200, 3), *range(200, len(data), max(1, len(data) // 60))]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        status, out, err = run("inspect", path)
        assert status == (0 if not err else 1 if out else 2)
        assert narrow(out, path)


def test_what_is_no_state(run: Run, tmp_path: Path) -> None:
    """A plain sentence each, on stderr."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("just text")
    model = MODELS["llama-dense"].path
    for path, sentence in (
        (tmp_path, "it is a folder, not a file"),
        (tmp_path / "none", "No such file or directory"),
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path / "empty", "the file is empty"),
        (model, "not a state but a GGUF file (a model): load it with Model()"),
    ):
        assert run("inspect", path) == (2, "", f"{path}: {sentence}\n")
        status, out, err = run("verify", path)
        assert (status, err) == (1, "")
        assert " ".join(out.split()) == f"{path}: {sentence}"
    status, out, err = run("inspect", tmp_path / "text")
    assert (status, out) == (2, "")
    assert "not a state (it begins with the bytes 6a 75 73 74" in err


def test_models_that_do_not_fit(llama: ls.Model, run: Run, tmp_path: Path) -> None:
    """Another model, or no model, is said to be that."""
    with llama.context(n_ctx=256) as ctx:
        ctx.decode(TOKENS[:6])
        ctx.save_state(tmp_path / "s")
    other = MODELS["deepseek2-moe"].path
    status, _, err = run("inspect", tmp_path / "s", "--model", other)
    assert status == 2
    assert "belongs to a llama model, the one given is deepseek2" in err
    status, _, err = run("inspect", tmp_path / "s", "--model", tmp_path / "s")
    assert status == 2
    assert f"the model {tmp_path / 's'}: " in err
    (tmp_path / "short").write_bytes(b"short")
    status, _, err = run(
        "convert", tmp_path / "s", tmp_path / "c", "--key-file", tmp_path / "short"
    )
    assert (status, (tmp_path / "c").exists()) == (2, False)
    assert "16 bytes or more" in err


def test_no_library_is_needed(llama: ls.Model, tmp_path: Path) -> None:
    """With no libllama anywhere, all commands for files work, and none is loaded."""
    with llama.context(n_ctx=256) as ctx:
        ctx.decode(TOKENS[:6])
        ctx.save_state(tmp_path / "a", TOKENS[:6])
    code = f"""
import sys
from pathlib import Path

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("xllamacpp", "llama_cpp"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Hidden())
from llama_state.cli import main
folder = Path({str(tmp_path)!r})
a, b, c = (str(folder / name) for name in "abc")
for arguments in (
    ["inspect", a, "--json"],
    ["inspect", a, "--plot", str(folder / "a.png")],
    ["verify", a],
    ["convert", a, b],
    ["inspect", b],
    ["verify", b],
    ["diff", a, b],
    ["convert", b, c],
):
    assert main(arguments) == 0, arguments
maps = Path("/proc/self/maps").read_text() if sys.platform == "linux" else ""
assert "xllamacpp" not in maps and "libllama" not in maps and "libggml" not in maps
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "LLAMA_STATE_LIBRARY": "/nonexistent"},
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


def test_as_a_command(llama: ls.Model, tmp_path: Path) -> None:
    """In a process of its own, and with a reader that has seen enough."""
    with llama.context(n_ctx=256) as ctx:
        ctx.decode(TOKENS[:6])
        ctx.save_state(tmp_path / "a", TOKENS[:6])
    done = llama_state("inspect", str(tmp_path / "a"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "session file" in done.stdout
    command = f"{sys.executable} -m llama_state inspect --json {tmp_path / 'a'} | head -n 1"
    piped = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)  # noqa: S602
    assert (piped.stdout, piped.stderr) == ("{\n", "")
