"""The places that a store can be opened at, by path or URL."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, unquote, urlsplit

from .backend import Backend
from .folder import FolderBackend, is_store
from .memory import MemoryBackend

if TYPE_CHECKING:
    from ..._io import StrPath

_NO_LIMIT: Final = (1 << 63) - 1
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def open_place(
    where: StrPath, capacity_bytes: int | None, *, durable: bool, readonly: bool
) -> Backend:
    """Open a place.

    Args:
        where: A folder, ``"file:///dir?size=50GiB"`` or ``"memory:?size=2GiB"``.
        capacity_bytes: The most that it may take; None where *where* says it.

    Raises:
        ValueError: *where* is no place that is known, or has no capacity.
        OSError: The folder cannot be made, or not be used.
    """
    text = os.fspath(where)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if len(text) < 3 or not _URL.match(text):
        folder, options = Path(text), {}
    else:
        parts = urlsplit(text)
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if unknown := set(options) - {"size"}:
            raise ValueError(f"{text}: option {min(unknown)!r} is not known: size= is")
        if parts.scheme == "memory":
            return MemoryBackend(_capacity(text, options, capacity_bytes))
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise ValueError(f"{text} is no place for a store: a folder, file:///dir or memory:")
        folder = Path(unquote(parts.path))
    capacity = 0 if readonly else _capacity(text, options, capacity_bytes)
    return FolderBackend(folder, capacity, durable=durable, readonly=readonly)


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
