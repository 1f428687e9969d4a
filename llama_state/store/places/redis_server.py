"""A Redis or Valkey server, or a cluster of them: connections, commands, and errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar
from urllib.parse import SplitResult, unquote

from ..._install import pip_install
from ...errors import UnsupportedError
from .urls import deadline_of

if TYPE_CHECKING:
    from types import ModuleType

T = TypeVar("T")

Command: TypeAlias = tuple[str | bytes | int | float, ...]
"""The name of a command, its key, and what else it takes."""

PASSWORD: Final = "LLAMA_STATE_REDIS_PASSWORD"  # noqa: S105 - the name of a variable
PORT: Final = 6379
# What the client reads from a connection at once: 64 KiB, its own choice, is half as fast.
_READ_SIZE: Final = 1 << 20
# So many commands are on their way at once.
_BATCH: Final = 1000
# Arguments from that size on are sent as they are, without a copy.
_LARGE: Final = 1 << 14
_TLS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
OPTIONS: Final = ("cluster", "db", "deadline", *_TLS)


class Server:
    """Sends commands to a server, or to the nodes of a cluster, each to that which has the key.

    It can be used by several threads at once, and in a process that was forked from the one that
    made it: there it makes connections of its own.

    Args:
        parts: The URL.
        options: Its query: those of :data:`OPTIONS`.

    Attributes:
        location: What to call it, without user and password.
        cluster: Whether it is a cluster.
        is_far: Whether it is on another machine.
        encrypts: Whether what is sent is encrypted.

    Raises:
        ValueError: A part of the URL cannot be used.
        UnsupportedError: The package ``redis`` is not installed.
    """

    def __init__(self, parts: SplitResult, options: dict[str, str]) -> None:
        self._redis = _imported()
        self.cluster: bool = options.get("cluster", "0") not in ("0", "")
        self.is_far: bool = not _is_here(parts)
        self.encrypts: bool = parts.scheme in ("rediss", "valkeys")
        self._settings = self._connection(parts, options)
        self._client: tuple[int, Any] | None = None  # with the process that made it

    # -- commands

    def ask(self, commands: Sequence[Command], *, must: bool = True) -> list[Any]:
        """Send commands, many at once, and return their replies.

        Args:
            commands: The commands.
            must: False returns what a server refuses as the exception that says so.

        Raises:
            OSError: What goes wrong.
        """
        replies: list[Any] = [None] * len(commands)
        for nodes in self._by_node(commands):
            for start in range(0, len(nodes), _BATCH):
                some = nodes[start : start + _BATCH]
                key = commands[some[0]][1]
                for n, reply in zip(
                    some,
                    self.at(key, lambda c, some=some: _piped(c, [commands[n] for n in some], must)),  # type: ignore[misc]
                    strict=True,
                ):
                    replies[n] = reply
        return replies

    def at(self, key: object, act: Callable[[Any], T]) -> T:
        """Return what *act* does with the client of the node that has a key.

        Raises:
            OSError: What goes wrong.
        """
        with self.told():
            try:
                return act(self._node(key))
            except self._redis.exceptions.MovedError:
                if not self.cluster:
                    raise
            self._client = None  # the slots are at other nodes now
            return act(self._node(key))

    def nodes(self) -> list[Any]:
        """Return the clients of all nodes that hold keys.

        Raises:
            OSError: What goes wrong.
        """
        with self.told():
            client = self._connected()
            if not self.cluster:
                return [client]
            return [client.get_redis_connection(node) for node in client.get_primaries()]

    @contextmanager
    def connection(self, client: Any) -> Iterator[Any]:
        """Lend a connection of *client*; what is still on its way after an error goes with it."""
        pool = client.connection_pool
        connection = pool.get_connection()
        done = False
        try:
            yield connection
            done = True
        finally:
            if not done:
                connection.disconnect()
            pool.release(connection)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Raise what the client raises as OSError, with what to do about it."""
        exceptions = self._redis.exceptions
        try:
            yield
        except (exceptions.RedisError, exceptions.RedisClusterException, OSError) as error:
            if self.cluster and not isinstance(error, exceptions.ResponseError):
                self._client = None  # ask the nodes anew who has which slots
            told = self._as_os_error(error)
        else:
            return
        raise told from None  # the frames of what the client raised hold the password

    # -- nodes

    def _by_node(self, commands: Sequence[Command]) -> list[list[int]]:
        """Return the places of the commands in the list, those of one node together."""
        if not self.cluster:
            return [list(range(len(commands)))] if commands else []
        found: dict[str, list[int]] = {}
        with self.told():
            client = self._connected()
            for n, command in enumerate(commands):
                found.setdefault(client.get_node_from_key(command[1]).name, []).append(n)
        return list(found.values())

    def _node(self, key: object) -> Any:
        client = self._connected()
        if not self.cluster:
            return client
        return client.get_redis_connection(client.get_node_from_key(key))

    def _connected(self) -> Any:
        """Return the client: in a forked process another one, as its connections are others'."""
        made, here = self._client, os.getpid()
        if made is None or made[0] != here:
            made = self._client = (here, self._new_client())
        return made[1]

    def _new_client(self) -> Any:
        redis, settings = self._redis, dict(self._settings)
        no_retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        if self.cluster:
            settings.update(retry=no_retry, require_full_coverage=False)
            return redis.RedisCluster(**settings, ssl=self.encrypts)
        kind = redis.SSLConnection if self.encrypts else redis.Connection
        if "path" in settings:
            kind = redis.UnixDomainSocketConnection
        pool = redis.ConnectionPool(connection_class=kind, retry=no_retry, **settings)
        return redis.Redis(connection_pool=pool)

    # -- what is set

    def _connection(self, parts: SplitResult, options: dict[str, str]) -> dict[str, Any]:
        """Return what the client is given, and set the location."""
        deadline = deadline_of(options)
        if deadline <= 0:
            raise ValueError("deadline=0: no call can be in time")
        found: dict[str, Any] = {
            "username": unquote(parts.username) if parts.username else None,
            "password": unquote(parts.password or "") or os.environ.get(PASSWORD) or None,
            "socket_timeout": deadline,
            "socket_connect_timeout": deadline,
            "socket_read_size": _READ_SIZE,
            "protocol": 2,
        }
        tls: dict[str, Any] = {name: options[name] for name in _TLS if name in options}
        if parts.scheme == "unix":
            if self.cluster or tls or not parts.path:
                raise ValueError("unix: takes the path of one socket: unix:///run/redis.sock")
            path = unquote(parts.path)
            found["path"], found["db"] = path, _database(options.get("db", ""))
            self.location: str = f"unix://{path}" + (f"?db={found['db']}" if found["db"] else "")
            return found
        if self.cluster and options.get("db", parts.path.strip("/")) not in ("", "0"):
            raise ValueError("a cluster has no databases: leave the number out")
        found["host"], found["port"] = parts.hostname or "localhost", parts.port or PORT
        if not self.cluster:
            found["db"] = _database(options.get("db") or parts.path.strip("/"))
        if self.encrypts:
            found.update(tls)
        elif tls:
            raise ValueError(f"{min(tls)} is for rediss:// and valkeys://")
        host = f"[{found['host']}]" if ":" in found["host"] else found["host"]
        database = f"/{found['db']}" if found.get("db") else ""
        self.location = f"{parts.scheme}://{host}:{found['port']}{database}"
        return found

    def _as_os_error(self, error: BaseException) -> OSError:
        """Return an error of the client as one of Python, which says what to do."""
        redis = self._redis.exceptions
        text = str(error) or type(error).__name__
        if password := self._settings["password"]:
            text = text.replace(password, "***")
        at = f"{self.location}: {text}"
        refused = ("NOAUTH", "NOPERM", "WRONGPASS", "invalid username-password")
        if isinstance(
            error, (redis.AuthenticationError, redis.AuthorizationError, redis.NoPermissionError)
        ) or text.startswith(refused):
            hint = f"set the password in the URL or in {PASSWORD}, and let the user read and write"
            return PermissionError(errno.EACCES, f"{at}: {hint}")
        if isinstance(error, redis.OutOfMemoryError):
            hint = "set maxmemory-policy to allkeys-lru, or let go with 'llama-state store evict'"
            return OSError(errno.ENOSPC, f"{at}: {hint}")
        if isinstance(error, (redis.TimeoutError, TimeoutError)):
            return TimeoutError(errno.ETIMEDOUT, f"{at}: no answer in time: see deadline=")
        if isinstance(error, redis.ReadOnlyError):
            return OSError(errno.EROFS, f"{at}: name the primary, not a replica")
        moved = isinstance(error, redis.MovedError) or text.startswith("MOVED ")
        if moved and not self.cluster:
            return OSError(errno.EPROTO, f"{at}: it is a cluster: add cluster=1 to the URL")
        if isinstance(error, redis.BusyLoadingError):
            return BlockingIOError(errno.EAGAIN, f"{at}: it starts, and can be asked soon")
        if isinstance(error, (redis.ResponseError, redis.InvalidResponse)):
            # Not EIO: that would say that one object is damaged.
            return OSError(errno.EPROTO, f"{at}: see 'llama-state store doctor'")
        return ConnectionError(errno.ECONNREFUSED, f"{at}: is the server running?")


