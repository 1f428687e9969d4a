"""Files are whole or absent."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_state._io import atomic, buffers, pages
from llama_state._io.atomic import fill_file, write_file
from llama_state._io.platform import files
from llama_state._io.reading import read_file
from llama_state.errors import SaveError, TruncatedError

OLD = b"the old content"


def litter(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "state")


@pytest.mark.parametrize("durable", [True, False])
def test_parts_are_written_in_order(tmp_path: Path, durable: bool) -> None:
    """What is written is the parts one after the other; the size comes back; nothing else stays."""
    path = tmp_path / "state"
    assert write_file(path, [b"ab", bytearray(b"cd"), memoryview(b"ef")], durable=durable) == 6
    assert bytes(read_file(path)) == b"abcdef"
    assert litter(tmp_path) == []


def test_an_existing_file_is_replaced_with_its_mode(tmp_path: Path) -> None:
    """A private file stays private, and a link goes on pointing at the file."""
    path, link = tmp_path / "state", tmp_path / "link"
    path.write_bytes(OLD)
    path.chmod(0o600)
    link.symlink_to(path)
    write_file(link, [b"new"], durable=False)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert link.is_symlink()


def test_errors_keep_the_old_file(tmp_path: Path) -> None:
    """A folder, a device and a missing folder are SaveErrors with the errno of the fact."""
    (tmp_path / "folder").mkdir()
    for path, number in [
        (tmp_path / "folder", errno.EISDIR),
        (tmp_path / "missing" / "state", errno.ENOENT),
        (Path("/dev/full"), errno.EINVAL),
    ]:
        with pytest.raises(SaveError) as caught:
            write_file(path, [b"new"], durable=True)
        assert caught.value.errno == number
        assert isinstance(caught.value, OSError)
    assert Path("/dev/full").is_char_device()
    assert litter(tmp_path) == ["folder"]


def test_an_exception_while_writing_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even KeyboardInterrupt leaves the old file and no litter."""
    path = tmp_path / "state"
    path.write_bytes(OLD)

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, [b"new"], durable=True)
    monkeypatch.undo()
    assert path.read_bytes() == OLD
    assert litter(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take less than it is given."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    content = bytes(range(256))
    write_file(tmp_path / "state", [content], durable=False)
    assert (tmp_path / "state").read_bytes() == content


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A full or broken disk found at any step is a SaveError with its errno."""
    path = tmp_path / "state"
    path.write_bytes(OLD)

    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    steps = ((files, "reserve"), (os, "write"), (files, "sync"))
    for owner, step in steps:
        with monkeypatch.context() as patch, pytest.raises(SaveError) as caught:
            patch.setattr(owner, step, failing)
            write_file(path, [b"new"], durable=True)
        assert caught.value.errno == number
        assert path.read_bytes() == OLD
        assert litter(tmp_path) == []


def test_what_others_raise_is_not_of_the_file(tmp_path: Path) -> None:
    """Errors of the parts and of a progress are passed on; the old file is there."""
    path = tmp_path / "state"
    path.write_bytes(OLD)
    for error in (OSError(errno.EIO, "theirs"), ValueError("theirs"), KeyboardInterrupt()):

        def fail(*_: int, error: BaseException = error) -> bytes:
            raise error

        for call in (
            lambda fail=fail: write_file(path, map(fail, [1]), durable=False, at_most=9),
            lambda fail=fail: write_file(path, [b"new"], durable=False, progress=fail),
            lambda fail=fail: fill_file(path, 9, fail, durable=False),
            lambda fail=fail: fill_file(path, 9, len, durable=False, progress=fail),
        ):
            with pytest.raises(type(error)) as caught:
                call()
            assert caught.value is error
            assert path.read_bytes() == OLD
            assert litter(tmp_path) == []


def test_progress_of_parts_that_are_made_meanwhile(tmp_path: Path) -> None:
    """It ends with the size, though there was room for more."""
    steps: list[tuple[int, int]] = []
    size = write_file(
        tmp_path / "state",
        (bytes([n]) * 10 for n in range(3)),
        durable=False,
        at_most=100,
        progress=lambda *step: steps.append(step),
    )
    assert size == 30
    assert steps == [(0, 100), (10, 100), (20, 100), (30, 100), (30, 30)]


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_that_is_filled_in_place(tmp_path: Path, durable: bool) -> None:
    """Its pages are had in memory, then written to, then it takes its place."""
    path = tmp_path / "state"
    path.write_bytes(OLD)

    def fill(pages: memoryview) -> None:
        assert path.read_bytes() == OLD
        pages[:] = bytes(range(256)) * 4

    assert fill_file(path, 1024, fill, durable=durable) == 1024
    assert path.read_bytes() == bytes(range(256)) * 4
    assert litter(tmp_path) == []


@pytest.mark.linux
def test_no_page_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that cannot be reserved, or not be had, are a SaveError and never written to."""
    path = tmp_path / "state"
    path.write_bytes(OLD)
    written: list[memoryview] = []

    def refusing(number: int) -> Callable[..., None]:
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return refuse

    for number, found in [(errno.ENOSPC, errno.ENOSPC), (errno.EOPNOTSUPP, errno.ENOMEM)]:
        limited = buffers.POOL.limited(0)
        with limited, monkeypatch.context() as patch, pytest.raises(SaveError) as caught:
            patch.setattr(os, "posix_fallocate", refusing(number))
            fill_file(path, 10, written.append, durable=False)
        assert caught.value.errno == found
    broken = SimpleNamespace(pages_populate=lambda *_: errno.EFAULT)
    with monkeypatch.context() as patch, pytest.raises(SaveError) as caught:
        patch.setattr(pages, "lib", broken)
        fill_file(path, 10, written.append, durable=False)
    assert caught.value.errno == errno.EIO
    assert written == []
    assert path.read_bytes() == OLD
    assert litter(tmp_path) == []


@pytest.mark.linux
def test_a_large_old_file_is_freed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread frees it; room that only it has is waited for."""
    monkeypatch.setattr(atomic, "_SLOW_TO_FREE", 1)
    path = tmp_path / "state"
    path.write_bytes(OLD)
    free, fallocate = atomic._free, os.posix_fallocate
    freed, full = threading.Event(), threading.Event()

    def slowly(file: FileIO) -> None:
        full.wait(30)
        freed.set()
        free(file)

    def until_freed(fd: int, start: int, size: int) -> None:
        if not freed.is_set():
            full.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(fd, start, size)

    monkeypatch.setattr(atomic, "_free", slowly)
    write_file(path, [b"new"], durable=False)
    assert path.read_bytes() == b"new"
    assert not freed.is_set()
    monkeypatch.setattr(os, "posix_fallocate", until_freed)
    write_file(path, [b"newer"], durable=False)
    assert path.read_bytes() == b"newer"
    assert freed.is_set()
    assert litter(tmp_path) == []


def test_writers_of_one_path(tmp_path: Path) -> None:
    """Threads that save to one path at once leave one of their files, whole."""
    path = tmp_path / "state"
    contents = [bytes([n]) * 200_000 for n in range(8)]
    threads = [
        threading.Thread(target=write_file, args=(path, [c]), kwargs={"durable": False})
        for c in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert litter(tmp_path) == []


WRITER = """
import sys
from llama_state._io.atomic import write_file
print("ready", flush=True)
while True:
    for byte in (b"A", b"B"):
        write_file(sys.argv[1], [byte * 3_000_000], durable=False)
"""


def test_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    """kill -9 in the middle of saves leaves one of the two states, and the next save clears up."""
    path = tmp_path / "state"
    whole = {b"A" * 3_000_000, b"B" * 3_000_000}
    for turn in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.01 + 0.003 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not path.exists() or path.read_bytes() in whole
    write_file(path, [b"after"], durable=False)
    assert path.read_bytes() == b"after"
    assert litter(tmp_path) == []


def test_reading_what_is_no_file(tmp_path: Path) -> None:
    """Missing files, folders and devices are OSErrors; an empty file is no bytes."""
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "state")
    with pytest.raises(OSError, match="folder"):
        read_file(tmp_path)
    with pytest.raises(OSError, match="not a regular file"):
        read_file("/dev/zero")
    (tmp_path / "state").touch()
    assert read_file(tmp_path / "state") == b""


def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, shrink_once_opened: Callable[[Path, int], None]
) -> None:
    """Nothing trusts the size that a file had a moment ago."""
    path = tmp_path / "state"
    path.write_bytes(bytes(100))
    shrink_once_opened(path, 60)
    with pytest.raises(TruncatedError) as caught:
        read_file(path)
    assert (caught.value.need, caught.value.have) == (100, 60)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    """A FIFO without a writer is refused at once."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "fifo")


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    """A loop of links and a NUL in the name are SaveErrors too."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", f"{tmp_path}/a\0b"):
        with pytest.raises(SaveError):
            write_file(path, [b"new"], durable=False)


def test_long_names(tmp_path: Path) -> None:
    """A name that fits its folder can be saved to, though the temporary one is longer."""
    path = tmp_path / ("n" * 255)
    assert write_file(path, [b"new"], durable=False) == 3
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
