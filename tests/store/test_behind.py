"""Write behind: order, bounds, failures, forks, interruptions, the end of the process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from llama_state.store.behind import WriteBehind
from llama_state.store.objects import Name
from llama_state.store.places.backend import Backend
from llama_state.store.places.folder import FolderBackend
from llama_state.store.places.memory import MemoryBackend
from llama_state.store.prompt import Prompt
from llama_state.store.troubles import Troubles
from tests.interruptions import STRIDE, interrupted, places
from tests.many_threads import together

from .objects import as_one, chain, packed

PROMPT = Prompt.of(range(20))
OBJECTS = [(name, packed(name, words, end, bytes(100))) for name, words, end in chain(PROMPT)]
SIZE = sum(map(len, OBJECTS[0][1]))


class Gated(MemoryBackend):
    """A place that writes when it is let.

    Attributes:
        gate: Writing waits for it.
        failing: What cannot be written.
        order: What was written.
    """

    def __init__(self) -> None:
        super().__init__(1 << 24)
        self.gate = threading.Event()
        self.failing: set[Name] = set()
        self.order: list[Name] = []

    def put(self, name: Name, parts: Iterable[bytes]) -> bool:  # type: ignore[override]
        """Write, later."""
        assert self.gate.wait(30)
        if name in self.failing:
            raise OSError(errno.ENOSPC, "full")
        self.order.append(name)
        return super().put(name, parts)


def behind(
    backend: Backend, pending_bytes: int = 1 << 20, troubles: Troubles | None = None
) -> WriteBehind:
    """What writes to it."""
    troubles = troubles or Troubles("tests")
    return WriteBehind(as_one([backend], troubles), troubles, pending_bytes)


def put_all(to: WriteBehind) -> list[bool]:
    """Give it all objects."""
    return [to.put(name, parts) for name, parts in OBJECTS]


def test_in_order() -> None:
    """What is put is there, waits, is written in order, and not put twice."""
    backend = Gated()
    to = behind(backend)
    done: list[int] = []
    assert put_all(to) == [True] * 5
    to.afterwards(lambda: done.append(len(backend.order)))
    assert put_all(to) == [False] * 5
    assert all(to.has(name) for name, _ in OBJECTS)
    assert to.pending_bytes == 5 * SIZE
    assert not to.flush(0.01)
    assert not backend.order
    backend.gate.set()
    assert to.flush(30)
    assert backend.order == [name for name, _ in OBJECTS]
    assert (done, to.pending_bytes, to.dropped, to.refused) == ([5], 0, 0, 0)
    assert all(to.has(name) for name, _ in OBJECTS)


def test_the_copy_is_taken() -> None:
    """What the caller does with its buffer afterwards makes no difference."""
    backend = Gated()
    to = behind(backend)
    name, parts = OBJECTS[0]
    buffer = bytearray(b"".join(parts))
    assert to.put(name, [buffer])
    buffer[:] = bytes(len(buffer))
    backend.gate.set()
    assert to.flush()
    data = b"".join(parts)
    with backend.open(name, len(data)) as view:
        assert view == data


def test_bounded() -> None:
    """More than may wait is dropped and counted, until there is room again."""
    backend = Gated()
    to = behind(backend, 2 * SIZE)
    assert put_all(to) == [True, True, False, False, False]
    assert (to.dropped, to.pending_bytes) == (3, 2 * SIZE)
    backend.gate.set()
    assert not to.flush()
    assert to.flush()
    assert to.put(*OBJECTS[2])
    assert to.flush()
    assert backend.order == [name for name, _ in OBJECTS[:3]]


def test_failures() -> None:
    """What cannot be written is counted, and nothing is written that goes on from it."""
    backend = Gated()
    backend.gate.set()
    backend.failing = {OBJECTS[1][0]}
    troubles = Troubles("tests")
    to = behind(backend, troubles=troubles)
    for each in OBJECTS:
        to.put(*each)
        to.settle()  # the thread ends each time
    assert not to.flush()
    assert backend.order == [OBJECTS[0][0]]
    assert to.refused == 4
    assert troubles.failures == {"write behind: OSError": 1}
    backend.failing.clear()
    assert put_all(to) == [False, *[True] * 4]
    assert to.flush()
    assert len(backend.order) == 5


def test_any_error() -> None:
    """One that nobody thought of is counted, and ends nothing."""
    backend = MemoryBackend(1 << 20)
    troubles = Troubles("tests")
    to = behind(backend, troubles=troubles)
    to.afterwards(lambda: 1 // 0)
    put_all(to)
    assert to.flush()
    assert troubles.failures == {"write behind: ZeroDivisionError": 1}


def test_many_threads() -> None:
    """Several threads put and flush at once: all is there in the end, and no thread is left."""
    backend = MemoryBackend(1 << 24)
    to = behind(backend)
    prompts = [Prompt.of([n, *range(60)]) for n in range(8)]

    def write(n: int) -> None:
        for name, words, end in chain(prompts[n]):
            assert to.put(name, packed(name, words, end, bytes(10)))
            to.settle()

    together(len(prompts), write)
    assert to.flush(30)
    assert len(list(backend.entries())) == sum(len(chain(prompt)) for prompt in prompts)
    for thread in threading.enumerate():
        if thread.name == "llama_state-write":
            thread.join(10)
            assert not thread.is_alive()


def test_interrupted() -> None:
    """Wherever a call ends: what it put is written whole or not at all, and the next one works."""
    made: list[tuple[MemoryBackend, WriteBehind]] = []

    def fresh() -> None:
        for _, to in made:
            assert to.settle(30)
        backend = MemoryBackend(1 << 20)
        made[:] = [(backend, behind(backend))]

    def call() -> None:
        ((_, to),) = made
        put_all(to)
        to.afterwards(lambda: None)
        to.flush(30)

    fresh()
    found = [place for place in places(call) if place.stack[0][0] != "WriteBehind._work"]
    for place in found[::STRIDE]:  # signals come to the main thread
        fresh()
        interrupted(call, place)
        ((backend, to),) = made
        assert to.settle(30)
        keys = {stored.name.key for stored in backend.entries()} | {OBJECTS[0][0].parent}
        assert all(stored.name.parent in keys for stored in backend.entries())
        put_all(to)
        assert to.settle(30)
        assert all(backend.has(name) for name, _ in OBJECTS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked() -> None:
    """A forked process has nothing that waits, and can write on its own."""
    backend = Gated()
    to = behind(backend)
    to.put(*OBJECTS[0])
    child = os.fork()
    if not child:
        backend.gate.set()
        good = not to.pending_bytes and to.flush(5) and to.put(*OBJECTS[1]) and to.flush(20)
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    backend.gate.set()
    assert to.flush(30)
    assert backend.order == [OBJECTS[0][0]]


ENDING = """
import sys
from pathlib import Path
from llama_state.store.places.folder import FolderBackend
from tests.store.test_behind import OBJECTS, behind
to = behind(FolderBackend(Path(sys.argv[1]), 1 << 24), 1 << 24)
for each in OBJECTS:
    assert to.put(*each)
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "raise KeyboardInterrupt"])
def test_the_end_of_the_process(tmp_path: Path, end: str) -> None:
    """Python waits for what is not written yet, however the program ends."""
    code = ENDING.format(end=end)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=60, check=False
    )
    assert b"Error" not in done.stderr
    backend = FolderBackend(tmp_path, 1 << 24)
    assert all(backend.has(name) for name, _ in OBJECTS)
