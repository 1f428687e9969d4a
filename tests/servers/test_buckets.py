"""A bucket passes the tests that every back end must pass, on a real server of S3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from random import Random
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

import pytest

from llama_state.errors import TruncatedError
from llama_state.store.advice import advise
from llama_state.store.objects import NO_PARENT
from llama_state.store.places.backend import Backend
from llama_state.store.places.buckets import PART, BucketEngine, _path, open_engine
from llama_state.store.places.remote import RemoteBackend
from llama_state.store.places.urls import open_place
from llama_state.testing.stores import BackendTests, key, name, payload
from tests.servers.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("credentials")

_NUMBERS = count()


@pytest.fixture
def url(bucket: S3Server) -> str:
    """A prefix with nothing in it."""
    return f"s3://kept/some/where-{next(_NUMBERS)}?endpoint={bucket.endpoint}&deadline=2"


@pytest.fixture
def backend(url: str) -> Backend:
    return opened(url)


def opened(url: str) -> RemoteBackend:
    """The place at a URL, without the guard that a store gives it: each call is made."""
    parts = urlsplit(url)
    return RemoteBackend(open_engine(parts, dict(parse_qsl(parts.query))), 1 << 40)


class TestBucket(BackendTests):
    """In a bucket of S3."""

    sizes: ClassVar = (*BackendTests.sizes, PART, PART + 1, 2 * PART + 3)
    knows_use = False

    @pytest.fixture(autouse=True)
    def _on(self, bucket: S3Server) -> None:
        self._server = bucket

    @contextmanager
    def unreachable(self, backend: Backend) -> Iterator[None]:
        self._server.pause()
        try:
            yield
        finally:
            self._server.resume()


def test_many_parts(backend: Backend) -> None:
    """Buffers of any cut come back in their order, in parts of any cut."""
    random = Random(1)
    data = payload("many", 3 * PART + 17)
    cuts = sorted(random.randrange(len(data)) for _ in range(40))
    views = [
        memoryview(data)[start:end]
        for start, end in zip((0, *cuts), (*cuts, len(data)), strict=True)
    ]
    assert backend.put(name("a"), views)
    tag = backend.engine._store.head(_path(name("a")))["e_tag"]  # type: ignore[attr-defined]
    assert tag.endswith('-4"'), "not an upload of four parts"
    with backend.open(name("a"), len(data)) as view:
        assert view == data
    for wrong in (1, PART, PART + 1, len(data) - 1, len(data) + 1, len(data) + PART):
        with pytest.raises(TruncatedError), backend.open(name("a"), wrong):
            pass


def test_another_process(backend: Backend, url: str) -> None:
    """What one wrote another one finds, and so it does after this one has forgotten."""
    backend.put(name("b", "a"), [b"written"])
    other = opened(url)
    assert list(other.children(key("a"))) == [name("b", "a")]
    assert other.head(name("b", "a"), 3) == b"wri"
    assert not other.put(name("b", "a"), [b"other"])


def test_requests(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is expected is asked for once: a listing for each parent, a request for each head."""
    assert isinstance(backend, RemoteBackend)
    engine = backend.engine
    assert isinstance(engine, BucketEngine)
    names = [name(f"{parent}{n}", parent) for parent in "ab" for n in range(3)]
    for each in names:
        backend.put(each, [b"x" * 5000])
    asked: list[str] = []
    real = engine._call

    def counted(act: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(act.__name__)
        return real(act, *arguments, **options)

    monkeypatch.setattr(engine, "_call", counted)
    backend.expect([key("a"), key("b")])
    assert sorted(asked) == ["get_range"] * 6 + ["list"] * 2
    asked.clear()
    assert {*backend.children(key("a")), *backend.children(key("b"))} == set(names)
    assert [backend.head(each, 4096) for each in names] == [b"x" * 4096] * 6
    assert asked == []


def test_many_children(backend: Backend) -> None:
    """More than one answer to a listing has."""
    engine = backend.engine  # type: ignore[attr-defined]
    names = {name(str(n)) for n in range(1100)}
    for each in names:
        engine.write(each, [memoryview(b"x")])
    assert set(backend.children(NO_PARENT)) == names
    engine.delete([*names, name("gone")])
    assert not list(backend.entries())


def test_pins_are_replaced(backend: Backend, bucket: S3Server, url: str) -> None:
    """A pin has one end, the last that was said, also for others; and it goes with its pin."""
    pin = name("b", "a", "P")
    backend.touch([pin], 5e9)
    assert not list(backend.entries())  # there was none
    backend.put(name("b", "a"), [b"x"])
    backend.put(pin, [b"pin"])
    for end in (3e9, 4e9, 4e9, 2e9):
        backend.touch([name("b", "a"), pin], end)
        found = {stored.name: stored.used for stored in opened(url).entries()}
        assert found[pin] == end
        assert set(backend.children(key("a"))) == {name("b", "a"), pin}
    # Two ends, where a process was killed between writing one and removing the other.
    path = _path(pin)
    for end in (9_000_000_000_000, 10_000_000_000_000):
        backend.engine._store.put(f"{path}.{end}", b"")  # type: ignore[attr-defined]
    assert {stored.used for stored in backend.entries() if stored.name == pin} == {1e10}
    backend.remove(pin)
    assert [stored.name for stored in backend.entries()] == [name("b", "a")]
    backend.put(pin, [b"pin"])
    assert all(stored.used < 2e9 for stored in backend.entries()), "the end of the old one"


def test_foreign_objects(bucket: S3Server, url: str) -> None:
    """What others keep in the bucket is not seen, and stays, whatever we do."""
    place = opened(url)
    prefix = url.removeprefix("s3://kept").split("?")[0]
    stem = f"/{key('a').hex()}/{key('b').hex()}-4"
    foreign = {
        "/notes.txt",
        f"/{key('a').hex()}/readme",
        f"{stem}.R.bak",
        f"{stem}.P.soon",
        f"{stem}.Z",
        f"{stem}.R/deeper",
        f"/other{stem}.R",
        f"{stem.upper()}.R",
        f"/{key('a').hex()}-{key('b').hex()}-4.R",
    }
    for path in foreign:
        bucket.request("PUT", f"/kept{prefix}{path}", b"foreign")
    beside = f"/kept{prefix}-2{stem}.R"
    bucket.request("PUT", beside, b"foreign")
    place.put(name("b", "a"), [b"ours"])
    place.put(name("b", "a", "P"), [b"pin"])
    place.touch([name("b", "a", "P")], 1.0)
    ours = {name("b", "a"), name("b", "a", "P")}
    assert {stored.name for stored in place.entries()} == ours
    assert set(place.children(key("a"))) == ours
    assert place.used_bytes() == 7
    place.evict(0)
    place.remove(name("c", "a"))
    place.set_aside(name("d", "a", "P"))
    assert not list(place.entries())
    for path in foreign:
        assert bucket.request("GET", f"/kept{prefix}{path}") == b"foreign"
    assert bucket.request("GET", beside) == b"foreign"
    left = bucket.request("GET", f"/kept?list-type=2&prefix={prefix[1:]}/").decode()
    assert left.count("<Key>") == len(foreign)


def test_advice(bucket: S3Server, url: str) -> None:
    """What can be told of a bucket; a missing one is an error, which says what to do."""
    found = [*advise(open_place(url, None, durable=False, readonly=False), has_key=True)]
    assert {each.level for each in found} == {"ok"}
    texts = " ".join(each.text for each in found)
    for what in ("can be listed", "lifecycle rule", "was written, read and removed"):
        assert what in texts
    prefix = url.removeprefix("s3://kept/").split("?")[0]
    assert "<Key>" not in bucket.request("GET", f"/kept?list-type=2&prefix={prefix}/").decode()
    (only,) = advise(opened(f"s3://missing?endpoint={bucket.endpoint}"), has_key=True)
    assert only.level == "error"
    assert "the bucket does not exist" in only.text


def test_read_only(backend: RemoteBackend, url: str) -> None:
    """A place that is only read writes nothing, not even the end of a pin."""
    pin = name("a", kind="P")
    backend.put(pin, [b"pin"])
    backend.touch([pin], 3e9)
    place = opened(url)
    reader = RemoteBackend(place.engine, 1 << 40, readonly=True)
    place.engine.touch([pin], 4e9)
    assert not reader.put(name("b"), [b"x"])
    assert not reader.remove(pin)
    assert [(each.name, each.used) for each in reader.entries()] == [(pin, 3e9)]
