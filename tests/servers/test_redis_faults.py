"""What goes wrong with a Redis server: an OSError that says so, and no wrong byte."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from llama_state.errors import TruncatedError
from llama_state.store.objects import NO_PARENT
from llama_state.store.places.redis import RedisEngine, open_engine
from llama_state.store.places.remote import RemoteBackend
from llama_state.testing.stores import key, name, payload
from tests.servers.ports import free_port
from tests.servers.proxy import Proxy, proxy
from tests.servers.redis_places import DEADLINE, MIB, engine, place, server, shared
from tests.servers.redis_server import RedisServer, cluster, program, running

LARGE = 9 * MIB + 5
__all__ = ["server", "shared"]

SECRET = "not for everybody"  # noqa: S105 - of a server that lives for one test


@pytest.fixture
def between(server: RedisServer) -> Iterator[Proxy]:
    with proxy(server.port) as between:
        yield between


def read(backend: RemoteBackend, text: str, nbytes: int) -> bytes:
    """All of an object."""
    with backend.open(name(text), nbytes) as view:
        return bytes(view)


def error_of(call: Callable[[], object]) -> OSError:
    """The error that a call must raise, in good time."""
    began = time.monotonic()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the tests look at it
        call()
    assert time.monotonic() - began < 3 * DEADLINE
    return caught.value


# -- a server that goes away


@pytest.mark.parametrize("doing", ["put", "open"])
def test_killed_in_the_middle(tmp_path: Path, doing: str) -> None:
    """A server that is killed in the middle of objects, and comes back with nothing in it."""
    with running(tmp_path, program("redis")) as server:
        backend = place(server.port)
        for n in range(3):
            backend.put(name(str(n)), [payload(str(n), LARGE)])
        timer = threading.Timer(0.1, server.kill)
        timer.start()

        def on_and_on() -> None:
            for n in range(100_000):
                if doing == "put":
                    backend.put(name(f"new {n % 50}"), [payload("new", LARGE)])
                else:
                    assert read(backend, str(n % 3), LARGE) == payload(str(n % 3), LARGE)

        assert not isinstance(error_of(on_and_on), FileNotFoundError)
        timer.join()
        assert isinstance(error_of(lambda: backend.has(name("0"))), ConnectionError)
        server.start()
        assert isinstance(error_of(lambda: read(backend, "0", LARGE)), FileNotFoundError)
        assert backend.children(NO_PARENT) == []
        assert backend.put(name("0"), [payload("0", LARGE)])
        assert read(backend, "0", LARGE) == payload("0", LARGE)


def test_cut_in_the_middle(server: RedisServer, between: Proxy) -> None:
    """A connection that is cut in the middle of a value: an error, then the right bytes again."""
    backend = place(between.port)
    for n in range(3):
        backend.put(name(str(n)), [payload(str(n), LARGE)])
    for cut in (1000, MIB, 2 * MIB + 50, 5 * MIB):
        between.limit = cut
        assert isinstance(error_of(lambda: read(place(between.port), "1", LARGE)), ConnectionError)
        between.limit = None
        for n in range(3):
            assert read(backend, str(n), LARGE) == payload(str(n), LARGE)


def test_late_answers(server: RedisServer, between: Proxy) -> None:
    """An answer that comes after its time is not taken for that to the next question."""
    backend = place(between.port, deadline="100ms")
    for n in range(3):
        backend.put(name(str(n)), [payload(str(n), LARGE)])
    for turn in range(6):
        between.delay = 0.25
        late = error_of(lambda turn=turn: read(backend, str(turn % 3), LARGE))  # type: ignore[misc]
        assert isinstance(late, TimeoutError)
        assert isinstance(error_of(lambda: backend.has(name("0"))), TimeoutError)
        between.delay = 0.0
        for n in range(3):
            assert read(backend, str(n), LARGE) == payload(str(n), LARGE)


def test_nobody_listens() -> None:
    """No server at all: said with the address, and what to look at."""
    error = error_of(lambda: place(1).has(name("a")))
    assert isinstance(error, ConnectionError)
    assert "redis://127.0.0.1:1: " in str(error)
    assert "is the server running?" in str(error)


# -- a server that refuses


def test_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong password is PermissionError; no text shows one, right or wrong."""
    with running(tmp_path, program("redis"), "--requirepass", SECRET) as server:

        def opened(password: str | None) -> RedisEngine:
            user = "" if password is None else f":{quote(password)}@"
            return open_engine(urlsplit(f"redis://{user}127.0.0.1:{server.port}"), {})

        for password in (None, "wrong and wrong"):
            error = error_of(lambda p=password: opened(p).listed([key("a")]))  # type: ignore[misc]
            assert isinstance(error, PermissionError), error
            assert "LLAMA_STATE_REDIS_PASSWORD" in str(error)
            assert "wrong and wrong" not in f"{error} {opened(password).location}"
            assert error.__suppress_context__, "what the client raised holds it"
        assert opened(SECRET).listed([key("a")]) == [{}]
        assert SECRET not in opened(SECRET).location
        told = opened(SECRET)._server._as_os_error(RuntimeError(f"it has {SECRET} in it"))
        assert "it has *** in it" in str(told)
        monkeypatch.setenv("LLAMA_STATE_REDIS_PASSWORD", SECRET)
        assert opened(None).listed([key("a")]) == [{}]


