"""Redis and Valkey servers for tests, on 127.0.0.1 in a folder of their own, stopped by id."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.servers.ports import free_port

KINDS = {"redis": "redis-server", "valkey": "valkey-server"}
HERE = {kind: path for kind, name in KINDS.items() if (path := shutil.which(name))}
"""Kind of server -> its program, for those that are installed."""

START_SECONDS = 20.0
SLOTS = 16384


class RedisServer:
    """A server that a test starts, stops, and looks into with a client of its own."""

    def __init__(self, folder: Path, program: str, *options: str, port: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self._command = [
            *(program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)),
            *("--save", "", "--appendonly", "no", "--daemonize", "no"),
            *("--unixsocket", str(folder / "s"), *options),
        ]
        self.socket = folder / "s"
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.password = (
            options[options.index("--requirepass") + 1] if "--requirepass" in options else None
        )
        self.client = self._client()

    def _client(self) -> Any:
        import redis

        return redis.Redis(port=self.port, password=self.password, socket_timeout=20, protocol=2)

    def start(self) -> RedisServer:
        """Start it, with nothing in it, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                self.client.ping()
                return self
            except Exception as error:
                if time.monotonic() > until or self._process.poll() is not None:
                    raise RuntimeError(self._log.read_text()) from error
                time.sleep(0.02)

    def kill(self) -> None:
        """End it at once; all that was in it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.client.close()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Let it take connections and answer nothing, for the length of a block."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def url(self, **options: object) -> str:
        """The URL of a store in it."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"redis://127.0.0.1:{self.port}" + (f"?{query}" if query else "")

    def empty(self) -> None:
        """Remove all that is in it."""
        self.client.flushall()

    def names(self) -> list[bytes]:
        """All keys."""
        return list(self.client.keys())

    def evict(self, part: str) -> int:
        """Let go of the keys that have *part* in their names, as the server itself does."""
        return self._delete([key for key in self.names() if part in key.decode()])

    def evict_ends(self, end: str) -> int:
        """Let go of the keys that end so."""
        return self._delete([key for key in self.names() if key.decode().endswith(end)])

    def _delete(self, keys: Sequence[bytes]) -> int:
        return int(self.client.delete(*keys)) if keys else 0


@contextmanager
def running(folder: Path, program: str, *options: str) -> Iterator[RedisServer]:
    """A server for the length of a block."""
    server = RedisServer(folder, program, *options)
    try:
        yield server.start()
    finally:
        server.kill()


@contextmanager
def cluster(folder: Path, program: str, n: int = 3) -> Iterator[list[RedisServer]]:
    """A cluster of *n* primaries for the length of a block."""
    options = ("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf")
    servers: list[RedisServer] = []
    try:
        for number in range(n):
            # The bus is 10000 above, which is its default too, but then must be free as well.
            servers.append(
                RedisServer(
                    folder / str(number), program, *options, "--cluster-port", str(free_port())
                )
            )
            servers[-1].start()
        _join(servers)
        yield servers
    finally:
        for server in servers:
            server.kill()


def _join(servers: Sequence[RedisServer]) -> None:
    """Share the slots, and let the servers know each other."""
    first = servers[0]
    for n, server in enumerate(servers):
        ends = (n * SLOTS // len(servers), (n + 1) * SLOTS // len(servers) - 1)
        server.client.execute_command("CLUSTER", "ADDSLOTSRANGE", *ends)
        server.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        bus = server._command[server._command.index("--cluster-port") + 1]
        if server is not first:
            first.client.execute_command("CLUSTER", "MEET", "127.0.0.1", server.port, bus)
    until = time.monotonic() + START_SECONDS
    while True:
        states = [server.client.execute_command("CLUSTER", "INFO") for server in servers]
        known = [server.client.execute_command("CLUSTER", "NODES") for server in servers]
        if all("cluster_state:ok" in _text(state) for state in states) and all(
            _text(nodes).count("connected") >= len(servers) for nodes in known
        ):
            return
        if time.monotonic() > until:
            raise RuntimeError(f"no cluster: {states}")
        time.sleep(0.05)


def _text(reply: Any) -> str:
    if isinstance(reply, dict):
        return "\n".join(f"{name}:{value}" for name, value in reply.items()) + "connected" * len(
            reply
        )
    return reply.decode() if isinstance(reply, bytes) else str(reply)


def program(kind: str) -> str:
    """The program of a kind of server; skips the test where it is not installed."""
    if kind not in HERE:
        pytest.skip(f"{KINDS[kind]} is not installed: apt-get install {KINDS[kind]}")
    return HERE[kind]


def kinds() -> list[str]:
    """The kinds that tests run with: Redis always, Valkey where it is installed."""
    return ["redis", *(["valkey"] if "valkey" in HERE else [])]
