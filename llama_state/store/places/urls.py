"""The places that a store can be opened at, by path or URL."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, get_args
from urllib.parse import SplitResult, parse_qs, urlencode, urlsplit, urlunsplit

from ..._io.platform.files import path_of_url
from .backend import Admission, Backend, Place, Writing
from .folder import FolderBackend, is_store
from .guard import DEADLINE_SECONDS, Guard
from .memory import MemoryBackend
from .remote import Engine, RemoteBackend

if TYPE_CHECKING:
    from ..._io import StrPath

_NO_LIMIT: Final = (1 << 63) - 1
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
# Scheme -> the module that speaks with such servers; its package is imported when it is needed.
_SERVERS: Final = {
    **dict.fromkeys(("redis", "rediss", "valkey", "valkeys", "unix"), "redis"),
    **dict.fromkeys(("s3", "gs", "az"), "buckets"),
}
_SECONDS: Final = {"ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h|d)?")
_URL = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # one letter is a drive


Where: TypeAlias = "StrPath | Backend | Place"
"""A path, a URL, or a back end that is open."""


def open_place(
    where: StrPath, capacity_bytes: int | None, *, durable: bool, readonly: bool
) -> Backend:
    """Open a place.

    Args:
        where: A folder, ``"file:///dir?size=50GiB"``, ``"memory:?size=2GiB"``, or the URL of a
            server: ``"redis://host"``, ``"s3://bucket/prefix"``.
        capacity_bytes: The most that it may take; None where *where* says it. A server has a
            limit of its own.

    Raises:
        ValueError: *where* is no place that is known, or has no capacity.
        UnsupportedError: The package that speaks with such a server is not installed.
        OSError: The folder cannot be made, or not be used.
    """
    text = os.fspath(where)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if not _URL.match(text):
        capacity = 0 if readonly else _capacity(text, {}, capacity_bytes)
        return FolderBackend(Path(text), capacity, durable=durable, readonly=readonly)
    parts = urlsplit(text)
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if parts.scheme in _SERVERS:
        return _open_server(parts, options, capacity_bytes, readonly=readonly)
    if unknown := set(options) - {"size"}:
        raise ValueError(f"{text}: option {min(unknown)!r} is not known: size= is")
    if parts.scheme == "memory":
        return MemoryBackend(_capacity(text, options, capacity_bytes))
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        known = "a folder, file:///dir, memory:, " + ", ".join(f"{each}://" for each in _SERVERS)
        raise ValueError(f"{text} is no place for a store: {known}")
    capacity = 0 if readonly else _capacity(text, options, capacity_bytes)
    folder = path_of_url(parts.path)
    return FolderBackend(folder, capacity, durable=durable, readonly=readonly)


def _open_server(
    parts: SplitResult, options: dict[str, str], capacity_bytes: int | None, *, readonly: bool
) -> Backend:
    """Open a place on a server, with the module that knows its kind.

    Raises:
        ValueError: An option is not known, or a capacity is given.
    """
    if capacity_bytes is not None or "size" in options:
        raise ValueError(
            f"{parts.scheme}: takes no capacity: the server has its own limit, and"
            " 'llama-state store evict' takes away from it"
        )
    deadline = deadline_of(options)
    module = import_module(f".{_SERVERS[parts.scheme]}", __package__)
    engine: Engine = module.open_engine(parts, options)
    return Guard(RemoteBackend(engine, _NO_LIMIT, readonly=readonly), deadline)


def open_places(
    where: Where | Sequence[Where], capacity_bytes: int | None, *, durable: bool, readonly: bool
) -> list[Place]:
    """Open several places; see :func:`open_place`.

    Raises:
        TypeError: One is none.
        ValueError: There is none, one is named twice, or *capacity_bytes* is given for several.
    """
    if isinstance(where, (str, os.PathLike, Backend, Place)):
        where = [where]
    if not where:
        raise ValueError("where is an empty list: name a place")
    for number, each in enumerate(where):
        if not isinstance(each, (str, os.PathLike, Backend, Place)):
            raise TypeError(f"where[{number}] must be a path, a URL or a Backend, not {each!r}")
        if isinstance(each, os.PathLike) and not isinstance(os.fspath(each), str):
            raise TypeError(f"where[{number}] must be a path as str, not {each!r}")
    if capacity_bytes is not None and len(where) > 1:
        raise ValueError(
            f"capacity_bytes is for one place, where names {len(where)}: give each its own, as"
            " size= in its URL"
        )
    found = [_open_for(each, capacity_bytes, durable=durable, readonly=readonly) for each in where]
    locations = [place.backend.location for place in found]
    for location in locations:
        if locations.count(location) > 1:
            raise ValueError(f"where names {location} twice")
    if found[0].write == "behind" or found[0].admit == "second":
        raise ValueError(
            f"{locations[0]} is the nearest place: write=behind and admit=second need one that is"
            " nearer, and holds what is to be written; or remember(wait=False)"
        )
    return found


def _open_for(where: Where, capacity_bytes: int | None, *, durable: bool, readonly: bool) -> Place:
    """Open a place, with what its URL says of when it is written to."""
    if isinstance(where, Place):
        return where
    if isinstance(where, Backend):
        guarded = where.remote and not isinstance(where, Guard)
        return Place(Guard(where) if guarded else where)
    text = os.fsdecode(os.fspath(where))
    write: Writing = "through"
    admit: Admission = "always"
    if len(text) >= 3 and _URL.match(text):
        parts = urlsplit(text)
        query = parse_qs(parts.query, keep_blank_values=True)
        write = _one_of(text, "write", query.pop("write", ["through"]), get_args(Writing))
        admit = _one_of(text, "admit", query.pop("admit", ["always"]), get_args(Admission))
        if "write=" in parts.query or "admit=" in parts.query:
            where = urlunsplit(parts._replace(query=urlencode(query, doseq=True)))
    readonly |= write == "never"
    place = open_place(where, capacity_bytes, durable=durable, readonly=readonly)
    return Place(place, write, admit)


def _one_of(url: str, name: str, values: Sequence[str], known: Sequence[str]) -> Any:
    if values[-1] not in known:
        raise ValueError(f"{url}: {name}= is one of {', '.join(known)}")
    return values[-1]


def open_existing(where: StrPath, *, readonly: bool) -> Backend:
    """Open a place that there is, with no limit of its own: to look at it, or to take away from it.

    Raises:
        ValueError: *where* is no place that outlives the process.
        OSError: There is none, or it cannot be used.
    """
    if _is_server(where):
        return open_place(where, None, durable=False, readonly=readonly)
    found = open_place(where, _NO_LIMIT, durable=False, readonly=True)
    if isinstance(found, MemoryBackend):
        raise ValueError(f"{found.location} is of one process: give a folder")
    if not is_store(Path(found.location)):
        raise FileNotFoundError(errno.ENOENT, "no prefix store is in this folder", found.location)
    if readonly:
        return found
    return open_place(where, _NO_LIMIT, durable=False, readonly=False)


def _is_server(where: StrPath) -> bool:
    return urlsplit(os.fsdecode(os.fspath(where))).scheme in _SERVERS


def _capacity(where: str, options: dict[str, str], given: int | None) -> int:
    if given is None and "size" not in options:
        raise ValueError(f"{where} needs a capacity: capacity_bytes=, or size= in the URL")
    capacity = size_of(options["size"]) if given is None else given
    if capacity < 1:
        raise ValueError(f"a capacity of {capacity} bytes: it must be 1 or more")
    return capacity


def size_of(text: str) -> int:
    """Return the bytes that a size like "50GiB", "1.5 GB" or "4096" means.

    Raises:
        ValueError: It is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: say 50GiB, 1.5GB or a number of bytes")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (_BINARY | _UNITS)[unit])


def deadline_of(options: Mapping[str, str]) -> float:
    """Return the seconds that a server may cost a call, as its URL says, or those of all others.

    Raises:
        ValueError: It is no time.
    """
    return seconds_of(options.get("deadline", str(DEADLINE_SECONDS)))


def seconds_of(text: str) -> float:
    """Return the seconds that a time like "5", "0.5s", "20ms", "30min", "12h" or "7d" means.

    Raises:
        ValueError: It is no time.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no time: say 20ms, 5s, 30min, 12h or 7d")
    return float(match[1]) * _SECONDS[match[2] or "s"]
