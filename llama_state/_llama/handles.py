"""Handles of models and contexts, and the C objects behind them.

:meth:`Handle.use` is the one gate to C: inside it the object is alive and of this process, no
other thread is in a call on it, and what llama.cpp logs is collected.

An object is freed once, by the end of its owner. Where a call runs on it then, in this or another
thread, the end of the last call frees it: nobody waits, least of all the garbage collector.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

from .._io.forks import check_process
from .._io.locks import Lock
from ..errors import ClosedError
from ._llama_cffi import ffi, lib
from .library import Library

# Seconds that a call in a daemon thread may go on at the interpreter's exit.
_PATIENCE = 5.0
_exiting = threading.Event()
_guard = Lock()


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


class Pointer:
    """The address of a C object, and what all handles of it have in common.

    Args:
        library: The library that made it.
        ptr: The address.
        free: The C wrapper that frees it, or None for one that belongs to another binding.
        of: What must outlive it: the model of a context.

    Attributes:
        pid: The process that made it.
        freed: It is dangling.
        lock: Held during every call.
        on_device: Sequence id -> the snapshot whose data llama.cpp keeps on the device.
        last_logits: Whose logits are there; None where the last call that changed the memory
            was no decode of ours: llama.cpp itself goes on giving the logits of before.
        owner: What a borrowed one belongs to; None where that cannot be told.
    """

    def __init__(
        self,
        library: Library,
        ptr: Any,
        free: Callable[[Any, Any], None] | None = None,
        of: Pointer | None = None,
    ) -> None:
        self.library = library
        self.ptr = ptr
        self.pid: int = os.getpid()
        self.lock: Lock = Lock()
        self.freed: bool = False
        self.on_device: dict[int, object] = {}
        self.last_logits: LastLogits | None = None
        self.owner: weakref.ref[Any] | None = None
        self._free = free
        self._of = of
        self._doomed = False
        self._calls = 0  # that are open, nested ones too; changed under the lock
        self._dependents: set[Pointer] = set()  # that must be freed first
        if of is not None:
            of._dependents.add(self)

    @property
    def owned(self) -> bool:
        """Whether it is ours to free."""
        return self._free is not None

    @property
    def gone(self) -> bool:
        """Whether a call on it is a ClosedError."""
        return self.freed or (self._doomed and not self._calls)

    @property
    def forked(self) -> bool:
        """Whether it was made by the process that this one was forked from."""
        return os.getpid() != self.pid

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads out for the length of a block, and free it then if it is time."""
        try:
            with self.lock:
                yield
        finally:
            if self._doomed:
                self._release()

    @contextmanager
    def open(self, what: str) -> Iterator[None]:
        """Keep it alive for the length of a block, with no other thread in a call on it.

        Args:
            what: What to call it in an error.

        Raises:
            ClosedError: It was freed, or will be as soon as the last call has ended.
            UnsupportedError: Another process made it.
        """
        check_process(self.pid, what)
        with self.locked():
            if self.gone:
                raise ClosedError(f"the {what} was closed")
            calls = self._calls
            try:
                self._calls = calls + 1
                yield
            finally:
                self._calls = calls  # right wherever the block was interrupted

    def doom(self) -> None:
        """Free it, now or by the end of the last call on it, unless it is another process's."""
        if self.forked:
            return
        if not _exiting.is_set():
            self._doomed = True
            self._release()
        # A daemon thread in a call is not waited for long: the process ends without us then, and
        # what the call needs stays. The lock is kept: daemon threads wait rather than fail.
        elif self.lock.acquire(timeout=_PATIENCE):
            self._doomed = True
            if self._idle():
                self._free_now()

    def _idle(self) -> bool:
        return not (self.freed or self._calls or self._dependents)

    def _release(self) -> None:
        # Who finds the lock taken can leave: whoever has it looks again after it.
        while self._idle():
            try:
                if not self.lock.acquire(blocking=False):
                    return
                if self._idle():
                    self._free_now()
            finally:
                try:  # noqa: SIM105 - a signal could come before suppress()
                    self.lock.release()
                except RuntimeError:
                    pass  # it was not taken

    def _free_now(self) -> None:
        try:
            self.freed = True
        finally:
            try:
                if self._free is not None:
                    self._free(self.library.api, self.ptr)
            finally:
                if self._of is not None:
                    self._of._dependents.discard(self)
        _owned.pop(self, None)
        if self._of is not None and self._of._doomed:
            self._of._release()


class Resource:
    """Keeps a pointer alive as long as something refers to this.

    Args:
        pointer: The pointer.
        owned: It is freed after this.
        keep: What a borrowed pointer belongs to.
    """

    __slots__ = ("__weakref__", "_keep", "pointer")

    def __init__(self, pointer: Pointer, *, owned: bool, keep: object = None) -> None:
        self.pointer: Pointer = pointer
        self._keep = keep
        if owned:
            _free_forgotten()
            _owned[pointer] = weakref.ref(self)
            weakref.finalize(self, pointer.doom)
            _watch_exit()


