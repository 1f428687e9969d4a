"""A folder of objects: its capacity, damage, several processes, kills."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_state.errors import StateError
from llama_state.store.lookup import DamagedError, Lookup, Needs
from llama_state.store.objects import NO_PARENT, Name, parse, payload
from llama_state.store.places.eviction import in_order
from llama_state.store.places.folder import FolderBackend
from llama_state.store.places.memory import MemoryBackend
from llama_state.store.prompt import Media, Prompt
from llama_state.store.reading import Reader

from .objects import ROOT, SEAL, TRUST, chain, other, packed

ROWS = Needs(rows=True, window=False, state=False)


def total(folder: Path) -> int:
    """The bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def put(backend: FolderBackend | MemoryBackend, prompt: Prompt, nbytes: int = 100) -> list[bool]:
    """Write the objects of a prompt, as long as there is room."""
    written = []
    for name, words, end in chain(prompt):
        written.append(backend.put(name, packed(name, words, end, bytes(nbytes))))
        if not backend.has(name):
            break
    return written


def hit(backend: FolderBackend | MemoryBackend, prompt: Prompt) -> int:
    """The tokens of a prompt that are found."""
    lookup = Lookup(backend, TRUST)
    return lookup.best(lookup.walk(ROOT, prompt), prompt, ROWS, len(prompt)).n_tokens


def test_written_once(tmp_path: Path) -> None:
    """The first object of a name stays, files are private, and a prompt is found by its tokens."""
    backend = FolderBackend(tmp_path / "kv", 1 << 20)
    prompt = Prompt.of(range(10))
    assert put(backend, prompt) == [True] * 3
    assert put(backend, prompt, 200) == [False] * 3
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "kv").rglob("*.R")}
    assert modes == {0o600}
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    again = FolderBackend(tmp_path / "kv", 1 << 20)
    assert hit(again, Prompt.of([*range(10), 5])) == 10
    assert hit(again, Prompt.of([*range(9), 77, 78])) == 9
    assert hit(again, Prompt.of([77])) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 24)), min_size=1, max_size=30))
@settings(deadline=None)
def test_capacity(tmp_path_factory: pytest.TempPathFactory, prompts: list[tuple[int, int]]) -> None:
    """Whatever is written, the files take no more than the capacity, and no chain is broken."""
    folder = tmp_path_factory.mktemp("kv")
    capacity = 60_000
    backend = FolderBackend(folder, capacity)
    for first, n in prompts:
        put(backend, Prompt.of([first, *range(n)]), 500)
        assert total(folder) <= capacity
        keys = {stored.name.key for stored in backend.entries()} | {ROOT}
        assert all(stored.name.parent in keys for stored in backend.entries())


def test_order() -> None:
    """Ends of chains go first, those used longest ago; what is pinned stays with what it needs."""
    backend = MemoryBackend(1 << 20)
    prompts = [Prompt.of([9, *range(12)]), Prompt.of([9, *range(7), 50, 51]), Prompt.of([4])]
    for prompt in prompts:
        put(backend, prompt)
    names = [[name for name, _, _ in chain(prompt)] for prompt in prompts]
    for when, of in enumerate(names):
        backend.touch(of, 1000.0 + when)
    pin = other(names[1][1], "P")
    backend.put(pin, [b"pin"])
    backend.touch([pin], time.time() + 100)
    gone = [stored.name for stored in in_order(backend.entries())]
    kept = {name for name, _, _ in chain(prompts[1])[:2]} | {pin}
    assert set(gone) == {name for of in names for name in of} - kept
    # The first prompt was used first, from its end on; its beginning is that of the second.
    assert gone.index(names[0][3]) < gone.index(names[0][2]) < gone.index(names[2][0])


def test_larger_than_all(tmp_path: Path) -> None:
    """An object that is larger than the capacity is refused, and nothing goes for it."""
    backend = FolderBackend(tmp_path, 20_000)
    assert put(backend, Prompt.of([1])) == [True]
    assert put(backend, Prompt.of([2]), 30_000) == [False]
    assert hit(backend, Prompt.of([1])) == 1


def test_smaller_capacity(tmp_path: Path) -> None:
    """A folder that is opened with a smaller capacity is made to fit."""
    put(FolderBackend(tmp_path, 1 << 20), Prompt.of(range(100)))
    FolderBackend(tmp_path, 30_000)
    assert total(tmp_path) <= 30_000