def test_full(server: RedisServer) -> None:
    """A server that is full and lets go of nothing: ENOSPC, nothing is left of what was begun."""
    backend = place(server.port)
    backend.put(name("a"), [payload("a", LARGE)])
    server.client.config_set("maxmemory-policy", "noeviction")
    server.client.config_set("maxmemory", server.client.info()["used_memory"] + 5 * MIB)
    before = set(server.names())
    error = error_of(lambda: backend.put(name("b"), [payload("b", LARGE)]))
    assert error.errno == errno.ENOSPC
    assert "allkeys-lru" in str(error)
    assert set(server.names()) == before
    assert not backend.has(name("b"))
    assert read(backend, "a", LARGE) == payload("a", LARGE)
    assert backend.remove(name("a")) == LARGE
    assert backend.put(name("b"), [payload("b", MIB)])


def test_may_only_read(server: RedisServer) -> None:
    """A user who may only read does so, also where there are holes."""
    place(server.port).put(name("a"), [payload("a", LARGE)])
    place(server.port).put(name("b"), [payload("b", LARGE)])
    server.client.execute_command(
        *("ACL", "SETUSER", "reader", "on", f">{SECRET}", "~*", "+@read", "+@connection"),
    )
    server.evict_ends(":1")
    reader = urlsplit(f"redis://reader:{quote(SECRET)}@127.0.0.1:{server.port}")
    backend = RemoteBackend(open_engine(reader, {}), 1 << 40, readonly=True)
    before = server.names()
    assert isinstance(error_of(lambda: read(backend, "a", LARGE)), FileNotFoundError)
    assert len(backend.children(NO_PARENT)) == 2
    backend.touch([name("b")])
    assert sorted(server.names()) == sorted(before)
    writer = RemoteBackend(open_engine(reader, {}), 1 << 40)
    assert isinstance(error_of(lambda: writer.put(name("c"), [b"x"])), PermissionError)


def test_rights_that_the_page_names(server: RedisServer) -> None:
    """The user of docs/store-servers.md can do all that a store does; without writing, read."""
    page = (Path(__file__).parents[2] / "docs" / "store-servers.md").read_text()
    (line,) = re.findall(r"^ *(ACL SETUSER .*)$", page, re.MULTILINE)
    for rights in (line, line.replace(" +@write", "")):
        server.client.execute_command("ACL", "DELUSER", "llama")
        server.client.execute_command(*rights.split())
        one = open_engine(urlsplit(f"redis://llama:password@127.0.0.1:{server.port}"), {})
        if rights == line:
            backend = RemoteBackend(one, 1 << 40)
            assert backend.put(name("a"), [payload("a", LARGE)])
            backend.touch([name("a")])
            assert backend.put(name("b"), [b"x"])
            assert backend.remove(name("b")) == 1
        else:
            backend = RemoteBackend(one, 1 << 40, readonly=True)
        assert read(backend, "a", LARGE) == payload("a", LARGE)
        assert [each.name for each in backend.entries()] == [name("a")]
        assert {each.level for each in one.advise()} <= {"ok", "warning"}
    server.client.execute_command("ACL", "DELUSER", "llama")


