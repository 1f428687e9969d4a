"""Several places as one: nearest first, and no place keeps the others from what they can do."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_state.store import tiers
from llama_state.store.lookup import DamagedError, Lookup
from llama_state.store.objects import Name, parse
from llama_state.store.places.backend import Backend, Stored
from llama_state.store.places.folder import FolderBackend
from llama_state.store.places.memory import MemoryBackend
from llama_state.store.places.urls import open_places
from llama_state.store.prompt import Prompt
from llama_state.store.reading import Reader, Wanted
from llama_state.store.tiers import Tiers
from llama_state.store.troubles import Troubles
from llama_state.store.upkeep import Tree

from .objects import ROOT, SEAL, TRUST, as_one, chain, described, other, packed

CHAIN = chain(Prompt.of(range(20)))
NAMES = [name for name, _, _ in CHAIN]
LARGE = 1 << 24


def made(number: int, payload: bytes = bytes(100)) -> tuple[Name, list[bytes]]:
    """An object of the chain."""
    name, words, end = CHAIN[number]
    return name, packed(name, words, end, payload)


SIZE = sum(map(len, made(0)[1]))


def put_all(place: Backend, payload: bytes = bytes(100)) -> list[bool]:
    """Write the description of the namespace, and the chain."""
    objects = [described(), *(made(number, payload) for number in range(len(CHAIN)))]
    return [place.put(*each) for each in objects]


def kinds(tmp_path: Path) -> dict[str, Callable[[str], Backend]]:
    """Ways to make a place."""
    return {
        "memory": lambda name: MemoryBackend(LARGE, f"memory:{name}"),
        "folder": lambda name: FolderBackend(tmp_path / name, LARGE),
    }


@pytest.fixture(params=["memory, folder", "folder, folder", "folder, memory"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> list[Backend]:
    """Two places."""
    near, far = str(request.param).split(", ")
    return [kinds(tmp_path)[near]("near"), kinds(tmp_path)[far]("far")]


def damage(place: Backend, name: Name, at: int = -1) -> None:
    """Change a byte of an object."""
    if isinstance(place, MemoryBackend):
        data = bytearray(place._objects[name])
        data[at] ^= 1
        place._objects[name] = bytes(data)
    else:
        assert isinstance(place, FolderBackend)
        path = place._path(name)
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)


def is_sound(place: Backend, name: Name) -> bool:
    """Whether an object is there, and sound."""
    reader = Reader(place, Lookup(place, TRUST))
    return place.has(name) and reader.is_sound(name)


def read(reader: Reader, backend: Tiers, name: Name, attempts: int = 3) -> bytes | None:
    """Read an object as a recall does: what is damaged is set aside; None where it is gone."""
    for _ in range(attempts):
        try:
            return reader.read(name)
        except DamagedError as error:
            if error.gone:
                return None
            backend.set_aside(name)
    return None


def reader_of(backend: Backend) -> Reader:
    """What reads it."""
    return Reader(backend, Lookup(backend, TRUST))


class Failing:
    """A place whose every operation fails."""

    location = "failing:"
    capacity_bytes = 1
    readonly = False
    remote = False

    def _fail(self, *_: object) -> Any:
        raise OSError(errno.EIO, "broken")

    def expect(self, parents: Sequence[bytes]) -> None:
        """Fail."""
        self._fail(parents)

    def children(self, parent: bytes) -> Sequence[Name]:
        """Fail."""
        return self._fail(parent)  # type: ignore[no-any-return]

    def has(self, name: Name) -> bool:
        """Fail."""
        return self._fail(name)  # type: ignore[no-any-return]

    def head(self, name: Name, nbytes: int) -> bytes:
        """Fail."""
        return self._fail(name, nbytes)  # type: ignore[no-any-return]

    def open(self, name: Name, nbytes: int) -> AbstractContextManager[memoryview]:
        """Fail."""
        return self._fail(name, nbytes)  # type: ignore[no-any-return]

    def put(self, name: Name, parts: Iterable[Any]) -> bool:
        """Fail."""
        return self._fail(name, parts)  # type: ignore[no-any-return]

    def touch(self, names: Iterable[Name], when: float | None = None) -> None:
        """Fail."""
        self._fail(names, when)

    def remove(self, name: Name) -> int:
        """Fail."""
        return self._fail(name)  # type: ignore[no-any-return]

    def set_aside(self, name: Name) -> None:
        """Fail."""
        self._fail(name)

    def entries(self) -> Iterator[Stored]:
        """Fail."""
        return self._fail()  # type: ignore[no-any-return]

    def evict(self, to_bytes: int) -> int:
        """Fail."""
        return self._fail(to_bytes)  # type: ignore[no-any-return]

    def used_bytes(self) -> int:
        """Fail."""
        return self._fail()  # type: ignore[no-any-return]


OPERATIONS: dict[str, Callable[[Tiers], object]] = {
    "children": lambda t: list(t.children(ROOT)),
    "has": lambda t: t.has(NAMES[0]),
    "lacks": lambda t: t.lacks(NAMES[0]),
    "head": lambda t: t.head(NAMES[0], 10_000),
    "open": lambda t: _opened(t, NAMES[0]),
    "put": lambda t: t.put(*made(1)),
    "touch": lambda t: t.touch([NAMES[0]], 1000.0),
    "entries": lambda t: sorted(each.name for each in t.entries()),
    "used": lambda t: t.used_bytes(),
    "set aside": lambda t: t.set_aside(NAMES[0]),
    "remove": lambda t: t.remove(NAMES[1]),
    "evict": lambda t: t.evict(0),
}


def _opened(place: Tiers, name: Name) -> bytes:
    with place.open(name, SIZE) as view:
        return bytes(view)


def test_written_to_all(places: list[Backend]) -> None:
    """All places have what is written; together they are one."""
    both = as_one(places)
    assert put_all(both) == [True] * 6
    assert put_all(both) == [False] * 6
    for place in places:
        assert {each.name for each in place.entries()} == {described()[0], *NAMES}
    assert list(both.children(ROOT)) == [NAMES[0]]
    assert both.capacity_bytes == 2 * LARGE
    assert both.used_bytes() == sum(place.used_bytes() for place in places)
    places[0].touch(NAMES[:1], 5000.0)
    places[1].touch(NAMES[:2], 4000.0)
    used = {each.name: each.used for each in both.entries()}
    assert (used[NAMES[0]], len(used)) == (5000.0, 6)
    assert both.remove(NAMES[4]) == 2 * SIZE
    assert not any(place.has(NAMES[4]) for place in places)
    assert both.evict(2 * SIZE + 100) > 0
    assert all(0 < place.used_bytes() <= 2 * SIZE + 100 for place in places)


def test_a_chain_in_two_places(places: list[Backend]) -> None:
    """The beginning in one, the end in the other: one chain."""
    for place, numbers in zip(places, ((0, 1), (2, 3, 4)), strict=True):
        for number in numbers:
            place.put(*made(number))
    both = as_one(places)
    prompt = Prompt.of(range(20))
    found = Lookup(both, TRUST).walk(ROOT, prompt)
    assert [link.key for link in found.links] == [name.key for name in NAMES]


@pytest.mark.parametrize("at", [-1, 60])
@pytest.mark.parametrize("which", [0, 1])
def test_damaged(places: list[Backend], which: int, at: int) -> None:
    """A damaged copy, payload or header, does not hide the sound one, and alone goes."""
    both = as_one(places)
    put_all(both)
    for name in NAMES:
        damage(places[which], name, at)
    reader = reader_of(both)
    assert [read(reader, both, name) for name in NAMES] == [bytes(100)] * 5
    assert all(is_sound(places[1 - which], name) for name in NAMES)
    for name in NAMES:
        both.set_aside(name)  # once more: what is sound stays
    assert not any(places[which].has(name) for name in NAMES)
    assert [read(reader, both, name) for name in NAMES] == [bytes(100)] * 5


def test_damaged_in_all(places: list[Backend]) -> None:
    """What is sound in no place is gone from all."""
    both = as_one(places)
    put_all(both)
    for place in places:
        damage(place, NAMES[2])
    assert read(reader_of(both), both, NAMES[2]) is None
    assert not both.has(NAMES[2])
    assert both.put(*made(2))


def test_damaged_and_readonly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be taken out of the way is passed over, for a while."""
    put_all(FolderBackend(tmp_path / "near", LARGE))
    put_all(FolderBackend(tmp_path / "far", LARGE))
    near = FolderBackend(tmp_path / "near", 0, readonly=True)
    damage(near, NAMES[2])
    for places in ([near, FolderBackend(tmp_path / "far", 0, readonly=True)], [near]):
        both = as_one(places, readonly=True)
        sound = bytes(100) if len(places) > 1 else None
        assert read(reader_of(both), both, NAMES[2]) == sound
        assert both.has(NAMES[2]) == (sound is not None)
        assert (NAMES[2] in both.children(NAMES[1].key)) == (sound is not None)
        assert (NAMES[2] in {each.name for each in both.entries()}) == (sound is not None)
        assert near.has(NAMES[2])
    damage(near, NAMES[2])  # somebody has mended it
    assert not both.has(NAMES[2])
    later = tiers.time.monotonic() + 61
    monkeypatch.setattr(tiers.time, "monotonic", lambda: later)
    assert both.has(NAMES[2])