@given(st.data())
@settings(deadline=None)
def test_damage(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A byte that differs, or is missing, anywhere in an object is noticed."""
    name, words, end = chain(Prompt.of(range(4)))[0]
    blob = bytearray(b"".join(packed(name, words, end, bytes(range(200)))))
    sound = bytes(blob)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] ^= data.draw(st.integers(1, 255))
    else:
        del blob[data.draw(st.integers(0, len(blob) - 1)) :]
    assert payload(memoryview(sound), parse(sound, SEAL, keyed=False), SEAL)
    with pytest.raises(StateError):
        payload(memoryview(blob), parse(blob, SEAL, keyed=False), SEAL)


def test_count_after_a_crash(tmp_path: Path) -> None:
    """What is used is counted anew: after files came or went, and without the count."""
    backend = FolderBackend(tmp_path, 50_000)
    put(backend, Prompt.of(range(8)))
    (tmp_path / "lock").write_bytes(b"")
    (tmp_path / "ff").mkdir(exist_ok=True)
    (tmp_path / "ff" / "something").write_bytes(bytes(20_000))
    again = FolderBackend(tmp_path, 50_000)
    assert again.used_bytes() == total(tmp_path)
    for n in range(10):
        put(again, Prompt.of([100 + n]), 2000)
        assert total(tmp_path) <= 50_000


WRITER = """
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from llama_state.store.places.folder import FolderBackend
from llama_state.store.prompt import Media, Prompt
from tests.store.objects import chain, packed
folder, seed, rounds, capacity = Path(sys.argv[1]), *map(int, sys.argv[2:])
random = Random(seed)
backend = FolderBackend(folder, capacity)
print("ready", flush=True)
for _ in range(rounds):
    prompt = Prompt.of([random.randrange(3) for _ in range(random.randrange(1, 20))])
    for name, words, end in chain(prompt):
        backend.put(name, packed(name, words, end, bytes(name.key[:1]) * 3000))
        if not backend.has(name):
            break
"""


@contextmanager
def writer(folder: Path, seed: int, rounds: int, capacity: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes to a folder."""
    arguments = [sys.executable, "-c", WRITER, str(folder), *map(str, (seed, rounds, capacity))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        yield started


def assert_sound(folder: Path) -> None:
    """Every object of a folder is whole, and nothing that was begun is left once it is opened."""
    backend = FolderBackend(folder, 1 << 30)
    for stored in backend.entries():
        with backend.open(stored.name, stored.nbytes) as view:
            payload(view, parse(view, SEAL, keyed=False), SEAL)
    assert not list(folder.rglob(".*.part"))


def test_two_processes(tmp_path: Path) -> None:
    """Two processes that write to one folder at its capacity: it holds, and all is sound."""
    capacity = 100_000
    most = 0
    with writer(tmp_path, 1, 150, capacity) as one, writer(tmp_path, 2, 150, capacity) as two:
        while one.poll() is None or two.poll() is None:
            most = max(most, _held(tmp_path))
        assert one.wait() == two.wait() == 0
    assert 0 < most <= capacity
    assert total(tmp_path) <= capacity
    assert_sound(tmp_path)


def _held(folder: Path) -> int:
    """The bytes of all files while nobody makes room: of each file once, whatever its name is."""
    sizes = {}
    with (folder / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                info = path.stat()
                sizes[info.st_ino] = info.st_size * path.is_file()
    return sum(sizes.values())


def test_killed(tmp_path: Path) -> None:
    """A process that is killed while it writes leaves a folder that opens, and is sound."""
    random = Random(0)
    for seed in range(15):
        with writer(tmp_path, seed, 10_000, 100_000) as killed:
            time.sleep(random.random() / 20)
            os.kill(killed.pid, signal.SIGKILL)
        assert_sound(tmp_path)
        assert total(tmp_path) <= 100_000


def test_names_of_no_object(tmp_path: Path) -> None:
    """Files that are no objects are no objects."""
    backend = FolderBackend(tmp_path, 1 << 20)
    put(backend, Prompt.of([1]))
    own = next(tmp_path.glob("??/*.R")).name
    for name in (
        *("x.R", "a-b-1.R", f"{'0' * 64}-{'g' * 64}-1.R", f"{'0' * 64}-{'1' * 64}-x.R"),
        *(own.upper(), own.replace("-1.R", "-01.R"), own.replace("-1.R", "-\u0661.R")),
    ):
        (tmp_path / ROOT.hex()[:2] / name).write_bytes(b"x")
    (tmp_path / "zz").mkdir()
    (tmp_path / "zz" / own).write_bytes(b"x")
    assert len(list(backend.entries())) == 1
    assert not backend.children(NO_PARENT)
    assert isinstance(backend.children(ROOT)[0], Name)


def test_media_of_one_position_each() -> None:
    """A chunk is found whose tokens have many more words than positions."""
    prompt = Prompt.of([Media(bytes([n]) * 16, 1) for n in range(200)])
    backend = MemoryBackend(1 << 20)
    ((name, words, end),) = chain(prompt, size=200)
    backend.put(name, packed(name, words, end, b"x"))
    assert hit(backend, Prompt.of([*prompt.tokens, 1])) == 200


def test_a_file_that_says_that_it_is_huge(tmp_path: Path) -> None:
    """No more is read than an object has; nothing waits for a pipe."""
    backend = FolderBackend(tmp_path, 1 << 20)
    prompt = Prompt.of(range(8))
    put(backend, prompt)
    lookup = Lookup(backend, TRUST)
    reader = Reader(backend, lookup)
    first, second = (backend._path(name) for name, _, _ in chain(prompt))
    os.truncate(first, 1 << 42)
    second.unlink()
    os.mkfifo(second)
    for name, _, _ in chain(prompt):
        with pytest.raises(DamagedError, match="damaged"):
            reader.read(name)
        backend.set_aside(name)
    backend.evict(0)
    assert total(tmp_path) == 8


def test_nowhere_to_set_aside(tmp_path: Path) -> None:
    """Where something has the folder's name, a damaged object is removed; folders stay."""
    backend = FolderBackend(tmp_path, 1 << 20)
    prompt = Prompt.of(range(8))
    put(backend, prompt)
    (tmp_path / "damaged").write_bytes(b"no folder")
    one, two = (name for name, _, _ in chain(prompt))
    backend._path(two).unlink()
    backend._path(two).mkdir()
    backend.set_aside(one)
    backend.set_aside(two)
    assert not backend.has(one)
    assert not backend.has(two)
    assert [path.is_dir() for path in tmp_path.glob("??/*.R.damaged")] == [True]
    backend.evict(0)


def test_folders_in_it_count(tmp_path: Path) -> None:
    """However deep a file lies, it takes of the capacity."""
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(bytes(15_000))
    backend = FolderBackend(tmp_path, 20_000)
    put(backend, Prompt.of(range(8)), 2000)
    assert total(tmp_path) <= 20_000
