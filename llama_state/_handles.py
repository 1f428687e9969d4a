"""Pointers of llama.cpp that are owned or borrowed, locked, and freed once.

:meth:`Handle.use` is the one gate to C: inside it the pointer is alive, nobody else is in a call
on it, and what llama.cpp logs is collected.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ._library import Library
from ._llama_cffi import ffi, lib
from .errors import ClosedError


class Shared:
    """What all handles of one context have in common.

    Attributes:
        lock: Held during every call.
        on_device: Sequence id -> the snapshot whose data llama.cpp keeps on the device.
    """

    __slots__ = ("__weakref__", "lock", "on_device")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.on_device: dict[int, object] = {}


# One for each context, however many handles it has: (library, address) -> what they share.
_shared: weakref.WeakValueDictionary[tuple[int, int], Shared] = weakref.WeakValueDictionary()
_shared_guard = threading.Lock()


class Call:
    """What a block under :meth:`Handle.use` works with.

    Attributes:
        api: The library's function table, first argument of every C wrapper.
        ptr: The pointer.
        log: Takes what llama.cpp has logged in this block so far.
    """

    __slots__ = ("api", "log", "ptr")

    def __init__(self, api: Any, ptr: Any, log: Callable[[], tuple[str, ...]]) -> None:
        self.api = api
        self.ptr = ptr
        self.log = log


class Resource:
    """A C object that lives as long as somebody refers to this, and is freed exactly once.

    Args:
        free: The C wrapper that frees it, or None for one that belongs to somebody else.
        keep: What must outlive it: a context keeps its model's resource, a borrowed
            context the object that owns it.
    """

    __slots__ = ("__weakref__", "ptr")

    def __init__(
        self,
        api: Any,
        ptr: Any,
        free: Callable[[Any, Any], None] | None,
        lock: threading.RLock,
        keep: object,
    ) -> None:
        self.ptr = ptr
        weakref.finalize(self, _free, free, api, ptr, lock, keep)


class Handle:
    """A pointer of one library, with a lock.

    Args:
        library: The library that made the pointer.
        resource: What keeps it alive.
        shared: Its lock.
        what: What to call it in an error.
    """

    def __init__(self, library: Library, resource: Resource, shared: Shared, what: str) -> None:
        self.library = library
        self.shared = shared
        self._resource: Resource | None = resource
        self._what = what

    def __reduce__(self) -> Any:
        raise TypeError(f"a {self._what} lives in its process and can not be pickled")

    @property
    def resource(self) -> Resource:
        """What keeps the pointer alive, for those that depend on it.

        Raises:
            ClosedError: It was closed.
        """
        resource = self._resource
        if resource is None:
            raise ClosedError(f"the {self._what} was closed")
        return resource

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._resource is None

    @contextmanager
    def use(self) -> Iterator[Call]:
        """Lock the pointer and collect the log for the length of the block.

        Raises:
            ClosedError: It was closed.
        """
        with self.shared.lock:
            resource = self.resource
            with self.library.log.capture():
                yield Call(self.library.api, resource.ptr, self.library.log.lines)

    def close(self) -> None:
        """Let go of the pointer once no call runs on it. Safe to call again."""
        with self.shared.lock:
            self._resource = None


def model_handle(library: Library, ptr: Any) -> Handle:
    """A handle that owns the model at *ptr*; its contexts keep the model alive."""
    shared = Shared()
    resource = Resource(library.api, ptr, lib.llama_model_free, shared.lock, None)
    return Handle(library, resource, shared, "model")


def context_handle(library: Library, ptr: Any, *, owned: bool, keep: object) -> Handle:
    """A handle of the context at *ptr*; only an *owned* one is freed."""
    key = (id(library), int(ffi.cast("uintptr_t", ptr)))
    with _shared_guard:
        shared = _shared.get(key)
        if shared is None:
            shared = _shared[key] = Shared()
    free = lib.llama_free if owned else None
    return Handle(library, Resource(library.api, ptr, free, shared.lock, keep), shared, "context")


def _free(
    free: Callable[[Any, Any], None] | None,
    api: Any,
    ptr: Any,
    lock: threading.RLock,
    keep: object,
) -> None:
    # At exit a daemon thread may still be inside a call; then the process ends without us.
    if free is not None and lock.acquire(blocking=False):
        try:
            free(api, ptr)
        finally:
            lock.release()
