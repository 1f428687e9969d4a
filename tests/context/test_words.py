"""Of a file that is not what was asked for: what it is, its path, and what reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state import layout
from llama_state._io.advice import advice
from llama_state.testing import write_model

pytestmark = pytest.mark.libllama

ENVIRONMENT = {"PYTHONPATH": str(Path(ls.__file__).parents[1]), "PATH": os.defpath}

CALLS: dict[str, Callable[[ls.Context, Path], Any]] = {
    "load_state": lambda ctx, path: ctx.load_state(path),
    "seq_load_state": lambda ctx, path: ctx.seq_load_state(path),
    "Checkpoint.load": lambda _, path: ls.Checkpoint.load(path),
    "Checkpoint.load unmapped": lambda _, path: ls.Checkpoint.load(path, mapped=False),
    "Checkpoint.from_native": lambda _, path: ls.Checkpoint.from_native(path),
    "Model": lambda ctx, path: ls.Model(path, ctx.library),
    "model_fields": lambda _, path: ls.model_fields(path),
}
# File -> the calls that take it, and what the others say.
FILES: dict[str, tuple[set[str], str, str]] = {
    "checkpoint": ({"Checkpoint.load", "Checkpoint.load unmapped"}, "a checkpoint", "resume()"),
    "whole": ({"load_state", "Checkpoint.from_native"}, "session file", "Context.load_state()"),
    "sequence": (
        {"seq_load_state", "Checkpoint.from_native"},
        "a sequence state file",
        "Context.seq_load_state()",
    ),
    "model": ({"Model", "model_fields"}, "a GGUF file", "Model()"),
    "blob": (set(), "a snapshot", "Context.restore()"),
    "seq_blob": (set(), "a snapshot of a sequence", "Context.seq_restore()"),
    "zip": (set(), "a ZIP file", "unpack"),
}


@pytest.fixture
def folder(make: Callable[..., ls.Context], tmp_path: Path) -> Path:
    ctx = make()
    ctx.decode([1, 2, 3])
    ctx.save_state(tmp_path / "whole", [1, 2, 3])
    ctx.seq_save_state(tmp_path / "sequence", 0, [1, 2, 3])
    ctx.checkpoint(0).save(tmp_path / "checkpoint")
    (tmp_path / "blob").write_bytes(ctx.snapshot())
    blob = ctx.seq_snapshot()  # without a head, as some builds write it, nothing can be told
    head = b"" if layout.has_sequence_head(blob) else layout.sequence_head(0)
    (tmp_path / "seq_blob").write_bytes(head + blob)
    (tmp_path / "zip").write_bytes(b"PK\x03\x04" + bytes(99))
    write_model(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("call", CALLS)
def test_another_kind_of_file(call: str, make: Callable[..., ls.Context], folder: Path) -> None:
    """It is named, with the function that reads it; the context is as it was."""
    ctx = make()
    ctx.decode([7])
    before = ctx.snapshot()
    for name, (taken_by, what, use) in FILES.items():
        if call in taken_by:
            continue
        with pytest.raises(ls.StateError) as caught:
            CALLS[call](ctx, folder / name)
        for word in (str(folder / name), what, use):
            assert word in str(caught.value)
    assert ctx.snapshot() == before


@pytest.mark.parametrize("call", CALLS)
def test_empty_and_cut_files(call: str, make: Callable[..., ls.Context], folder: Path) -> None:
    """The text says so, and names the file."""
    whole = {name: (folder / name).read_bytes() for name, (by, *_) in FILES.items() if call in by}
    for data in (b"", *(data[:size] for data in whole.values() for size in (3, 14, 40))):
        (folder / "cut").write_bytes(data)
        with pytest.raises(ls.StateError) as caught:
            CALLS[call](make(), folder / "cut")
        assert str(folder / "cut") in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_missing_files_and_folders(
    call: str, make: Callable[..., ls.Context], tmp_path: Path
) -> None:
    """A missing file is a FileNotFoundError for all; a folder is called one."""
    with pytest.raises(FileNotFoundError, match="o such file") as caught:
        CALLS[call](make(), tmp_path / "no-such-file")
    assert caught.value.filename == str(tmp_path / "no-such-file")
    with pytest.raises((OSError, ls.ModelLoadError), match="it is a folder") as folder:
        CALLS[call](make(), tmp_path)
    assert str(tmp_path) in str(folder.value)


def test_a_file_that_something_is_mounted_on(tmp_path: Path) -> None:
    """EBUSY is explained, as is a folder that cannot be written to or is not there."""
    (tmp_path / "state").write_bytes(b"old")
    (tmp_path / "other").write_bytes(b"other")
    code = (
        "from llama_state._io.atomic import write_file\n"
        "try: write_file('state', [b'new'], durable=False)\n"
        "except OSError as error: print(error)\n"
    )
    script = f'mount --bind other state && exec {sys.executable} -c "$0"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, code],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr}")
    assert "mount its folder instead" in done.stdout
    assert str(tmp_path) in advice(13, tmp_path / "state")
    assert "there is no folder" in advice(2, tmp_path / "none" / "state")


def test_a_package_that_lacks_a_library(tmp_path: Path) -> None:
    """The library that the installed one needs is named, not "install it"."""
    package = tmp_path / "xllamacpp"
    package.mkdir()
    (package / "__init__.py").touch()
    for command in (
        "echo 'int needed;' | cc -shared -x c -Wl,-soname,libgomp-gone.so.1 -o libneeded.so -",
        "echo 'int x;' | cc -shared -x c -o xllamacpp.so - -Wl,--no-as-needed -L. -lneeded",
        "rm libneeded.so",
    ):
        subprocess.run(["sh", "-c", command], cwd=package, check=True)
    code = (
        f"import ctypes.util, sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.modules['llama_cpp'] = None  # no other libllama is found\n"
        "ctypes.util.find_library = lambda name: None\n"
        "import llama_state\n"
        "try: llama_state.load_library()\n"
        "except ImportError as error: print(error)\n"
        "from llama_state.cli import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    headline = "installed package xllamacpp needs libgomp-gone.so.1"
    assert done.stdout.startswith(headline)
    assert done.stderr.startswith(headline)
    assert done.returncode == 1


def test_what_is_printed_is_short(make: Callable[..., ls.Context], tmp_path: Path) -> None:
    """A long prompt does not fill the screen."""
    ctx = make()
    ctx.decode([1, 2, 3])
    tokens = list(range(100_000, 200_000))
    ctx.save_state(tmp_path / "state", tokens)
    with pytest.warns(ls.IdentityWarning, match="100000 tokens"):
        ctx.checkpoint(0, tokens=tokens).save(tmp_path / "checkpoint")
    restored = ctx.load_state(tmp_path / "state")
    assert len(restored.tokens) == len(tokens)
    assert "100000 in all" in repr(restored)
    found = ls.inspect_file(tmp_path / "state")
    for value in (restored, found, ls.Checkpoint.load(tmp_path / "checkpoint"), ctx):
        assert len(repr(value)) < 1000
