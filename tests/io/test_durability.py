"""Files that survive: kill -9, full disks, vanished folders, and nothing half written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import llama_state as ls
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama

Make = Callable[..., ls.Context]

KILLER = """
import os, random, signal, sys, time
import llama_state as ls
model_path, library_path, path, kills = sys.argv[1:]
model = ls.Model(model_path, ls.load_library(library_path))
reader, *contexts = [model.context(n_ctx=1024, n_threads=1) for _ in range(3)]
whole = set()
for n, ctx in enumerate(contexts):
    ctx.decode([(n + i) % ctx.n_vocab for i in range(700 + 50 * n)])
    ctx.save_state(path, [n])
    whole.add(open(path, "rb").read())
rng = random.Random(1)
for turn in range(int(kills)):
    child = os.fork()
    if child == 0:
        while True:
            for n, ctx in enumerate(contexts):
                ctx.save_state(path, [n], durable=turn % 4 == 0)
    time.sleep(rng.uniform(0.0005, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert open(path, "rb").read() in whole, turn
    reader.load_state(path)
contexts[0].save_state(path)
print(os.listdir(os.path.dirname(path)))
"""


def test_two_hundred_kills(tmp_path: Path) -> None:
    """The file under a killed save_state is always one of the two whole states, and loads."""
    arguments = [MODELS["llama-dense"].path, str(LIBRARY.path), str(tmp_path / "state"), "200"]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['state']"  # what the killed left was cleared by the next


FULL_DISK = """
import errno, os, sys
import llama_state as ls
model_path, library_path, folder = sys.argv[1:]
model = ls.Model(model_path, ls.load_library(library_path))
path = os.path.join(folder, "state")
with model.context(n_ctx=256) as small, model.context(n_ctx=256) as large:
    small.decode([1])
    large.decode(range(100))
    assert small.state_size() < 4096 < 65536 < large.state_size()
    small.save_state(path, [7])
    old = open(path, "rb").read()
    for durable in (True, False):
        try:
            large.save_state(path, durable=durable)
        except ls.SaveError as error:
            assert error.errno == errno.ENOSPC, error
        else:
            raise AssertionError("saved to a full disk")
        assert open(path, "rb").read() == old and os.listdir(folder) == ["state"]
    # Not a page is left: also a state smaller than one is refused, or whole.
    with open(os.path.join(folder, "filler"), "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    try:
        small.save_state(path, range(3))
    except ls.SaveError as error:
        assert error.errno == errno.ENOSPC, error
    else:
        raise AssertionError("saved to a full disk")
    assert open(path, "rb").read() == old
    assert sorted(os.listdir(folder)) == ["filler", "state"]
    assert small.load_state(path).tokens == (7,)
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """On a file system of 64 kB: SaveError with ENOSPC, the old file whole and loadable.

    llama.cpp's own writer reports success for what still fits its buffer.
    """
    folder = tmp_path / "small"
    folder.mkdir()
    program = [sys.executable, "-c", FULL_DISK, MODELS["llama-dense"].path, str(LIBRARY.path)]
    mount = f"mount -t tmpfs -o size=64k tmpfs {folder}"
    # In a mount namespace of its own the file system is gone with the process.
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *program, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "not permitted" in done.stderr and not os.environ.get("CI"):
        pytest.skip("this machine allows no file system of one's own")
    assert done.returncode == 0, done.stderr


def test_a_state_too_large_for_a_limit(make: Make, tmp_path: Path) -> None:
    """A file size limit (EFBIG) found while writing leaves the old file."""
    path = tmp_path / "state"
    ctx = make()
    ctx.save_state(path)
    old = path.read_bytes()
    code = f"""
        import resource, signal
        import llama_state as ls
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model = ls.Model({MODELS["llama-dense"].path!r}, ls.load_library({str(LIBRARY.path)!r}))
        ctx = model.context(n_ctx=256)
        ctx.decode(range(50))
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
        try:
            ctx.save_state({str(path)!r})
        except ls.SaveError as error:
            print(error.errno)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == errno.EFBIG
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_vanished_folder(make: Make, tmp_path: Path) -> None:
    """A folder that is not there any more is a SaveError; the context is as it was."""
    ctx = make()
    ctx.decode(range(10))
    folder = tmp_path / "gone"
    folder.mkdir()
    ctx.save_state(folder / "state")
    shutil.rmtree(folder)
    for save in (ctx.save_state, ctx.seq_save_state):
        with pytest.raises(ls.SaveError) as caught:
            save(folder / "state")
        assert caught.value.errno == errno.ENOENT
    assert ctx.n_past() == 10


def test_no_permission(make: Make, tmp_path: Path) -> None:
    """A folder that may not be written to is a SaveError with EACCES."""
    ctx = make()
    ctx.save_state(tmp_path / "state")
    old = (tmp_path / "state").read_bytes()
    ctx.decode([1, 2])
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):  # root may: then only a plain user's error can be had
            ctx.save_state(tmp_path / "state")
            return
        with pytest.raises(ls.SaveError) as caught:
            ctx.save_state(tmp_path / "state")
        assert caught.value.errno == errno.EACCES
        assert (tmp_path / "state").read_bytes() == old
    finally:
        tmp_path.chmod(0o700)
