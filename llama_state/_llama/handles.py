"""Pointers of llama.cpp that are owned or borrowed, locked, and freed once.

:meth:`Handle.use` is the one gate to C: inside it the pointer is alive, no other thread is in a
call on it, and what llama.cpp logs is collected.
"""

from __future__ import annotations

import atexit
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ClosedError
from ._llama_cffi import ffi, lib
from .library import Library


class LastLogits(NamedTuple):
    """The logits that can be sampled from.

    Attributes:
        seq_id: The sequence of the token that they follow.
        n_past: Positions that the sequence had then.
        row: float32 values that were kept; None where llama.cpp has them.
    """

    seq_id: int
    n_past: int
    row: memoryview[float] | None = None


class Shared:
    """What all handles of one pointer have in common.

    Attributes:
        freed: The pointer is dangling.
        lock: Held during every call.
        on_device: Sequence id -> the snapshot whose data llama.cpp keeps on the device.
        last_logits: Whose logits are there; None where the last call that changed the memory
            was no decode of ours: llama.cpp itself goes on giving the logits of before.
    """

    __slots__ = ("__weakref__", "freed", "last_logits", "lock", "on_device")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.freed = False
        self.on_device: dict[int, object] = {}
        self.last_logits: LastLogits | None = None


# One for each context, however many handles it has: (library, address) -> what they share.
_shared: weakref.WeakValueDictionary[tuple[int, int], Shared] = weakref.WeakValueDictionary()
_shared_guard = threading.Lock()


if TYPE_CHECKING:
    from typing_extensions import Self

# Seconds that a call in a daemon thread may go on at the interpreter's exit.
_PATIENCE = 5.0
_exiting = threading.Event()


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
    """A C object that lives as long as something refers to this, and is freed exactly once.

    Args:
        ptr: The pointer.
        free: The C wrapper that frees it, or None for one that belongs to another binding.
        shared: What its handles share; marked when the pointer is freed.
        keep: What must outlive it: a context keeps its model's resource, a borrowed
            context the object that owns it.
    """

    __slots__ = ("__weakref__", "_finalizer", "ptr")

    def __init__(
        self,
        api: Any,
        ptr: Any,
        free: Callable[[Any, Any], None] | None,
        shared: Shared,
        keep: object,
    ) -> None:
        self.ptr = ptr
        self._finalizer = weakref.finalize(self, _free, free, api, ptr, shared, keep)
        _watch_exit()

    def abandon(self) -> None:
        """Never free it: something that could not be freed still needs it."""
        self._finalizer.detach()


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
        raise TypeError(f"a {self._what} lives in its process and cannot be pickled")

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
            if self.shared.freed:  # by its owner, or by the interpreter's exit
                raise ClosedError(f"the {self._what} was closed")
            with self.library.log.capture():
                yield Call(self.library.api, resource.ptr, self.library.log.lines)

    def close(self) -> None:
        """Let go of the pointer once no call runs on it. Safe to call again."""
        with self.shared.lock:
            self._resource = None


class Owner:
    """A context manager around a handle: what a Model and a Context have in common."""

    _handle: Handle

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it once no call runs on it. Safe to call again.

        A context is freed with its last handle, an attached one never. A model that is closed
        before its contexts is freed after the last of them.
        """
        self._handle.close()


def model_handle(library: Library, ptr: Any) -> Handle:
    """Return a handle that owns the model at *ptr*; its contexts keep the model alive."""
    shared = Shared()
    resource = Resource(library.api, ptr, lib.llama_model_free, shared, None)
    return Handle(library, resource, shared, "model")


def context_handle(library: Library, ptr: Any, *, owned: bool, keep: object) -> Handle:
    """Return a handle of the context at *ptr*; only an *owned* one is freed."""
    key = (id(library), int(ffi.cast("uintptr_t", ptr)))
    with _shared_guard:
        shared = _shared.get(key)
        # The address of one that was freed is used again.
        if shared is None or shared.freed or owned:
            shared = _shared[key] = Shared()
    free = lib.llama_free if owned else None
    return Handle(library, Resource(library.api, ptr, free, shared, keep), shared, "context")


def _free(
    free: Callable[[Any, Any], None] | None, api: Any, ptr: Any, shared: Shared, keep: object
) -> None:
    if free is None:
        return
    # Only at exit can a call still run, in a daemon thread. It gets some time to end; then the
    # process ends without us, and what the call needs stays.
    if shared.lock.acquire(timeout=_PATIENCE):
        shared.freed = True
        free(api, ptr)
        if not _exiting.is_set():
            shared.lock.release()  # at exit daemon threads wait here rather than fail
    elif isinstance(keep, Resource):
        keep.abandon()


@functools.cache
def _watch_exit() -> None:
    # Registered after weakref's own function, and so called before it.
    atexit.register(_exiting.set)