def test_encrypted(tmp_path: Path) -> None:
    """With TLS, and who the server is checked."""
    if not which("openssl"):
        pytest.skip("openssl is not installed: apt-get install openssl")
    cert, private, port = tmp_path / "cert", tmp_path / "key", free_port()
    command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run(
        [*command, *names, "-keyout", str(private), "-out", str(cert)],
        check=True,
        capture_output=True,
    )
    tls = ("--tls-port", str(port), "--tls-cert-file", str(cert), "--tls-key-file", str(private))
    with running(tmp_path / "s", program("redis"), *tls, "--tls-auth-clients", "no"):
        where = urlsplit(f"rediss://127.0.0.1:{port}")
        backend = RemoteBackend(open_engine(where, {"ssl_ca_certs": str(cert)}), 1 << 40)
        assert backend.put(name("a"), [payload("a", LARGE)])
        assert read(backend, "a", LARGE) == payload("a", LARGE)
        unknown = RemoteBackend(open_engine(where, {}), 1 << 40)
        error = error_of(lambda: unknown.has(name("a")))
        assert isinstance(error, ConnectionError)
        assert "certificate" in str(error)


# -- a server that lets go of things


@pytest.mark.parametrize("part", [":0", ":2", ":4", "head"])
def test_holes(server: RedisServer, part: str) -> None:
    """An object without a piece is gone, and can be written anew at once."""
    head = part == "head"
    for backend in (place(server.port), place(server.port)):
        backend.put(name("a"), [payload("a", LARGE)])
        backend.expect([NO_PARENT])
        backend._heads.clear()
        assert server.evict_ends(":0" if head else part) == 1
        with pytest.raises(FileNotFoundError):
            backend.head(name("a"), 9) if head else read(backend, "a", LARGE)
        assert not backend.has(name("a"))
        assert server.names() == [], "what was left of it is in the way"
        assert backend.put(name("a"), [payload("a", LARGE)])
        assert read(backend, "a", LARGE) == payload("a", LARGE)


@pytest.mark.parametrize("damage", ["another type", "longer", "shorter"])
def test_damaged_pieces(server: RedisServer, damage: str) -> None:
    """A piece that is none is an error, and the answers still on their way are nobody's."""
    backend = place(server.port)
    for n in range(3):
        backend.put(name(str(n)), [payload(str(n), LARGE)])
    mark = f"{name('1').key.hex()}-4.R:"
    (piece,) = [one for one in server.names() if mark in one.decode() and one.endswith(b":1")]
    if damage == "another type":
        server.client.delete(piece)
        server.client.lpush(piece, "x")
    else:
        server.client.set(piece, bytes(2 * MIB + (1 if damage == "longer" else -1)))
    for _ in range(3):
        with pytest.raises((OSError, TruncatedError)) as caught:
            read(backend, "1", LARGE)
        assert not isinstance(caught.value, FileNotFoundError)
        for n in (0, 2):
            assert read(backend, str(n), LARGE) == payload(str(n), LARGE)
            assert backend.engine.size(name(str(n))) == LARGE


def test_hole_of_another_process(server: RedisServer) -> None:
    """Who writes is not kept from it by an object of which pieces are gone."""
    place(server.port).put(name("a"), [payload("a", LARGE)])
    server.evict_ends(":3")
    assert place(server.port).put(name("a"), [payload("a", LARGE)])
    assert read(place(server.port), "a", LARGE) == payload("a", LARGE)


def test_index_is_evicted(server: RedisServer) -> None:
    """Without the index an object is not there; its pieces go when their time is over."""
    backend = place(server.port, ttl="1h")
    backend.put(name("a"), [payload("a", LARGE)])
    assert server.evict_ends(":i") == 1
    assert not place(server.port).has(name("a"))
    assert list(backend.entries()) == []
    assert all(0 < server.client.ttl(each) <= 3600 for each in server.names())