def test_other_bytes(places: list[Backend]) -> None:
    """Copies of two runs differ; each is read as what it is, and none is taken for damaged."""
    put_all(places[0], b"near" * 30)
    put_all(places[1], b"far!" * 30)
    both = as_one(places)
    reader = reader_of(both)
    every = [Wanted(name, "R", 4 * n, 4 * n + 4, whole=True) for n, name in enumerate(NAMES)]
    reader.check(every, set())
    assert [reader.read(name) for name in NAMES] == [b"near" * 30] * 5
    places[0].evict(0)
    reader.check(every, set())  # under the headers that were read of the near ones
    assert [reader.read(name) for name in NAMES] == [b"far!" * 30] * 5


def test_near_full(tmp_path: Path) -> None:
    """What a place has no room for is in the others, and counted as its own."""
    near, far = MemoryBackend(3 * SIZE), FolderBackend(tmp_path, LARGE)
    both = as_one([near, far])
    assert put_all(both, bytes(5000)) == [True] * 6
    assert len(list(far.entries())) == 6
    assert both.tiers[0].refused > 0 == both.tiers[1].refused
    assert not any(map(both.lacks, NAMES))


def test_what_is_written(tmp_path: Path) -> None:
    """The furthest place that has room decides what it lacks."""
    near, far = MemoryBackend(LARGE), FolderBackend(tmp_path, LARGE)
    both = as_one([near, far])
    name = NAMES[0]
    assert both.lacks(name)
    near.put(*made(0))
    assert both.has(name)
    assert both.lacks(name)  # as after a failure of the far one
    both.put(*made(0))
    assert not both.lacks(name)
    near.evict(0)
    assert not both.lacks(name)
    for behind in (Failing(), MemoryBackend(10, "memory:small")):
        both = as_one([near, behind])
        near.evict(0)
        assert both.lacks(name)
        both.put(*made(0))
        assert not both.lacks(name)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_failing(operation: str, failing: int, caplog: pytest.LogCaptureFixture) -> None:
    """A place that fails does not keep the other from it; it is counted, and logged once."""
    alone, beside = MemoryBackend(LARGE), MemoryBackend(LARGE)
    expected = as_one([alone])
    places: list[Backend] = [beside, beside]
    places[failing] = Failing()
    troubles = Troubles("tests")
    both = as_one(places, troubles)
    for place in (alone, beside):
        place.put(*made(0))
    with caplog.at_level(logging.WARNING, "llama_state.store"):
        for _ in range(2):
            assert OPERATIONS[operation](both) == OPERATIONS[operation](expected)
    assert {s.name for s in alone.entries()} == {s.name for s in beside.entries()}
    # The first one that is asked is enough: the nearest, or the furthest.
    spared = operation in ("has", "head", "open") if failing == 1 else operation == "lacks"
    assert bool(troubles.failures) != spared
    assert len(caplog.messages) == len(troubles.failures)
    assert all("failing:" in message for message in caplog.messages)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("n", [1, 2])
