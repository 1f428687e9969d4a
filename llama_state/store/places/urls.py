"""The places that a store can be opened at, by path or URL."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from .backend import Backend
from .folder import FolderBackend, is_store
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
_SECONDS: Final = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|[smhd])?", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


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
    if len(text) < 3 or not _URL.match(text):
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
    folder = Path(unquote(parts.path))
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
    module = import_module(f".{_SERVERS[parts.scheme]}", __package__)
    engine: Engine = module.open_engine(parts, options)
    return RemoteBackend(engine, _NO_LIMIT, readonly=readonly)


def open_places(
    where: Sequence[StrPath], capacity_bytes: int | None, *, durable: bool, readonly: bool
) -> list[Backend]:
    """Open several places; see :func:`open_place`.

    Raises:
        ValueError: There is none, one is named twice, or *capacity_bytes* is given for several.
    """
    if not where:
        raise ValueError("where is an empty list: name a place")
    if capacity_bytes is not None and len(where) > 1:
        raise ValueError(
            f"capacity_bytes is for one place, where names {len(where)}: give each its own, as"
            " size= in its URL"
        )
    found = [open_place(each, capacity_bytes, durable=durable, readonly=readonly) for each in where]
    locations = [place.location for place in found]
    for location in locations:
        if locations.count(location) > 1:
            raise ValueError(f"where names {location} twice")
    return found


def open_existing(where: StrPath, *, readonly: bool) -> Backend:
    """Open a place that there is, with no limit of its own: to look at it, or to take away from it.

    Raises:
        ValueError: *where* is no place that outlives the process.
        OSError: There is none, or it cannot be used.
    """
    found = open_place(where, _NO_LIMIT, durable=False, readonly=True)
    if isinstance(found, MemoryBackend):
        raise ValueError(f"{found.location} is of one process: give a folder")
    if not is_store(Path(found.location)):
        raise FileNotFoundError(errno.ENOENT, "no prefix store is in this folder", found.location)
    if readonly:
        return found
    return open_place(where, _NO_LIMIT, durable=False, readonly=False)


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


def seconds_of(text: str) -> float:
    """Return the seconds that a duration like "7d", "12h", "1.5s", "200ms" or "30" means.

    Raises:
        ValueError: It is no duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no duration: say 7d, 12h, 30m, 1.5s, 200ms or seconds")
    return float(match[1]) * _SECONDS[(match[2] or "").lower()]
