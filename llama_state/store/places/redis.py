"""Objects in Redis or Valkey: an index for each parent, and data in pieces.

All keys of a parent have it as their hash tag, so that a cluster keeps them at one node::

    PREFIX:{PARENT}:i            hash: name -> bytes, size of the pieces, stamp, time of writing
    PREFIX:{PARENT}:u            hash: name -> time of the last use
    PREFIX:{PARENT}:NAME:STAMP:N the piece N of the data

A name is that of :func:`~.backend.text_of` without the parent. Data is written first, under a
stamp of its own, and the index last, if there is none: so whoever is first wins, and no reader
meets pieces of two. A server that evicts makes holes: what lacks a piece is gone.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from struct import Struct
from struct import error as StructError
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ...errors import TruncatedError
from ..objects import Name
from .backend import Stored, name_of, text_of
from .redis_facts import advice
from .redis_server import OPTIONS, Command, Server, packed
from .remote import Advice, check_size, gone
from .urls import seconds_of, size_of

if TYPE_CHECKING:
    from urllib.parse import SplitResult

_VALUE: Final = Struct("<BxxxIQ8sd")
_TIME: Final = Struct("<d")
_VERSION: Final = 1
_PREFIX: Final = re.compile(r"[\w.:/-]{1,100}")
_PIECES: Final = range(1 << 20, (4 << 20) + 1)
# Measured on 127.0.0.1: of 1 and 2 MiB alike, of 4 MiB slower by 1.2 to 1.8 in reading.
_PIECE: Final = "2MiB"
# Pieces that are asked for, or sent, before the one before is answered.
_WINDOW: Final = 2
_MOST_KNOWN: Final = 1 << 15
_OWN: Final = ("prefix", "ttl", "piece")


def open_engine(parts: SplitResult, options: dict[str, str]) -> RedisEngine:
    """Open what a URL names; no server is asked yet.

    Args:
        parts: ``redis://[user:password@]host[:port][/db]``, or ``rediss``, ``valkey``,
            ``valkeys``, ``unix:///path``.
        options: Its query: ``prefix``, ``ttl``, ``piece``, and those of the server.

    Raises:
        ValueError: An option is not known, or has a value that cannot be used.
        UnsupportedError: The package ``redis`` is not installed.
    """
    known = sorted((*_OWN, *OPTIONS))
    if unknown := set(options) - set(known):
        raise ValueError(
            f"{parts.scheme}: option {min(unknown)!r} is not known: {', '.join(known)} are"
        )
    prefix = options.get("prefix", "llama-state")
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"prefix {prefix!r}: letters, digits and . : / - _ can be in it")
    piece = size_of(options.get("piece", _PIECE))
    if piece not in _PIECES:
        raise ValueError(f"piece={options['piece']}: it must be 1MiB to 4MiB")
    ttl = math.ceil(seconds_of(options.get("ttl", "7d")))
    return RedisEngine(Server(parts, options), prefix=prefix, piece=piece, ttl=ttl)


class _Value(NamedTuple):
    """What the index says of an object."""

    nbytes: int
    piece: int
    stamp: bytes
    written: float

    @property
    def n_pieces(self) -> int:
        return max(-(-self.nbytes // self.piece), 1)

    def length(self, n: int) -> int:
        """Return the bytes of piece *n*."""
        return min(self.piece, self.nbytes - n * self.piece)

    def pack(self) -> bytes:
        return _VALUE.pack(_VERSION, self.piece, self.nbytes, self.stamp, self.written)


class RedisEngine:
    """An :class:`~.remote.Engine` for Redis and Valkey.

    Args:
        server: Sends the commands.
        prefix: What all keys begin with.
        piece: Bytes of a piece.
        ttl: Seconds that an object lives after its last use; 0: for ever.
    """

    best_bytes = 8 << 20
    readonly = False

    def __init__(self, server: Server, *, prefix: str, piece: int, ttl: int) -> None:
        self._server = server
        self._prefix = prefix
        self._piece = piece
        self._ttl = ttl
        joint = "&" if "?" in server.location else "?"
        own = "" if prefix == "llama-state" else f"{joint}prefix={prefix}"
        self.location: str = server.location + own
        # What the index said last. A stamp is never used again: what is old is found to be gone.
        self._known: dict[Name, _Value] = {}

    # -- reading

    def listed(self, parents: Sequence[bytes]) -> list[Mapping[Name, int]]:
        """See :class:`~.remote.Engine`: one round trip."""
        found = self._server.ask([("HGETALL", self._index(parent)) for parent in parents])
        return [
            {name: value.nbytes for name, value in self._values(parent, each)}
            for parent, each in zip(parents, found, strict=True)
        ]

    def heads(self, names: Sequence[Name], nbytes: int) -> list[bytes | None]:
        """See :class:`~.remote.Engine`: one round trip for what was listed before."""
        before = self._looked_up(names)
        found = self._heads(names, before, nbytes)
        stale = [name for name in before if found[name] is None]
        if stale:
            now = self._looked_up(stale, fresh=True)
            self._clean({n: v for n, v in now.items() if v == before[n]})
            found.update(
                self._heads(stale, {n: v for n, v in now.items() if v != before[n]}, nbytes)
            )
        return [found[name] for name in names]

    def size(self, name: Name) -> int | None:
        """See :class:`~.remote.Engine`: with all of its pieces."""
        value = self._looked_up([name], fresh=True).get(name)
        if value is None:
            return None
        if self._server.ask([("EXISTS", *self._pieces(name, value))])[0] != value.n_pieces:
            self._clean({name: value})
            return None
        return value.nbytes

    def read(self, name: Name, buffer: memoryview) -> None:
        """See :class:`~.remote.Engine`."""
        value = self._looked_up([name]).get(name)
        if value and value.nbytes == len(buffer) and self._read(name, value, buffer):
            return
        now = self._looked_up([name], fresh=True).get(name)
        if now is None:
            raise gone(name)
        check_size(buffer, now.nbytes)
        if now == value or not self._read(name, now, buffer):
            self._clean({name: now})  # a hole: a piece of it was evicted
            raise gone(name)

    def entries(self) -> Iterator[Stored]:
        """See :class:`~.remote.Engine`."""
        pattern = re.sub(r"([\[\]*?\\])", r"\\\1", self._prefix) + ":{*}:i"
        seen: set[bytes] = set()
        for client in self._server.nodes():
            cursor: int | None = None
            while cursor != 0:
                with self._server.told():
                    cursor, keys = client.scan(cursor or 0, match=pattern, count=1000)
                new = [parent for parent in map(self._parent, keys) if parent]
                yield from self._stored([parent for parent in new if parent not in seen])
                seen.update(new)

    def _heads(
        self, names: Sequence[Name], values: Mapping[Name, _Value], nbytes: int
    ) -> dict[Name, bytes | None]:
        commands: list[Command] = []
        whose: list[Name] = []
        for name, value in values.items():
            for n in range(-(-min(nbytes, value.nbytes) // value.piece)):
                end = min(nbytes - n * value.piece, value.piece)
                commands.append(("GETRANGE", self._key(name, value, n), 0, end - 1))
                whose.append(name)
        data = {name: b"" for name in values}
        for name, part in zip(whose, self._server.ask(commands), strict=True):
            data[name] += part
        found: dict[Name, bytes | None] = dict.fromkeys(names)
        for name, value in values.items():
            if len(data[name]) == min(nbytes, value.nbytes):
                found[name] = data[name]
        return found

    def _read(self, name: Name, value: _Value, buffer: memoryview) -> bool:
        """Read all pieces of an object into a buffer; False where one is gone."""
        keys = [key.encode() for key in self._pieces(name, value)]

        def read(client: Any) -> bool:
            whole, sent = True, 0
            with self._server.connection(client) as connection:
                for n in range(len(keys)):
                    while whole and sent < min(n + _WINDOW, len(keys)):
                        connection.send_packed_command(packed(b"GET", keys[sent]))
                        sent += 1
                    if n == sent:
                        break
                    data = connection.read_response()
                    if data is None:
                        whole = False
                    elif whole:
                        at, length = n * value.piece, value.length(n)
                        if len(data) != length:
                            raise TruncatedError("a piece", need=length, have=len(data))
                        buffer[at : at + length] = data
                    del data  # before the next one is there
            return whole

        return self._server.at(keys[0], read)

    def _stored(self, parents: Sequence[bytes]) -> Iterator[Stored]:
        commands = [("HGETALL", key) for p in parents for key in (self._index(p), self._used(p))]
        replies = self._server.ask(commands, must=False)
        for n, parent in enumerate(parents):
            index, used = replies[2 * n : 2 * n + 2]
            times = used if isinstance(used, dict) else {}
            for name, value in self._values(parent, index if isinstance(index, dict) else {}):
                when = times.get(_field(name).encode(), b"")
                known = _TIME.unpack(when)[0] if len(when) == _TIME.size else value.written
                yield Stored(name, value.nbytes, known)

    # -- writing

    def write(self, name: Name, parts: Sequence[memoryview]) -> None:
        """See :class:`~.remote.Engine`: the data first, then what names it."""
        value = _Value(sum(map(len, parts)), self._piece, os.urandom(8), time.time())
        index = self._index(name.parent)
        (left,) = self._server.ask([("TTL", index)])
        ttl = self._lifetime(left)
        try:
            self._write(name, value, parts, ttl)
        except OSError:
            with suppress(OSError):  # what is there of it would take room until its time is over
                self._server.ask([("UNLINK", *self._pieces(name, value))])
            raise
        commands: list[Command] = [("HSETNX", index, _field(name), value.pack())]
        if ttl and ttl > left:
            commands.append(("EXPIRE", index, ttl))
        if self._server.ask(commands)[0]:
            self._know(name, value)
        else:  # another one was faster, and stays
            self._known.pop(name, None)
            self._server.ask([("UNLINK", *self._pieces(name, value))])

    def _write(self, name: Name, value: _Value, parts: Sequence[memoryview], ttl: int) -> None:
        until = (b"EX", b"%d" % ttl) if ttl else ()
        keys = [key.encode() for key in self._pieces(name, value)]

        def write(client: Any) -> None:
            with self._server.connection(client) as connection:
                waiting = 0
                for key, views in zip(keys, _cut(parts, value.piece), strict=True):
                    connection.send_packed_command(packed(b"SET", key, views, *until))
                    waiting += 1
                    if waiting == _WINDOW:
                        connection.read_response()
                        waiting -= 1
                for _ in range(waiting):
                    connection.read_response()

        self._server.at(keys[0], write)

    def touch(self, names: Sequence[Name], when: float) -> None:
        """See :class:`~.remote.Engine`: what is touched last is what a server keeps longest.

        A pin lives until its end; what is touched beside it, as long.
        """
        values = self._looked_up(names)
        parents = list(dict.fromkeys(name.parent for name in values))
        left = dict(zip(parents, self._left(parents), strict=True))
        commands: list[Command] = []
        for name, value in values.items():
            ttl = self._lifetime(left[name.parent])
            keys = self._pieces(name, value)
            if name.kind == "P" and self._ttl:
                ttl = max(ttl, math.ceil(when - time.time()))
            commands.append(("HSET", self._used(name.parent), _field(name), _TIME.pack(when)))
            if ttl:
                all_keys = (*keys, self._used(name.parent), self._index(name.parent))
                commands += [("EXPIRE", key, ttl) for key in all_keys]
            else:
                commands.append(("TOUCH", *keys, self._index(name.parent)))
        self._server.ask(commands)

    def delete(self, names: Sequence[Name]) -> None:
        """See :class:`~.remote.Engine`."""
        self._remove(self._looked_up(names, fresh=True))

    def _clean(self, holes: Mapping[Name, _Value]) -> None:
        """Take away what is left of objects, so that they can be written anew."""
        if not self.readonly:
            self._remove(holes)

    def _remove(self, values: Mapping[Name, _Value]) -> None:
        """Remove objects, or what is left of them: what names them first."""
        commands: list[Command] = []
        for name, value in values.items():
            self._known.pop(name, None)
            commands.append(("HDEL", self._index(name.parent), _field(name)))
            commands.append(("HDEL", self._used(name.parent), _field(name)))
            commands.append(("UNLINK", *self._pieces(name, value)))
        self._server.ask(commands)

    def _left(self, parents: Sequence[bytes]) -> list[int]:
        """Return the seconds that the indexes of some parents live."""
        return self._server.ask([("TTL", self._index(parent)) for parent in parents])

    def _lifetime(self, left: int) -> int:
        """Return the seconds that an object is to live, beside an index that lives for *left*."""
        return max(self._ttl, left) if self._ttl else 0

    # -- looking at the server

    def advise(self) -> list[Advice]:
        """See :class:`~.remote.Engine`."""
        return advice(self._server, ttl=self._ttl)

    # -- keys and values

    def _index(self, parent: bytes) -> str:
        return f"{self._prefix}:{{{parent.hex()}}}:i"

    def _used(self, parent: bytes) -> str:
        return f"{self._prefix}:{{{parent.hex()}}}:u"

    def _key(self, name: Name, value: _Value, n: int) -> str:
        return f"{self._prefix}:{{{name.parent.hex()}}}:{_field(name)}:{value.stamp.hex()}:{n}"

    def _pieces(self, name: Name, value: _Value) -> list[str]:
        return [self._key(name, value, n) for n in range(value.n_pieces)]

    def _parent(self, key: bytes) -> bytes | None:
        """Return the parent whose index is at *key*; None for the keys of others."""
        text = key.decode(errors="replace")
        with suppress(ValueError):
            return bytes.fromhex(text[len(self._prefix) + 2 : -3])
        return None

    def _looked_up(self, names: Iterable[Name], *, fresh: bool = False) -> dict[Name, _Value]:
        """Return what the index says of objects, without those that it does not have."""
        names = list(names)
        asked = [name for name in names if fresh or name not in self._known]
        found = {name: value for name in names if (value := self._known.get(name))}
        commands: list[Command] = [("HGET", self._index(n.parent), _field(n)) for n in asked]
        for name, data in zip(asked, self._server.ask(commands), strict=True):
            found.pop(name, None)
            self._known.pop(name, None)
            if data is not None and (value := _parsed(data)):
                found[name] = value
                self._know(name, value)
        return {name: found[name] for name in names if name in found}

    def _values(self, parent: bytes, index: Mapping[bytes, bytes]) -> Iterator[tuple[Name, _Value]]:
        for field, data in index.items():
            name = name_of(f"{parent.hex()}-{field.decode(errors='replace')}")
            value = _parsed(data)
            if name is not None and value is not None:
                self._know(name, value)
                yield name, value

    def _know(self, name: Name, value: _Value) -> None:
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[name] = value


def _field(name: Name) -> str:
    return text_of(name).partition("-")[2]


def _parsed(data: bytes) -> _Value | None:
    """Return what an index says; None for what another version wrote."""
    try:
        version, piece, nbytes, stamp, written = _VALUE.unpack(data)
    except StructError:
        return None
    if version != _VERSION or piece not in _PIECES:
        return None
    return _Value(nbytes, piece, stamp, written)


def _cut(parts: Sequence[memoryview], size: int) -> Iterator[list[memoryview]]:
    """Yield pieces of *size* bytes, each as views of the parts; one that is empty for nothing."""
    views: list[memoryview] = []
    room = size
    for part in parts:
        at = 0
        while at < len(part):
            views.append(part[at : at + room])
            at += len(views[-1])
            room -= len(views[-1])
            if not room:
                yield views
                views, room = [], size
    if views or not any(map(len, parts)):
        yield views