def test_all_failing(operation: str, n: int) -> None:
    """Where no place can, it is the error of one."""
    with pytest.raises(OSError, match=r"broken|no such object"):
        OPERATIONS[operation](as_one([Failing()] * n))


def test_kept_nearer(tmp_path: Path) -> None:
    """What was read from further away is copied to all nearer places, once it is told to."""
    places: list[Backend] = [
        MemoryBackend(LARGE),
        FolderBackend(tmp_path / "near", LARGE),
        FolderBackend(tmp_path / "far", LARGE),
    ]
    put_all(places[2])
    every = as_one(places)
    reader = reader_of(every)
    for name in NAMES:
        reader.read(name)
    assert not places[0].has(NAMES[0])
    assert every.take_far([*NAMES, described()[0]]) == NAMES
    assert every.take_far(NAMES) == []
    every.keep_nearer([described()[0], *NAMES])
    for place in places[:2]:
        assert {each.name for each in place.entries()} == {described()[0], *NAMES}
        assert all(is_sound(place, name) for name in NAMES)
    assert [tier.kept for tier in every.tiers] == [6, 6, 0]
    reader.read(NAMES[0])
    assert every.take_far(NAMES) == []


def test_damaged_is_not_kept(places: list[Backend]) -> None:
    """What turned bad since it was read is not copied; what comes after it is."""
    put_all(places[1])
    both = as_one(places)
    damage(places[1], NAMES[1])
    both.keep_nearer(NAMES)
    assert [places[0].has(name) for name in NAMES] == [True, False, True, True, True]


