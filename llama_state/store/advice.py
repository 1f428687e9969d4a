"""What there is to say of a place before it is used: can it be written, has it room, is it safe."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from .objects import Name
from .places.backend import Backend
from .places.folder import FolderBackend
from .places.guard import Guard
from .places.remote import Advice, RemoteBackend
from .prompt import KEY_SIZE

_LITTLE: Final = 1 << 30
_SKEW_SECONDS: Final = 60.0


def advise(backend: Backend, *, has_key: bool) -> Iterator[Advice]:
    """Yield what there is to say of a place.

    Args:
        backend: The place, open for writing.
        has_key: Whether the store is used with a key.
    """
    inner = backend.backend if isinstance(backend, Guard) else backend
    try:
        if isinstance(inner, RemoteBackend):
            yield from inner.engine.advise()
        elif isinstance(inner, FolderBackend):
            yield from _folder(Path(inner.location))
        yield from _works(inner)
    except OSError as error:
        yield Advice("error", f"{backend.location}: {error}")
    if backend.remote and not has_key:
        yield Advice(
            "warning",
            "no key: whoever can read the server can tell prompts from its names, and whoever can"
            " write to it can put states into your contexts; give --key-file",
        )


def _works(backend: Backend) -> Iterator[Advice]:
    """Write a small object, read it, and remove it."""
    name = Name(os.urandom(KEY_SIZE), os.urandom(KEY_SIZE), 1, "R")
    began = time.perf_counter()
    if not backend.put(name, [b"llama_state"]):
        yield Advice("error", "it does not take an object: it is full, or only read")
        return
    try:
        with backend.open(name, 11) as view:
            same = bytes(view) == b"llama_state"
        seconds = time.perf_counter() - began
        used = next((each.used for each in backend.entries() if each.name == name), None)
    finally:
        backend.remove(name)
    if not same:
        yield Advice("error", "what was written comes back as other bytes")
        return
    yield Advice("ok", f"an object was written, read and removed; that took {1e3 * seconds:.1f} ms")
    if used is None:
        yield Advice("error", "what was written is not listed")
    elif abs(used - time.time()) > _SKEW_SECONDS:
        yield Advice(
            "warning",
            f"its clock is {abs(used - time.time()):.0f} s off: what was used last may go first",
        )


def _folder(folder: Path) -> Iterator[Advice]:
    info = folder.stat()
    if stat.S_IMODE(info.st_mode) & 0o077:
        yield Advice(
            "warning", f"others can look into {folder}: chmod 700, unless it is shared on purpose"
        )
    free = shutil.disk_usage(folder).free
    level: Literal["ok", "warning"] = "warning" if free < _LITTLE else "ok"
    yield Advice(level, f"{free / (1 << 30):.1f} GiB are free on its disk")
