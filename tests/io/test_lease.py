"""The files that are loaded: their own pages under a lease, or a copy."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import llama_state as ls
from llama_state._io import lease, pages
from llama_state._io.buffers import POOL
from llama_state._io.lease import opened
from llama_state._io.platform import files
from llama_state.errors import TruncatedError

pytestmark = pytest.mark.libllama

Make = Callable[..., ls.Context]
CONTENT = os.urandom(2 << 20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.write_bytes(CONTENT)
    return path


def is_mapped(view: memoryview) -> bool:
    """Return whether a view is a mapping, which is read-only, not a buffer of the pool."""
    return view.readonly and isinstance(view.obj, mmap.mmap)


@pytest.mark.linux
def test_a_large_file_is_mapped(path: Path) -> None:
    """No memory is taken for it."""
    ls.trim_buffers()
    with opened(path) as file:
        assert is_mapped(file.view)
        assert file.view == CONTENT
    assert POOL.idle == 0


@pytest.mark.linux
def test_a_writer_waits(path: Path) -> None:
    """Writing to the file or truncating it waits until the block ends."""
    writing = threading.Thread(target=path.write_bytes, args=(b"new",))
    with opened(path) as file:
        writing.start()
        writing.join(0.3)
        assert writing.is_alive()
        assert file.view == CONTENT
    writing.join(30)
    assert path.read_bytes() == b"new"


def test_a_file_that_somebody_writes_to_is_copied(path: Path) -> None:
    """There is no lease then, and what is changed later does not reach the copy."""
    with path.open("r+b") as writer, opened(path) as file:
        assert not is_mapped(file.view)
        writer.truncate(5)
        assert file.view == CONTENT


@pytest.mark.linux
def test_a_lease_that_is_asked_back_is_given_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer who comes while the pages are read gets the file; then it is copied."""
    writing = threading.Thread(target=lambda: path.open("r+b").close())
    mapped = lease._mapped

    def then_write(*args: object) -> memoryview:
        view = mapped(*args)  # type: ignore[arg-type]
        writing.start()
        writing.join(0.2)
        return view

    monkeypatch.setattr(lease, "_mapped", then_write)
    with opened(path) as file:
        assert not is_mapped(file.view)
        assert file.view == CONTENT
    writing.join(30)
    assert not writing.is_alive()


def test_without_leases(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy; where there is no memory for one, the pages themselves."""
    monkeypatch.setattr(files, "fcntl", None)
    with opened(path) as file:
        assert not is_mapped(file.view)
        assert file.view == CONTENT
    with POOL.limited(1000), opened(path) as file:
        assert is_mapped(file.view)
        assert file.view == CONTENT


def test_an_older_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pages cannot be asked for, they are read all the same."""
    monkeypatch.setattr(pages, "lib", SimpleNamespace(pages_populate=lambda *_: errno.EINVAL))
    with opened(path) as file:
        assert file.view == CONTENT


@pytest.mark.linux
def test_a_broken_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that cannot be read is an OSError, before it is used."""
    monkeypatch.setattr(pages, "lib", SimpleNamespace(pages_populate=lambda *_: errno.EFAULT))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), opened(path):
        pass


def test_a_small_file_that_shrinks(
    tmp_path: Path, shrink_once_opened: Callable[[Path, int], None]
) -> None:
    """Nothing trusts the size that a file had a moment ago."""
    path = tmp_path / "small"
    path.write_bytes(bytes(100))
    shrink_once_opened(path, 60)
    with pytest.raises(TruncatedError) as caught, opened(path):
        pass
    assert (caught.value.need, caught.value.have) == (100, 60)


@pytest.mark.parametrize("size", [0, 1])
def test_hardly_a_file(tmp_path: Path, size: int) -> None:
    (tmp_path / "state").write_bytes(bytes(size))
    with opened(tmp_path / "state") as file:
        assert file.view == bytes(size)


def test_a_mapped_sequence_file_does_not_change(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head that llama.cpp wants before a payload goes into a page of our own."""
    monkeypatch.setattr(lease, "_WORTH_MAPPING", 0)
    ctx = make(n_seq_max=2, kv_unified=True)
    ctx.decode(range(50))
    for tokens in ((), range(1020)):  # the head in the first page, and over the end of one
        path = tmp_path / "sequence"
        ctx.seq_save_state(path, tokens=tokens, durable=False)
        before = path.read_bytes()
        assert ctx.seq_load_state(path, 1).sequences[1].n_past == 50
        assert path.read_bytes() == before
        assert ctx.seq_load_state(path, 1).tokens == tuple(tokens)


def test_a_load_reads_while_somebody_saves(make: Make, tmp_path: Path) -> None:
    """Saving to the file that is being loaded does not wait: it makes another file."""
    a, b = make(), make()
    a.decode(range(100))
    path = tmp_path / "state"
    a.save_state(path, durable=False)

    def progress(done: int, total: int) -> None:
        if done == 0:
            a.decode([1])
            a.save_state(path, durable=False)

    assert b.load_state(path, progress=progress).sequences[0].n_past == 100
    assert b.load_state(path).sequences[0].n_past == 101


@pytest.mark.linux
def test_a_lease_that_was_lost(path: Path) -> None:
    """The end of the block is no error then, nor if the file is closed already."""
    with opened(path) as file:
        assert file._lease is not None
        file._lease.end()  # as the system does after 45 seconds
    with path.open("rb", buffering=0) as raw:
        lost = lease._Lease(raw)  # type: ignore[arg-type]
    lost.end()


@pytest.mark.linux
def test_a_writer_who_comes_later(path: Path) -> None:
    """What he waits for is copied, and he gets the file at once."""
    writing = threading.Thread(target=path.write_bytes, args=(b"new",))
    with opened(path) as file:
        assert not file.secure()
        assert is_mapped(file.view)
        writing.start()
        writing.join(0.2)
        assert file.secure()
        assert not is_mapped(file.view)
        writing.join(30)
        assert path.read_bytes() == b"new"
        assert file.view == CONTENT
        assert not file.secure()


def test_no_lease_while_a_context_is_busy(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that waits for the context keeps no writer of the file waiting."""
    monkeypatch.setattr(lease, "_WORTH_MAPPING", 0)
    ctx = make()
    ctx.decode(range(10))
    path = tmp_path / "state"
    ctx.save_state(path, durable=False)
    content = path.read_bytes()
    loading = threading.Thread(target=ctx.load_state, args=(path,))
    writing = threading.Thread(target=path.write_bytes, args=(content,))
    with ctx._handle.use():
        loading.start()
        loading.join(0.3)
        writing.start()
        writing.join(10)
        assert not writing.is_alive()
    loading.join(30)


@pytest.mark.linux
def test_a_file_that_is_rewritten_after_it_was_parsed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is restored is what was parsed last."""
    monkeypatch.setattr(lease, "_WORTH_MAPPING", 0)
    a, b = make(), make()
    path, other = tmp_path / "state", tmp_path / "other"
    a.decode(range(10))
    a.save_state(path, durable=False)
    a.decode(range(10))
    a.save_state(other, durable=False)
    secure = lease.Opened.secure
    calls: list[memoryview] = []

    def too_late(file: lease.Opened) -> bool:
        calls.append(file.view)
        if len(calls) == 2 and file._lease is not None:  # after the file was parsed
            file._lease.end()
            path.write_bytes(other.read_bytes())
        return secure(file)

    monkeypatch.setattr(lease.Opened, "secure", too_late)
    restored = b.load_state(path)
    assert len(calls) == 2
    assert restored.sequences[0].n_past == 20
    assert b.snapshot() == a.snapshot()