def test_no_room_nearer(tmp_path: Path) -> None:
    """A place that is too small for a chain keeps its beginning, and is asked for no more."""
    near, far = MemoryBackend(5 * SIZE // 2), FolderBackend(tmp_path, LARGE)
    put_all(far)
    both = as_one([near, far])
    both.keep_nearer(NAMES)
    assert [near.has(name) for name in NAMES] == [True, True, False, False, False]
    assert (both.tiers[0].kept, both.tiers[0].refused) == (2, 1)


def test_readonly(tmp_path: Path) -> None:
    """Of a store that writes nothing, memory still keeps what was found in a folder."""
    put_all(FolderBackend(tmp_path, LARGE))
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*")}
    near, far = MemoryBackend(LARGE), FolderBackend(tmp_path, 0, readonly=True)
    both = as_one([near, far], readonly=True)
    assert not both.put(described()[0], [b"x"])
    both.keep_nearer(NAMES)
    both.touch(NAMES)
    assert (both.remove(NAMES[0]), both.evict(0)) == (0, 0)
    assert all(map(near.has, NAMES))
    assert {path: path.stat().st_mtime for path in tmp_path.rglob("*")} == before


def test_verify(places: list[Backend]) -> None:
    """Every copy is read, and what goes on from a copy in any place is of use."""
    both = as_one(places)
    put_all(both)
    places[0].remove(NAMES[1])  # what is behind it goes on from the far copy
    damage(places[1], NAMES[2])
    damage(places[0], NAMES[4])
    damage(places[1], NAMES[4])
    both.put(other(NAMES[4], "P"), [b"pin"])
    for repair in (False, True):
        reader = reader_of(both)
        tree = Tree(both, reader._lookup, reader)
        found = tree.verify(repair=repair)
        assert found.n_objects == 11 + 2
        assert sorted(found.damaged) == sorted(
            f"{name.key.hex()}.R in {place.location}"
            for place, name in (
                (places[1], NAMES[2]),
                (places[0], NAMES[4]),
                (places[1], NAMES[4]),
            )
        )
        assert (found.orphans, found.foreign) == ((f"{NAMES[4].key.hex()}.P",), 0)
    tree = Tree(both, reader._lookup, reader)
    assert tree.verify(repair=False).ok
    assert [entry.n_positions for entry in tree.entries()] == [16]
    with pytest.raises(OSError, match="broken"):
        Tree(as_one([places[0], Failing()]), reader._lookup, reader).verify(repair=False)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "damage", "drop", "read", "keep", "full"]),
            st.integers(0, 4),
            st.integers(0, 1),
        ),
        max_size=40,
    )
)
@settings(deadline=None)
def test_what_is_sound_anywhere_is_found(steps: list[tuple[str, int, int]]) -> None:
    """Whatever happens to the copies: read is what is sound in one place, and nothing else."""
    places = [MemoryBackend(LARGE, "memory:near"), MemoryBackend(LARGE, "memory:far")]
    both = as_one(places)
    reader = reader_of(both)
    for step, number, which in steps:
        name, parts = made(number, bytes([number]) * 100)
        place = places[which]
        if step == "put":
            both.put(name, parts)
        elif step == "damage" and place.has(name):
            damage(place, name)
        elif step == "drop":
            place.remove(name)
        elif step == "keep":
            both.keep_nearer([name])
        elif step == "full":
            place.evict(3 * SIZE)
        else:
            somewhere = any(is_sound(each, name) for each in places)
            assert read(reader, both, name) == (bytes([number]) * 100 if somewhere else None)
            assert all(is_sound(each, name) for each in places if each.has(name)) or somewhere
    for place in places:
        for stored in place.entries():
            assert parse(place.head(stored.name, 1 << 20), SEAL, keyed=False).name == stored.name


def test_named_places(tmp_path: Path) -> None:
    """Each place has its own capacity; what is wrong with a list is said."""
    opened = open_places(
        ["memory:?size=1MiB", f"file://{tmp_path}/a?size=2MiB"],
        None,
        durable=False,
        readonly=False,
    )
    assert [place.backend.capacity_bytes for place in opened] == [1 << 20, 2 << 20]
    one = open_places([tmp_path / "b"], 1 << 20, durable=False, readonly=False)
    assert [place.backend.capacity_bytes for place in one] == [1 << 20]
    for where, capacity, words in (
        ([], None, "empty list"),
        (["memory:?size=1MiB", tmp_path], 1 << 20, "capacity_bytes is for one place"),
        (["memory:?size=1MiB", tmp_path], None, "needs a capacity"),
        ([f"{tmp_path}/a?size=1", f"{tmp_path}"], None, "needs a capacity"),
        ([f"file://{tmp_path}?size=1MiB", f"file://{tmp_path}?size=2MiB"], None, "twice"),
    ):
        with pytest.raises(ValueError, match=words):
            open_places(where, capacity, durable=False, readonly=False)  # type: ignore[arg-type]
