"""The tests that every back end of a prefix store must pass: derive from them.

.. code-block:: python

    class TestMine(BackendTests):
        @pytest.fixture
        def backend(self) -> Iterator[Backend]:
            yield MyBackend(...)  # with nothing in it

        @contextmanager
        def unreachable(self, backend: Backend) -> Iterator[None]:
            stop_my_server()
            yield
            start_my_server()
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

from ..errors import TruncatedError
from ..store.lookup import DAMAGE
from ..store.objects import NO_PARENT, Kind, Name
from ..store.places.backend import Backend, Stored, name_of, text_of


def key(text: str) -> bytes:
    """Return a key, the same for the same text."""
    return hashlib.sha256(text.encode()).digest()


def name(text: str, parent: str | None = None, kind: Kind = "R") -> Name:
    """Return the name of an object of four positions."""
    return Name(NO_PARENT if parent is None else key(parent), key(text), 4, kind)


def payload(text: str, nbytes: int) -> bytes:
    """Return bytes that are others for each text."""
    return hashlib.shake_128(text.encode()).digest(nbytes)


class BackendTests:
    """What a store relies on. The fixture ``backend`` is a place with nothing in it.

    Attributes:
        sizes: Bytes of the objects that are tried; add those at which a place changes its ways.
        knows_use: Whether the place notes when objects were used.
        added_bytes: Bytes that the place adds to an object of a few thousand.
    """

    sizes: ClassVar[Sequence[int]] = (0, 1, 4095, 4096, 4097, 1 << 20, (5 << 20) + 3)
    knows_use: ClassVar[bool] = True
    added_bytes: ClassVar[int] = 0

    def unreachable(self, backend: Backend) -> AbstractContextManager[None] | None:
        """Make the place fail for the length of a block; None where that cannot be done."""
        return None

    def test_is_empty(self, backend: Backend) -> None:
        """Nothing is there, and that is no error."""
        assert list(backend.entries()) == []
        assert backend.children(key("a")) == []
        assert not backend.has(name("a"))
        assert backend.remove(name("a")) == 0
        backend.set_aside(name("a"))
        backend.touch([name("a")])
        backend.expect([key("a"), key("b")])
        assert backend.children(key("a")) == []

    def test_is_gone(self, backend: Backend) -> None:
        """What is not there is FileNotFoundError, by whatever it is read."""
        for read in (self._head, self._open):
            assert isinstance(_error(lambda read=read: read(backend)), FileNotFoundError)  # type: ignore[misc]

    def _head(self, backend: Backend) -> bytes:
        return backend.head(name("none"), 10)

    def _open(self, backend: Backend) -> bytes:
        with backend.open(name("none"), 10) as view:
            return bytes(view)

    def test_round_trips(self, backend: Backend) -> None:
        """Every size comes back as it was, whole and its beginning."""
        for size in self.sizes:
            each, data = name(f"of {size}"), payload(str(size), size)
            assert backend.put(each, [data[: size // 3], memoryview(data)[size // 3 :]])
            assert backend.has(each)
            with backend.open(each, size) as view:
                assert bytes(view) == data
            for n in (1, 100, 4096, size, size + 1):
                assert backend.head(each, n) == data[:n]

    def test_lengths(self, backend: Backend) -> None:
        """Another length than was asked for is TruncatedError, before anything is used."""
        each = name("a")
        backend.put(each, [bytes(5000)])
        for wrong in (1, 4999, 5001, 1 << 24):
            assert isinstance(_error(lambda n=wrong: _opened(backend, each, n)), TruncatedError)  # type: ignore[misc]

    def test_first_one_stays(self, backend: Backend) -> None:
        """A second object of a name is not written."""
        assert backend.put(name("a"), [b"first"])
        assert not backend.put(name("a"), [b"other"])
        assert _opened(backend, name("a"), 5) == b"first"

    def test_buffers_are_free(self, backend: Backend) -> None:
        """What was given to put can be written over at once."""
        buffer = bytearray(payload("a", 5 << 20))
        whole = bytes(buffer)
        assert backend.put(name("a"), [memoryview(buffer)])
        buffer[:] = bytes(len(buffer))
        assert _opened(backend, name("a"), len(whole)) == whole

    def test_children(self, backend: Backend) -> None:
        """What goes on from a prefix is found, and nothing else."""
        kinds: tuple[Kind, ...] = ("R", "W", "S", "L")
        expected = {name("b", "a", kind) for kind in kinds} | {name("c", "a")}
        for each in [name("a"), *expected, name("d", "b")]:
            backend.put(each, [b"x"])
        for asked in ((), (key("a"), key("b"), key("none"))):
            if asked:
                backend.expect(asked)
            assert set(backend.children(key("a"))) == expected
            assert set(backend.children(key("b"))) == {name("d", "b")}
            assert list(backend.children(key("none"))) == []
            assert set(backend.children(NO_PARENT)) == {name("a")}

    def test_expected_is_true(self, backend: Backend) -> None:
        """What this process writes or removes is seen at once, also after it was listed."""
        backend.put(name("b", "a"), [b"x"])
        backend.expect([key("a")])
        backend.put(name("c", "a"), [b"y"])
        assert set(backend.children(key("a"))) == {name("b", "a"), name("c", "a")}
        backend.expect([key("a")])
        backend.remove(name("b", "a"))
        assert set(backend.children(key("a"))) == {name("c", "a")}
        assert not backend.has(name("b", "a"))
        assert isinstance(_error(lambda: backend.head(name("b", "a"), 1)), FileNotFoundError)

    def test_entries(self, backend: Backend) -> None:
        """All that is there, with its bytes and the time."""
        before = time.time()
        sizes = {name(str(n), None if n % 2 else "0"): n for n in range(40)}
        for each, size in sizes.items():
            backend.put(each, [bytes(size)])
        found = list(backend.entries())
        assert {each.name: each.nbytes - self.added_bytes for each in found} == sizes
        assert len(found) == len(sizes)
        assert all(before - 2 <= stored.used <= time.time() + 2 for stored in found)
        assert backend.used_bytes() >= sum(sizes.values())

    def test_remove(self, backend: Backend) -> None:
        """What is removed is gone, and can be written anew."""
        backend.put(name("a"), [b"first"])
        assert backend.remove(name("a")) == 5 + self.added_bytes
        assert not backend.has(name("a"))
        assert list(backend.entries()) == []
        assert backend.put(name("a"), [b"other"])
        assert _opened(backend, name("a"), 5) == b"other"

    def test_set_aside(self, backend: Backend) -> None:
        """What was damaged is out of the way."""
        backend.put(name("a"), [b"wrong"])
        backend.set_aside(name("a"))
        assert not backend.has(name("a"))
        assert backend.put(name("a"), [b"right"])
        assert _opened(backend, name("a"), 5) == b"right"

    def test_evicts_ends_first(self, backend: Backend) -> None:
        """What others go on from is let go of last, whatever the times."""
        chain = [name(str(n), str(n - 1) if n else None) for n in range(5)]
        for each in chain:
            backend.put(each, [bytes(1000)])
        kept = backend.used_bytes() - 2500
        assert backend.evict(kept) == 3 * (1000 + self.added_bytes)
        assert {stored.name for stored in backend.entries()} == set(chain[:2])
        backend.evict(0)
        assert list(backend.entries()) == []

    def test_times(self, backend: Backend) -> None:
        """What was used is noted, and what was used last stays."""
        if not self.knows_use:
            return
        names = [name(str(n)) for n in range(3)]
        for n, each in enumerate(names):
            backend.put(each, [bytes(1000)])
            backend.touch([each], 1000.0 * (n + 1))
        assert {s.name: s.used for s in backend.entries()} == dict(
            zip(names, (1000.0, 2000.0, 3000.0), strict=True)
        )
        backend.touch([names[0], name("gone")])
        backend.evict(backend.used_bytes() - 2000)
        assert [stored.name for stored in backend.entries()] == [names[0]]

    def test_pins(self, backend: Backend) -> None:
        """A pin ends when it says, and keeps what it is beside."""
        pinned, other = name("a"), name("b")
        for each in (pinned, other):
            backend.put(each, [bytes(1000)])
        pin, until = name("a", kind="P"), time.time() + 1000
        backend.put(pin, [b"pin"])
        backend.touch([pin], until)
        found = {stored.name: stored.used for stored in backend.entries()}
        assert abs(found[pin] - until) < 1
        backend.evict(0)
        assert {stored.name for stored in backend.entries()} == {pinned, pin}
        backend.touch([pin], time.time() - 1)
        backend.evict(0)
        assert list(backend.entries()) == []

    def test_many_at_once(self, backend: Backend) -> None:
        """Threads that write, read and remove the same names see whole objects or none."""
        wrong: list[BaseException] = []
        threads = [
            threading.Thread(target=self._some, args=(backend, n, wrong), daemon=True)
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a thread hangs"
        if wrong:
            raise wrong[0]

    def _some(self, backend: Backend, n: int, wrong: list[BaseException]) -> None:
        try:
            for step in range(25):
                self._one(backend, n, step)
        except BaseException as error:
            wrong.append(error)

    def _one(self, backend: Backend, n: int, step: int) -> None:
        each, size = name(str((step + n) % 5)), 100_000
        backend.put(each, [payload(each.key.hex(), size)])
        try:
            found = _opened(backend, each, size)
        except FileNotFoundError:
            return
        assert found == payload(each.key.hex(), size), "another object, or a part of one"
        if step % 7 == n:
            backend.remove(each)

    def test_names(self) -> None:
        """Names are the same after they were text."""
        for each in (name("a"), name("b", "a", "S")):
            assert name_of(text_of(each)) == each
        for text in ("", "a.R", text_of(name("a")).upper(), text_of(name("a")) + "R"):
            assert name_of(text) is None

    def test_unreachable(self, backend: Backend) -> None:
        """What fails is an OSError in good time, and no loss: afterwards all is there again."""
        failing = self.unreachable(backend)
        if failing is None:
            return
        backend.put(name("a"), [b"there"])
        calls: dict[str, Callable[[], object]] = {
            "children": lambda: backend.children(NO_PARENT),
            "has": lambda: backend.has(name("a")),
            "head": lambda: backend.head(name("a"), 5),
            "open": lambda: _opened(backend, name("a"), 5),
            "put": lambda: backend.put(name("b"), [b"new"]),
            "entries": lambda: list(backend.entries()),
            "expect": lambda: backend.expect([key("other")]),
        }
        with failing:
            for what, call in calls.items():
                self._fails(what, call)
        assert _opened(backend, name("a"), 5) == b"there"
        assert {stored.name for stored in backend.entries()} >= {name("a")}

    def _fails(self, what: str, call: Callable[[], object]) -> None:
        began = time.monotonic()
        error = _error(call)
        assert isinstance(error, OSError), f"{what}: {error!r}"
        assert not isinstance(error, FileNotFoundError), what
        assert error.errno not in DAMAGE, f"{what}: a sound object would be removed"
        assert time.monotonic() - began < 30, what


def _opened(backend: Backend, each: Name, nbytes: int) -> bytes:
    with backend.open(each, nbytes) as view:
        return bytes(view)


def _error(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


__all__ = ["BackendTests", "Stored", "key", "name", "payload"]
