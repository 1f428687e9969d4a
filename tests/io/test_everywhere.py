"""What must work on every system: run for real on Linux here, on macOS and Windows by the workflow.

No libllama is needed, and nothing that only some systems have.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llama_state._io import lease, reading
from llama_state._io.atomic import fill_file, write_file
from llama_state._io.buffers import POOL
from llama_state._io.pages import populate
from llama_state._io.platform import files, libraries, memory, processes
from llama_state.errors import SaveError
from llama_state.store.objects import Name
from llama_state.store.places.folder import FolderBackend

WINDOWS = sys.platform == "win32"
# All that a file in text mode would change, or end at.
CONTENT = b"\r\n\n\r\x1a\x00" * 300_000

LOCKED = """
import sys
from llama_state._io.platform import files
with open(sys.argv[1], "r+b", buffering=0) as file:
    print(files.try_lock(file.fileno()))
"""


def name(number: int) -> Name:
    """The name of an object."""
    return Name(bytes(32), bytes([number]) * 32, 1, "R")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.mark.parametrize("durable", [True, False])
def test_files_hold_what_was_written(path: Path, durable: bool) -> None:
    for content in (CONTENT, CONTENT[1:], b""):
        assert write_file(path, [content[:7], content[7:]], durable=durable) == len(content)
        assert path.read_bytes() == content
        assert bytes(reading.read_file(path)) == content
        assert bytes(reading.map_file(path)) == content
        with lease.opened(path) as file:
            assert file.view == content
    assert [each.name for each in path.parent.iterdir()] == ["state"]


def test_a_file_that_is_filled(path: Path) -> None:
    def fill(view: memoryview) -> None:
        view[:] = CONTENT

    fill_file(path, len(CONTENT), fill, durable=True)
    assert path.read_bytes() == CONTENT
    with POOL.limited(1000), lease.opened(path) as file:
        assert file.view == CONTENT


def test_nothing_that_exists_is_replaced(path: Path) -> None:
    write_file(path, [b"first"], durable=True, replace=False)

    def late(done: int, total: int) -> None:
        late_path.write_bytes(b"late")

    with pytest.raises(FileExistsError):
        write_file(path, [b"new"], durable=True, replace=False)
    late_path = path.with_name("late")
    with pytest.raises(FileExistsError):
        write_file(late_path, [b"new"], durable=True, replace=False, progress=late)
    assert (path.read_bytes(), late_path.read_bytes()) == (b"first", b"late")
    assert sorted(each.name for each in path.parent.iterdir()) == ["late", "state"]


def test_a_file_that_somebody_has_open(path: Path) -> None:
    """It is replaced under the reader; on Windows the error says what to do, nothing is lost."""
    path.write_bytes(b"old")
    view = reading.map_file(path)
    if WINDOWS:
        with pytest.raises(SaveError, match="open or mapped"):
            write_file(path, [b"new"], durable=True)
    else:
        write_file(path, [b"new"], durable=True)
    assert bytes(view) == b"old"
    assert path.read_bytes() == (b"old" if WINDOWS else b"new")
    assert [each.name for each in path.parent.iterdir()] == ["state"]
    del view
    write_file(path, [b"newer"], durable=True)
    assert path.read_bytes() == b"newer"


def test_locks_hold_between_processes(path: Path) -> None:
    path.write_bytes(CONTENT)
    command = [sys.executable, "-c", LOCKED, str(path)]
    with path.open("r+b", buffering=0) as file:
        files.lock(file.fileno())
        assert file.tell() == 0
        assert path.read_bytes() == CONTENT  # what is in it can be read all the same
        there = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert there.stdout.strip() == "False"
    after = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert after.stdout.strip() == "True"


def test_a_lock_is_waited_for(path: Path) -> None:
    path.write_bytes(b"")
    with path.open("r+b", buffering=0) as mine, path.open("r+b", buffering=0) as other:
        files.lock(mine.fileno())
        waiting = threading.Thread(target=files.lock, args=(other.fileno(),))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        mine.close()
        waiting.join(30)
        assert not waiting.is_alive()


def test_parts_of_files(path: Path) -> None:
    path.write_bytes(CONTENT)
    with path.open("r+b", buffering=0) as file:
        assert files.read_at(file.fileno(), 12, 6 * 1000) == CONTENT[:12]
        files.write_at(file.fileno(), b"\n\r\n", 1)
        assert files.read_at(file.fileno(), 6, 0) == CONTENT[:1] + b"\n\r\n" + CONTENT[4:6]
        assert files.read_at(file.fileno(), 6, len(CONTENT)) == b""


def test_space_is_reserved_or_not(path: Path) -> None:
    with path.open("w+b", buffering=0) as file:
        reserved = files.reserve(file.fileno(), 1 << 20)
        assert path.stat().st_size == (1 << 20 if reserved else 0)
    assert reserved or WINDOWS


def test_objects_of_a_store(tmp_path: Path) -> None:
    """Also one that is evicted while it is read: on Windows it stays until it is not."""
    place = FolderBackend(tmp_path / "kv", 3 * len(CONTENT), durable=True)
    for number in (1, 2):
        assert place.put(name(number), [CONTENT])
        assert not place.put(name(number), [CONTENT])
    with place.open(name(1), len(CONTENT)) as view:
        place.evict(0)
        assert view == CONTENT
    place.evict(0)
    assert [*place.entries()] == []
    assert place.put(name(1), [CONTENT])
    place.set_aside(name(1))
    assert not place.has(name(1))
    assert len(CONTENT) <= place.used_bytes() <= len(CONTENT) + 100  # it can be looked at


def test_memory() -> None:
    pages = memory.new_memory(1 << 20)
    assert bytes(pages[:]) == bytes(1 << 20)
    pages[:4] = b"\r\n\x1a\n"
    for advice in ("MADV_FREE", "MADV_HUGEPAGE", "MADV_NO_SUCH"):
        memory.advise(pages, advice)
    assert populate(memoryview(pages), write=False) in (True, False)
    assert processes.usable_cores() >= 1


def test_loaded_libraries() -> None:
    """What Python itself has loaded is found, and known to be loaded; what is none is not."""
    loaded = [each for each in libraries.loaded_files() if "python" in each.name.lower()]
    real = [each for each in libraries.loaded_files() if libraries.loaded_library(each)]
    assert loaded or real
    assert libraries.loaded_library(Path(__file__)) is None
    with pytest.raises(OSError, match=r"."):
        libraries.open_library(Path(__file__))


def test_urls_of_files() -> None:
    assert files.path_of_url("/a%20b") == Path("/a b")
    if WINDOWS:
        assert files.path_of_url("/C:/a%20b") == Path("C:/a b")
