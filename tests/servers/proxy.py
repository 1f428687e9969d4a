"""What stands between a client and a server, and does to their connection what networks do."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Passes bytes on, on a port of its own.

    Attributes:
        port: Where it listens.
        limit: What may be sent back on a connection; then it is reset. None: all.
        at_limit: Called when a connection meets the limit, before it is reset.
        silent: Whether nothing is passed on in either direction.
        delay: Seconds that what is sent back waits.
        passed: Bytes that were sent back so far.
    """

    def __init__(self, target: int) -> None:
        self.limit: int | None = None
        self.at_limit: Callable[[], None] = lambda: None
        self.silent = False
        self.delay = 0.0
        self.passed = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = [self._listener]

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End all connections, and take no more."""
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def accept(self) -> None:
        """Take connections until it is closed."""
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            self._open.append(client)
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._open.append(server)
            for ends in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, back: bool) -> None:
        sent = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                while self.silent:
                    threading.Event().wait(0.05)
                if back and self.delay:
                    threading.Event().wait(self.delay)
                sent += len(data)
                if back and self.limit is not None and sent > self.limit:
                    self.at_limit()
                    target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    break
                target.sendall(data)
                if back:
                    self.passed += len(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@contextmanager
def proxy(target: int) -> Iterator[Proxy]:
    """Yield a proxy for a port of the loopback."""
    between = Proxy(target)
    threading.Thread(target=between.accept, daemon=True).start()
    try:
        yield between
    finally:
        between.silent = False
        between.close()


@contextmanager
def always(answer: bytes) -> Iterator[int]:
    """Yield the port of a server that answers every request the same; with b"", never."""
    listener = socket.create_server(("127.0.0.1", 0))
    held = [listener]

    def serve() -> None:
        with suppress(OSError):
            while True:
                held.append(client := listener.accept()[0])
                threading.Thread(target=one, args=(client,), daemon=True).start()

    def one(client: socket.socket) -> None:
        with suppress(OSError):
            while client.recv(1 << 16):
                if answer:
                    client.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        for each in held:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
