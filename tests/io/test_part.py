"""Part files: made by their save, seen by nobody else, never those of others."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llama_state._io import part
from llama_state._io.atomic import replacing, write_file
from llama_state._io.part import PartFile, remove_leftovers
from llama_state._io.platform import files
from llama_state.errors import SaveError

CONTENT = b"the content of another file"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("strict_umask")
@pytest.mark.parametrize("mode", [None, 0o600, 0o644, 0o666, 0o400])
def test_the_mode_is_the_final_one_from_the_start(
    path: Path, mode: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can open the part file who could not open the file that it replaces."""
    if mode is not None:
        path.write_bytes(b"old")
        path.chmod(mode)
    seen: list[int] = []

    def look(*_: object) -> None:
        seen.extend(stat.S_IMODE(p.stat().st_mode) for p in path.parent.glob(".state*.part"))

    lock = files.try_lock
    monkeypatch.setattr(files, "try_lock", lambda fd: (look(), lock(fd))[1])
    write_file(path, [b"new"], durable=False, progress=look)
    final = 0o640 if mode is None else mode
    assert seen
    assert all(found & ~final == 0 for found in seen)
    assert stat.S_IMODE(path.stat().st_mode) == final


def hard_link(taken: Path) -> None:
    other = taken.with_name("other")
    other.write_bytes(CONTENT)
    os.link(other, taken)


def symbolic_link(taken: Path) -> None:
    other = taken.with_name("other")
    other.write_bytes(CONTENT)
    taken.symlink_to(other)


def fifo(taken: Path) -> None:
    os.mkfifo(taken)


def folder(taken: Path) -> None:
    taken.mkdir()


@pytest.mark.parametrize("lay", [hard_link, symbolic_link, fifo, folder])
def test_what_lies_there_is_not_taken_over(path: Path, lay: Callable[[Path], None]) -> None:
    """It stays as it is, and the save takes the next name."""
    taken = path.with_name(".state.part")
    lay(taken)
    before = taken.lstat()
    write_file(path, [b"new"], durable=False)
    assert path.read_bytes() == b"new"
    assert os.path.samestat(before, taken.lstat())
    other = path.with_name("other")
    assert not other.exists() or other.read_bytes() == CONTENT
    assert set(names(path.parent)) <= {"state", ".state.part", "other"}


def test_the_leftover_of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It neither blocks a save nor is it removed or written to."""
    taken = path.with_name(".state.part")
    taken.write_bytes(CONTENT)
    monkeypatch.setattr(os, "geteuid", lambda: taken.stat().st_uid + 1)
    write_file(path, [b"new"], durable=False)
    assert path.read_bytes() == b"new"
    assert taken.read_bytes() == CONTENT


def test_a_leftover_is_a_new_file_then(path: Path) -> None:
    """Who has the leftover open sees nothing of the state that is saved in its place."""
    taken = path.with_name(".state.part")
    taken.write_bytes(CONTENT)
    with taken.open("r+b") as open_before:
        write_file(path, [b"new"], durable=False)
        assert open_before.read() == CONTENT
        open_before.write(b"more")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["state"]


@pytest.mark.parametrize("name", [".state.part", ".state.7.part"])
def test_a_leftover_that_has_its_target(path: Path, name: str) -> None:
    """Killed between the link and the removal of the other name, it is a leftover all the same."""
    path.write_bytes(CONTENT)
    os.link(path, path.with_name(name))
    remove_leftovers(path.parent)
    assert names(path.parent) == ["state"]
    assert path.read_bytes() == CONTENT


def test_saves_do_not_wait_for_each_other(path: Path) -> None:
    """One that stands still keeps its part file; others take another name."""
    with replacing(path, durable=False) as (fd, _):
        os.write(fd, b"slow")
        saving = threading.Thread(target=write_file, args=(path, [b"a"]), kwargs={"durable": False})
        saving.start()
        saving.join(30)
        assert path.read_bytes() == b"a"
        assert names(path.parent) == [".state.part", "state"]
    assert path.read_bytes() == b"slow"
    assert names(path.parent) == ["state"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A file system without flock can be saved to; no leftover is removed there."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    path.with_name(".state.part").write_bytes(CONTENT)
    for content in (b"one", b"two"):
        write_file(path, [content], durable=False)
        assert path.read_bytes() == content
    assert names(path.parent) == [".state.part", "state"]


def test_one_that_is_taken_for_a_leftover(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed by another save before it was locked, it is made again."""
    lock, first = files.try_lock, [True]

    def too_late(fd: int) -> bool | None:
        if first.pop() if first else False:
            path.with_name(".state.part").unlink()
        return lock(fd)

    monkeypatch.setattr(files, "try_lock", too_late)
    write_file(path, [b"new"], durable=False)
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["state"]


def test_every_name_is_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That ends, and says why."""
    monkeypatch.setattr(part, "_MOST_NAMES", 3)
    for name in (".state.part", ".state.1.part", ".state.2.part"):
        path.with_name(name).mkdir()
    with pytest.raises(SaveError, match="too many part files"):
        write_file(path, [b"new"], durable=False)


def test_a_forked_process_removes_nothing(path: Path) -> None:
    """It has a copy of the object, not the file."""
    script = """
import os, sys
from pathlib import Path
from llama_state._io.part import PartFile
with PartFile(Path(sys.argv[1]), None) as part:
    if os.fork() == 0:
        sys.exit(0)
    assert os.wait()[1] == 0
    part.replace_target()
"""
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60)
    assert names(path.parent) == ["state"]


@pytest.mark.parametrize("number", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_a_target_that_comes_to_be(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    """It is not replaced if that is not wanted, on any file system."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "no links")

    if number is not None:
        monkeypatch.setattr(os, "link", refuse)
    write_file(path, [b"first"], durable=True, replace=False)

    def make(done: int, total: int) -> None:
        path.write_bytes(CONTENT)

    path.unlink()
    with pytest.raises(FileExistsError) as caught:
        write_file(path, [b"new"], durable=False, replace=False, progress=make)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["state"]


def test_a_reserved_name_goes_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a file system has no links, and then fails: no empty file stays."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(PartFile, "replace_target", fail)
    with pytest.raises(SaveError):
        write_file(path, [b"new"], durable=False, replace=False)
    assert names(path.parent) == []


def test_a_mount_point_has_its_word(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single file that is mounted cannot be replaced: the error says what to do."""
    path.write_bytes(b"old")

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(PartFile, "replace_target", busy)
    with pytest.raises(SaveError, match="mount its folder instead") as caught:
        write_file(path, [b"new"], durable=False)
    assert caught.value.errno == errno.EBUSY
    assert names(path.parent) == ["state"]
