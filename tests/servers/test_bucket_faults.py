"""What fails at a bucket is an OSError in good time, which says what to do and no secret."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from urllib.parse import urlsplit

import pytest

import llama_state
from llama_state.errors import UnsupportedError
from llama_state.store.lookup import DAMAGE
from llama_state.store.places import bucket_calls
from llama_state.store.places.buckets import PART, open_engine
from llama_state.testing.stores import key, name, payload
from tests.servers.ports import free_port
from tests.servers.proxy import always, proxy
from tests.servers.s3_server import S3Server
from tests.servers.test_buckets import opened

ROOT = Path(llama_state.__file__).parents[1]
SECRET = "not-to-be-shown"  # noqa: S105 - of nothing
LARGE = 3 * PART + 5
_SKEWED = b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference</Message></Error>"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in [each for each in os.environ if each.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(each)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def refused(call: Callable[[], object], seconds: float = 5.0) -> OSError:
    """The OSError of a call, which comes in time and shows no secret."""
    began = time.monotonic()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its kind is looked at by the caller
        call()
    assert time.monotonic() - began < seconds
    assert caught.value.errno not in DAMAGE, "a sound object would be removed"
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error) + repr(error)
        error = error.__context__
    return caught.value


# -- a server that comes and goes


def test_killed_during_put() -> None:
    """Nothing of it is found afterwards, and the same is written once the server is back."""
    with S3Server() as server, proxy(server.port) as between:
        server.make_bucket("kept")
        place = opened(f"s3://kept/a?endpoint={between.endpoint}&deadline=2")
        between.at_limit = server.kill
        between.limit = 600  # two answers of the server: parts are on their way
        data = payload("a", LARGE)
        error = refused(lambda: place.put(name("a"), [data]), 12)
        assert not isinstance(error, FileNotFoundError)
        assert server.killed
        between.limit = None
        server.start()
        assert "does not exist" in str(refused(lambda: place.put(name("a"), [data])))
        server.make_bucket("kept")
        assert not place.has(name("a"))
        assert place.put(name("a"), [data])
        with place.open(name("a"), LARGE) as view:
            assert view == data


def test_killed_during_get() -> None:
    """What was half read is an error, and after a restart it is gone."""
    with S3Server() as server, proxy(server.port) as between:
        server.make_bucket("kept")
        place = opened(f"s3://kept/a?endpoint={between.endpoint}&deadline=2")
        place.put(name("a"), [payload("a", LARGE)])
        between.at_limit = server.kill
        between.limit = PART // 2
        error = refused(lambda: place.open(name("a"), LARGE).__enter__(), 12)
        assert not isinstance(error, FileNotFoundError)
        assert server.killed
        between.limit = None
        server.start()
        server.make_bucket("kept")
        with pytest.raises(FileNotFoundError), place.open(name("a"), LARGE):
            pass
        assert place.children(name("a").parent) == []


def test_cut_in_a_value(bucket: S3Server) -> None:
    """What is cut early each time is an error; else it is tried again, and never wrong."""
    with proxy(bucket.port) as between:
        place = opened(f"s3://kept/cut?endpoint={between.endpoint}&deadline=3")
        data = payload("cut", LARGE)
        place.put(name("a"), [data])
        between.limit = 100_000
        refused(lambda: place.open(name("a"), LARGE).__enter__(), 12)
        cuts: list[None] = []
        between.at_limit = lambda: cuts.append(None)
        between.limit = PART // 2  # it goes on where it was cut
        with place.open(name("a"), LARGE) as view:
            assert view == data
        assert cuts


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort"])
def test_never_answers(answer: bytes) -> None:
    """What never answers, or never ends its answer, takes the deadline, and says so."""
    with always(answer) as port:
        place = opened(f"s3://kept?endpoint=http://127.0.0.1:{port}&deadline=0.5")
        calls: list[Callable[[], object]] = [
            lambda: place.children(key("a")),
            lambda: place.expect([key(str(n)) for n in range(16)]),
        ]
        if not answer:
            calls += [
                lambda: place.has(name("a")),
                lambda: place.head(name("a"), 10),
                lambda: place.open(name("a"), 99).__enter__(),
                lambda: place.put(name("a"), [b"x"]),
            ]
        for call in calls:
            error = refused(call, 2.5)
            assert isinstance(error, TimeoutError), error
            assert "deadline=" in str(error)


def test_nobody_there() -> None:
    """A refused connection is an error at once."""
    place = opened(f"s3://kept?endpoint=http://127.0.0.1:{free_port()}&deadline=5")
    assert "cannot be used" in str(refused(lambda: place.children(key("a")), 3))


# -- rights, names, clocks


def test_wrong_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right pair works; another one is PermissionError, as is none at all."""
    with S3Server(checks=True) as server:
        right, secret = server.credentials()
        server.make_bucket("kept")
        url = f"s3://kept/a?endpoint={server.endpoint}&deadline=2"
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", right)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        good = opened(url)
        assert good.put(name("a"), [b"x"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        wrong = opened(url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOBODY")
        for place in (wrong, opened(url)):
            for call in (
                lambda place=place: place.children(key("a")),
                lambda place=place: place.has(name("a")),
                lambda place=place: place.head(name("a"), 1),
                lambda place=place: place.open(name("a"), 1).__enter__(),
                lambda place=place: place.engine.write(name("b"), [memoryview(b"x")]),
                lambda place=place: place.engine.delete([name("a")]),
                lambda place=place: list(place.entries()),
            ):
                error = refused(call)
                assert isinstance(error, PermissionError), error
                assert "check credentials and rights" in str(error)
            assert isinstance(refused(place.engine.advise), PermissionError)
        assert good.has(name("a"))


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none are found the error names the variables."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with always(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") as port:
        # Where a machine of the cloud would ask.
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{port}")
        place = opened("s3://kept?endpoint=http://127.0.0.1:9&deadline=1")
        error = refused(lambda: place.children(key("a")))
    assert isinstance(error, PermissionError), error
    assert "AWS_ACCESS_KEY_ID" in str(error)


def test_missing_bucket(bucket: S3Server) -> None:
    """It is no missing object: the error says what to do."""
    place = opened(f"s3://missing/a?endpoint={bucket.endpoint}&deadline=2")
    for call in (
        lambda: place.children(key("a")),
        lambda: place.head(name("a"), 1),
        lambda: place.open(name("a"), 1).__enter__(),
        lambda: place.put(name("a"), [b"x"]),
        lambda: place.put(name("a"), [bytes(LARGE)]),
        lambda: list(place.entries()),
    ):
        error = refused(call)
        assert not isinstance(error, FileNotFoundError)
        assert "the bucket does not exist: make it, or correct the URL" in str(error)


def test_clocks() -> None:
    """A server whose clock is another one keeps pins by ours, and can say that it is too far."""
    for ahead in (3600.0, -3600.0):
        with S3Server(clock=ahead) as server:
            server.make_bucket("kept")
            place = opened(f"s3://kept?endpoint={server.endpoint}")
            for each in (name("a"), name("b")):
                place.put(each, [b"x"])
            place.put(name("a", kind="P"), [b"pin"])
            place.touch([name("a", kind="P")], time.time() + 60)
            used = {stored.name: stored.used for stored in place.entries()}
            assert abs(used[name("a")] - time.time() - ahead) < 60
            place.evict(0)
            assert {each.name for each in place.entries()} == {name("a"), name("a", kind="P")}
            place.touch([name("a", kind="P")], time.time() - 1)
            place.evict(0)
            assert not list(place.entries())
    head = f"HTTP/1.1 403 Forbidden\r\nContent-Length: {len(_SKEWED)}\r\n\r\n".encode()
    with always(head + _SKEWED) as port:
        place = opened(f"s3://kept?endpoint=http://127.0.0.1:{port}")
        error = refused(lambda: place.children(key("a")))
        assert isinstance(error, PermissionError)
        assert "clocks" in str(error)


# -- URLs


def test_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL names the bucket and where it is, and nothing that is secret."""
    for text, expected in {
        "s3://b/p/q/?endpoint=http://h:1/&region=eu-1": "s3://b/p/q?endpoint=http://h:1",
        "s3://b": "s3://b",
        "gs://b/p": "gs://b/p",
        "gs://b?endpoint=https://h": "gs://b?endpoint=https://h",
        "az://c/p%20q?account=a": "az://c/p q?account=a",
    }.items():
        assert opened(text).location == expected
    for text, why in {
        f"s3://key:{SECRET}@b/p": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
        f"s3://{SECRET}@b/p": "must hold no password",
        "gs://a:b@c": "GOOGLE_APPLICATION_CREDENTIALS",
        "s3:///p": "names no bucket",
        "s3://host:9000/b": "and the server as endpoint=",
        f"s3://b?secret_access_key={SECRET}": "deadline, endpoint, region are",
        "gs://b?region=eu": "deadline, endpoint are",
        "az://c": "az://c cannot be opened: .*[Aa]ccount",
        "s3://b?endpoint=h:9000": "must be the URL of a server",
        f"s3://b?endpoint=http://a:{SECRET}@h": "must be the URL of a server",
        "s3://b?deadline=0": "more than 0",
        "s3://b?deadline=2h": "up to 1h",
        "s3://b?deadline=soon": "is no time",
        "s3://b/a/../c": "cannot be opened",
    }.items():
        with pytest.raises(ValueError, match=why) as caught:
            opened(text)
        assert SECRET not in str(caught.value)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UnsupportedError, match=r"pip install -e '\.\[s3\]'"):
        open_engine(urlsplit("s3://b"), {})


def test_panics(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes Rust give up is an error as any other."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    refused(lambda: opened("s3://bucket").children(key("a")))


def test_queries_are_not_shown() -> None:
    """What an error of obstore's shows of a URL ends before its query, and it is not kept."""

    def fail() -> None:
        raise ValueError(f"cannot get http://host/x?sig={SECRET} (why)\nDebug source: {SECRET}")

    error = refused(lambda: bucket_calls.call("here", fail))
    assert "http://host/x (why)" in str(error)


def test_interrupts_pass() -> None:
    """Whatever is no error of obstore's is passed on."""

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bucket_calls.call("here", stop)


# -- processes

_FORKS = """
    import os, signal, sys
    from llama_state.store.places.urls import open_place
    from llama_state.testing.stores import key

    def opened():
        return open_place(sys.argv[1], None, durable=False, readonly=False)

    place = opened()
    if sys.argv[2] == "used":
        place.children(key("a"))
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        signal.alarm(20)
        for each in (place, opened()):
            try:
                print("listed", each.children(key("a")), flush=True)
            except OSError as error:
                print("refused", error, flush=True)
        del place, each
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "the child did not end by itself"
    print("parent", place.children(key("a")))
"""

_PROCESSES = """
    import multiprocessing, sys
    from llama_state.store.places.urls import open_place
    from llama_state.testing.stores import key

    def listed(url, answers):
        try:
            place = open_place(url, None, durable=False, readonly=False)
            answers.put(("listed", place.children(key("a"))))
        except OSError as error:
            answers.put(("refused", str(error)))

    if __name__ == "__main__":
        place = open_place(sys.argv[1], None, durable=False, readonly=False)
        place.children(key("a"))
        for method in ("fork", "spawn", "forkserver"):
            how = multiprocessing.get_context(method)
            answers = how.SimpleQueue()
            process = how.Process(target=listed, args=(sys.argv[1], answers))
            process.start()
            process.join(60)
            assert process.exitcode == 0, (method, process.exitcode)
            print(method, *answers.get())
"""


def _run(tmp_path: Path, program: str, *arguments: str) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(dedent(program))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_fork(bucket: S3Server, tmp_path: Path) -> None:
    """A child of a process that used a bucket is told so, also where it opens one anew."""
    url = f"s3://kept/forks?endpoint={bucket.endpoint}"
    *child, parent = _run(tmp_path, _FORKS, url, "used")
    assert len(child) == 2
    assert all(line.startswith("refused") and "spawn" in line for line in child)
    assert parent == "parent []"
    assert _run(tmp_path, _FORKS, url, "unused") == ["listed []", "listed []", "parent []"]


def test_multiprocessing(bucket: S3Server, tmp_path: Path) -> None:
    """What the error advises works."""
    lines = _run(tmp_path, _PROCESSES, f"s3://kept/forks?endpoint={bucket.endpoint}")
    assert lines[0].startswith("fork refused")
    assert lines[1:] == ["spawn listed []", "forkserver listed []"]


def test_threads(bucket: S3Server) -> None:
    """Many threads read one object into buffers of their own."""
    place = opened(f"s3://kept/threads?endpoint={bucket.endpoint}")
    data = payload("a", PART + 1)
    place.put(name("a"), [data])
    found: list[bool] = []

    def read() -> None:
        with place.open(name("a"), len(data)) as view:
            found.append(view == data)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 6