# What is ours to free, and what keeps it alive. Python drops what a signal raises in a finalizer:
# what it has not freed then is found here.
_owned: dict[Pointer, weakref.ref[Resource]] = {}


def _free_forgotten() -> None:
    """Free what nothing keeps alive any more and an interrupted finalizer did not free."""
    for pointer, resource in list(_owned.items()):
        if pointer.freed:
            _owned.pop(pointer, None)
        elif resource() is None and not _exiting.is_set():
            pointer.doom()


# One for each context, however many handles it has: (library, address) -> its pointer.
_contexts: weakref.WeakValueDictionary[tuple[int, int], Pointer] = weakref.WeakValueDictionary()


def owned_context(library: Library, ptr: Any, model: Pointer) -> Resource:
    """Return what keeps a context alive that was made of *model*, and keeps the model alive."""
    pointer = Pointer(library, ptr, lib.llama_free, model)
    with _guard:
        _contexts[_key(library, ptr)] = pointer
    return Resource(pointer, owned=True)


def borrowed_context(library: Library, ptr: Any, owner: object, *, keep: bool = True) -> Resource:
    """Return what keeps a context alive that is another binding's, or has an owner already.

    Args:
        library: The library that made it.
        ptr: Its address.
        owner: What it belongs to. Only the same object is known to be the same context: others
            may have been made at the address of one that was freed.
        keep: Keep the owner alive, too.
    """
    key = _key(library, ptr)
    with _guard:
        pointer = _contexts.get(key)
        if pointer is None or pointer.freed:
            pointer = _contexts[key] = Pointer(library, ptr)
            pointer.owner = _weak(owner)
        elif not (pointer.owned or (pointer.owner is not None and pointer.owner() is owner)):
            pointer.last_logits = None
            pointer.on_device = {}
            pointer.owner = _weak(owner)
    return Resource(pointer, owned=False, keep=owner if keep else None)


def _key(library: Library, ptr: Any) -> tuple[int, int]:
    return id(library), int(ffi.cast("uintptr_t", ptr))


def _weak(owner: object) -> weakref.ref[Any] | None:
    try:
        return weakref.ref(owner)
    except TypeError:  # a number
        return None


class Call:
    """What a block under :meth:`Handle.use` works with.

    Attributes:
        api: The library's function table, first argument of every C wrapper.
        ptr: The pointer.
        log: Takes what llama.cpp has logged in this block so far.
    """

    def __init__(self, api: Any, ptr: Any, log: Callable[[], tuple[str, ...]]) -> None:
        self.api = api
        self.ptr = ptr
        self.log = log


class Handle:
    """A pointer of one library.

    Args:
        resource: What keeps it alive.
        what: What to call it in an error.
    """

    def __init__(self, resource: Resource, what: str) -> None:
        self.pointer: Pointer = resource.pointer
        self.library: Library = resource.pointer.library
        self._resource: Resource | None = resource
        self._what = what

    def __reduce__(self) -> Any:
        raise TypeError(f"a {self._what} lives in its process: it cannot be copied or pickled")

    @property
    def address(self) -> Any:
        """The pointer, to be shown and not to be used.

        Raises:
            ClosedError: It was closed.
        """
        if self.closed:
            raise ClosedError(f"the {self._what} was closed")
        return self.pointer.ptr

    @property
    def closed(self) -> bool:
        """Whether :meth:`use` is a ClosedError."""
        return self._resource is None or self.pointer.gone

    @property
    def usable(self) -> bool:
        """Whether :meth:`use` is no error."""
        return not (self.closed or self.pointer.forked)

    @contextmanager
    def use(self) -> Iterator[Call]:
        """Keep the pointer alive, lock it and collect the log for the length of the block.

        Raises:
            ClosedError: It was closed.
            UnsupportedError: It was made by the process that this one was forked from.
        """
        with self.pointer.open(self._what), self.library.log.capture():
            resource = self._resource  # kept alive, also where the block closes this
            if resource is None:
                raise ClosedError(f"the {self._what} was closed")
            yield Call(self.library.api, self.pointer.ptr, self.library.log.lines)

    def close(self) -> None:
        """Let go of the pointer once no call runs on it. Safe to call again."""
        if self.pointer.forked:  # a lock that was held at the fork is never released here
            self._resource = None
        else:
            with self.pointer.locked():
                self._resource = None
            _free_forgotten()


class Owner:
    """A context manager around a handle: what a Model and a Context have in common."""

    _handle: Handle

    def __reduce__(self) -> Any:
        # copy.copy() asks this too: of two owners of one handle the first to close closes both.
        return self._handle.__reduce__()

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
        before its contexts is freed after the last of them. One that is closed in the middle of
        a call, by its *progress*, is freed by the end of the call.
        """
        self._handle.close()


@functools.cache
def _watch_exit() -> None:
    # Registered after weakref's own function, and so called before it.
    atexit.register(_exiting.set)
