"""After a failure anywhere in a save or a load: nothing is left, nothing is lost."""

from __future__ import annotations

import errno
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from llama_state import Checkpoint
from llama_state._io import atomic, lease
from llama_state._io.atomic import fill_file, write_file
from llama_state._io.lease import opened
from llama_state._io.reading import read_file
from llama_state.errors import SaveError
from tests.io.faults import Countdown, Injected, descriptors, failing_calls, failing_lines
from tests.layout.blobs import State

OLD, NEW, NEXT = b"the old content", b"new" * 5_000, b"next"
ERRORS = (
    lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    lambda: InterruptedError(errno.EINTR, os.strerror(errno.EINTR)),
    KeyboardInterrupt,
)
# A file whose owner was interrupted is closed when the owner goes, which Python remarks upon.
pytestmark = [
    pytest.mark.linux,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
Inject = Callable[[int], AbstractContextManager[Countdown]]


def write(path: Path) -> None:
    write_file(path, [NEW], durable=True)


def write_quickly(path: Path) -> None:
    write_file(path, iter([NEW]), durable=False, at_most=2 * len(NEW))


def fill(path: Path) -> None:
    fill_file(path, len(NEW), lambda pages: pages.__setitem__(slice(None), NEW), durable=True)


def save(path: Path) -> None:
    state = State("kv", seq=0).blob()
    Checkpoint(state, kind="sequence", session_version=11, source=0).save(path)


SAVES = (write, write_quickly, fill, save)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free what is replaced in a thread, and map what is loaded, also if it is small."""
    monkeypatch.setattr(atomic, "_SLOW_TO_FREE", 1)
    monkeypatch.setattr(lease, "_WORTH_MAPPING", 1)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def attempts(run: Callable[[], object], inject: Inject) -> Iterator[str]:
    """Run once for each event, with a failure at that one; yield where it was."""
    for turn in range(100_000):
        with inject(turn) as countdown:
            failed = False
            try:
                run()
            except (Injected, KeyboardInterrupt, OSError):
                failed = True
        if not countdown.raised:
            assert not failed
            return
        yield countdown.place
    raise AssertionError("it does not end")


def check_saves(folder: Path, save_to: Callable[[Path], None], inject: Inject) -> int:
    """Fail a save at each event; return how many there were."""
    path = folder / "state"
    path.write_bytes(OLD)
    save_to(path)
    new = path.read_bytes()
    path.write_bytes(OLD)
    before = descriptors()
    count = 0
    for place in attempts(lambda: save_to(path), inject):
        count += 1
        atomic._wait_for_frees()
        assert path.read_bytes() in (OLD, new), place
        assert descriptors() == before, place
        # Only where the removal itself fails does it stay, for the next save to remove.
        if place not in ("unlink", "lstat", "fstat"):
            assert names(folder) == ["state"], place
        saving = threading.Thread(target=write_file, args=(path, [NEXT]), kwargs={"durable": False})
        saving.start()
        saving.join(30)
        assert path.read_bytes() == NEXT, place
        assert names(folder) == ["state"], place
        path.write_bytes(OLD)
    return count


@pytest.mark.parametrize("save_to", SAVES)
@pytest.mark.parametrize("error", ERRORS)
def test_saves_whose_calls_fail(
    tmp_path: Path, save_to: Callable[[Path], None], error: Callable[[], BaseException]
) -> None:
    """Each call of the system fails in turn."""
    assert check_saves(tmp_path, save_to, lambda turn: failing_calls(turn, error)) > 10


@pytest.mark.parametrize("save_to", SAVES)
def test_saves_that_are_interrupted(tmp_path: Path, save_to: Callable[[Path], None]) -> None:
    """An exception at each line."""
    assert check_saves(tmp_path, save_to, lambda turn: failing_lines(turn)) > 50


def test_an_error_that_is_kept(tmp_path: Path) -> None:
    """It keeps its frames, as at a prompt: the part file is gone and closed all the same."""
    path = tmp_path / "state"
    before = descriptors()
    for turn in range(1000):
        with failing_calls(turn, KeyboardInterrupt) as countdown:
            try:
                write(path)
            except KeyboardInterrupt as error:
                kept = error
        if not countdown.raised:
            assert turn > 10
            return
        # In the cleaning up itself, only the end of the error ends it.
        if not any("close" in frame.name for frame in traceback.extract_tb(kept.__traceback__)):
            assert descriptors() == before, countdown.place
            assert names(tmp_path) in ([], ["state"]), countdown.place


def load(path: Path) -> None:
    with opened(path) as file:
        assert file.view == NEW
        file.secure()


def read(path: Path) -> None:
    assert read_file(path) == NEW


@pytest.mark.parametrize("load_from", [load, read])
@pytest.mark.parametrize("lines", [False, True])
def test_loads_that_fail(tmp_path: Path, load_from: Callable[[Path], None], lines: bool) -> None:
    """At each call and each line: no descriptor and no lease stays, the next load works."""
    path = tmp_path / "state"
    path.write_bytes(NEW)
    load_from(path)
    before = descriptors()

    def inject(turn: int) -> AbstractContextManager[Countdown]:
        if lines:
            return failing_lines(turn)
        return failing_calls(turn, ERRORS[0])

    for place in attempts(lambda: load_from(path), inject):
        assert descriptors() == before, place
        # A lease that stayed would stop this for 45 seconds.
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        os.close(fd)
        load_from(path)


def test_a_failed_save_says_so(tmp_path: Path) -> None:
    """What the system refuses is a SaveError, whichever call it is."""
    path = tmp_path / "state"
    for turn in range(100):
        path.write_bytes(OLD)
        with failing_calls(turn, ERRORS[0]) as countdown:
            said = _said_of(path)
        assert path.read_bytes() == (NEW if said is None or "state saved" in said else OLD)
        if not countdown.raised:
            return


def _said_of(path: Path) -> str | None:
    """Save, and return the text of the SaveError, if there was one."""
    try:
        write(path)
    except SaveError as error:
        return str(error)
    return None