def packed(*arguments: bytes | memoryview | Sequence[memoryview]) -> list[bytes | memoryview]:
    """Return a command as it is sent, in parts: nothing large is copied.

    Args:
        arguments: Bytes, or views that are one argument together.
    """
    parts: list[bytes | memoryview] = []
    text = b"*%d\r\n" % len(arguments)
    for argument in arguments:
        views = [argument] if isinstance(argument, (bytes, memoryview)) else argument
        text += b"$%d\r\n" % sum(map(len, views))
        for view in views:
            if len(view) < _LARGE:
                text += bytes(view)
            else:
                parts += [text, view]
                text = b""
        text += b"\r\n"
    return [*parts, text]


def _piped(client: Any, commands: Sequence[Command], must: bool) -> list[Any]:
    if len(commands) == 1 and must:
        return [client.execute_command(*commands[0])]
    with client.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)
        return list(pipe.execute(raise_on_error=must))


def _imported() -> ModuleType:
    try:
        import redis
        import redis.backoff
        import redis.retry
    except ImportError:
        raise UnsupportedError(
            f"a prefix store in Redis or Valkey needs redis: {pip_install('redis')}"
        ) from None
    return redis


def _database(text: str) -> int:
    if text and not text.isdecimal():
        raise ValueError(f"database {text!r}: it must be a number, as in redis://host/1")
    return int(text or 0)


def _is_here(parts: SplitResult) -> bool:
    host = parts.hostname or "localhost"
    return parts.scheme == "unix" or host in ("localhost", "::1") or host.startswith("127.")