def test_written_anew_elsewhere(server: RedisServer) -> None:
    """What another process removed and wrote anew is read as it is now, whatever was known."""
    one, other = place(server.port), place(server.port)
    one.put(name("a"), [payload("old", LARGE)])
    assert read(other, "a", LARGE) == payload("old", LARGE)
    other.expect([NO_PARENT])
    one.remove(name("a"))
    one.put(name("a"), [payload("new", LARGE)])
    assert read(other, "a", LARGE) == payload("new", LARGE)
    assert other.engine.heads([name("a")], 10) == [payload("new", 10)]


def test_first_one_wins(server: RedisServer) -> None:
    """Of several that write other bytes under one name at once, one stays, whole."""
    for turn in range(8):
        each = name(str(turn))
        start = threading.Barrier(3)

        def write(n: int, each: Any = each, start: threading.Barrier = start) -> None:
            own = engine(server.port)
            start.wait()
            own.write(each, [memoryview(payload(str(n), LARGE))])

        threads = [threading.Thread(target=write, args=(n,), daemon=True) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        found = read(place(server.port), str(turn), LARGE)
        assert found in [payload(str(n), LARGE) for n in range(3)]
    pieces = [one for one in server.names() if not one.endswith(b":i")]
    assert len(pieces) == 8 * -(-LARGE // (2 * MIB)), "the others left theirs"


# -- times


def test_lifetime(server: RedisServer) -> None:
    """All keys have a time to live, which use makes begin anew; with ttl=0 none has."""
    backend = place(server.port, ttl="100")
    backend.put(name("a"), [payload("a", LARGE)])
    for each in server.names():
        server.client.expire(each, 50)
    backend.touch([name("a")])
    assert {server.client.ttl(each) for each in server.names()} <= {99, 100}
    assert len(server.names()) == 5 + 2
    server.empty()
    backend = place(server.port, ttl="0")
    backend.put(name("a"), [payload("a", LARGE)])
    backend.touch([name("a")])
    assert {server.client.ttl(each) for each in server.names()} == {-1}


def test_pins_live_until_their_end(server: RedisServer) -> None:
    """A pin and what names it outlive the time of other objects, whatever is touched beside it."""
    backend = place(server.port, ttl="100")
    pin = name("a", kind="P")
    for each in (name("a"), pin):
        backend.put(each, [b"x"])
    backend.touch([pin], time.time() + 5000)
    backend.touch([name("a")])
    backend.put(name("b"), [b"y"])
    lives = {each.decode(): server.client.ttl(each) for each in server.names()}
    assert all(
        ttl > 4900 for each, ttl in lives.items() if ".P:" in each or each[-2:] in (":i", ":u")
    )


def test_touched_from_leaf_to_root(server: RedisServer) -> None:
    """What is touched counts as used for the server itself, the root last."""
    backend = place(server.port)
    chain = [name(str(n), str(n - 1) if n else None) for n in range(3)]
    for each in chain:
        backend.put(each, [b"x"])
    time.sleep(2.1)
    sent = []
    ask = backend.engine._server.ask  # type: ignore[attr-defined]
    backend.engine._server.ask = lambda commands, **more: (
        sent.extend(commands),
        ask(commands, **more),
    )[1]  # type: ignore[attr-defined]
    backend.touch(chain)
    idle = [server.client.object("idletime", one) for one in server.names()]
    assert max(idle) <= 1
    order = [command[2] for command in sent if command[0] == "HSET"]
    assert [str(one)[:64] for one in order] == [each.key.hex() for each in reversed(chain)]


def test_clocks_that_differ(server: RedisServer) -> None:
    """Another machine's clock is an hour off: nothing lives shorter, nothing is lost."""
    backend = place(server.port, ttl="1000")
    for hours, text in ((-1, "slow"), (0, "right"), (1, "fast")):
        backend.put(name(text), [payload(text, MIB)])
        backend.touch([name(text)], time.time() + 3600 * hours)
    assert all(990 < server.client.ttl(each) <= 1000 for each in server.names())
    assert {each.name for each in backend.entries()} == {name(t) for t in ("slow", "right", "fast")}
    for text in ("slow", "right", "fast"):
        assert read(backend, text, MIB) == payload(text, MIB)


# -- others on the same server


def test_keys_of_others(server: RedisServer) -> None:
    """Keys of others are left alone, also such as look like ours, and another store's not seen."""
    parent = key("p").hex()
    foreign = {
        f"llama-state:{{{parent}}}:i": "a text",
        "llama-state:{zz}:i": "a text",
        "llama-state": "a text",
        "session:1": "a text",
    }
    for one, text in foreign.items():
        server.client.set(one, text)
    server.client.hset(
        f"llama-state:{{{key('q').hex()}}}:i", mapping={"who": "knows", "a" * 70: "b"}
    )
    before = {one: server.client.dump(one) for one in server.names()}
    backend, other = place(server.port), place(server.port, prefix="other")
    for each in (backend, other):
        each.put(name("a"), [payload("a", LARGE)])
        each.put(name("b", "a"), [b"x"])
        each.touch([name("a"), name("b", "a")])
        assert {stored.name for stored in each.entries()} == {name("a"), name("b", "a")}
    assert backend.children(key("q")) == []
    backend.evict(0)
    assert len(list(other.entries())) == 2
    other.evict(0)
    assert {one: server.client.dump(one) for one in server.names()} == before
    assert "?prefix=other" in other.location


def test_forked(server: RedisServer) -> None:
    """Parent and child go on at once, each with connections of its own."""
    backend = place(server.port)
    for n in range(4):
        backend.put(name(str(n)), [payload(str(n), LARGE)])

    def reads(first: int) -> None:
        for turn in range(30):
            n = (turn + first) % 4
            assert read(backend, str(n), LARGE) == payload(str(n), LARGE)
            assert backend.engine.size(name(str(n))) == LARGE

    def child() -> None:
        reads(2)
        assert backend.put(name("of the child"), [b"x"])

    reads(0)
    pid = forked(child)
    reads(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert backend.has(name("of the child"))
    reads(0)


def test_forked_at_a_bad_moment(tmp_path: Path) -> None:
    """A lock that another thread held when the process was forked keeps nobody waiting."""
    with cluster(tmp_path, program("redis"), 2) as servers:
        backend = place(servers[0].port, cluster=1)
        backend.put(name("a"), [payload("a", LARGE)])
        lock = backend.engine._server._client[1].nodes_manager._lock  # type: ignore[attr-defined]
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with lock:
                held.set()
                done.wait(60)

        threading.Thread(target=hold, daemon=True).start()
        held.wait(60)
        pid = forked(lambda: list(backend.entries()))
        done.set()
        assert os.waitpid(pid, 0)[1] == 0


def forked(act: Callable[[], object]) -> int:
    """Let a forked process act: its id. It ends with 0 if it can, in good time."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        status = 1
        with suppress(BaseException):
            act()
            status = 0
        os._exit(status)
    return pid


def test_slots_that_move(tmp_path: Path) -> None:
    """A cluster that gives slots to another node is asked there from then on."""
    with cluster(tmp_path, program("redis"), 2) as servers:
        backend = place(servers[0].port, cluster=1)
        assert not backend.has(name("a", "a"))
        slot = servers[0].client.execute_command("CLUSTER", "KEYSLOT", f"{{{key('a').hex()}}}")
        ids = [one.client.execute_command("CLUSTER", "MYID").decode() for one in servers]
        from_here = slot < 8192
        for one in servers:
            one.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[from_here])
        assert backend.put(name("a", "a"), [payload("a", LARGE)])
        with backend.open(name("a", "a"), LARGE) as view:
            assert bytes(view) == payload("a", LARGE)
        plain = place(servers[0].port)
        assert "cluster=1" in str(
            error_of(lambda: [plain.has(name("b", str(n))) for n in range(9)])
        )
        levels = {each.level for each in plain.engine.advise()}
        assert "error" in levels
        assert {each.level for each in backend.engine.advise()} <= {"ok", "warning"}
