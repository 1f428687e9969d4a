"""A context, and a prefix store, for asyncio: an event loop that never waits.

The same names as coroutines. :class:`AsyncContext` owns the thread that does the work: one for
each context, so that calls come one after the other, in the order in which they were awaited.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, overload

from ._io import Progress
from ._io.arguments import checked
from .context.context import Context
from .errors import ClosedError
from .store.prefix_store import PrefixStore

if TYPE_CHECKING:
    from ._io import Buffer
    from ._llama.library import Library
    from .store.prompt import Token
    from .store.results import Match, Recalled, Remembered

__all__ = ["AsyncContext", "AsyncPrefixStore"]

P = ParamSpec("P")
R = TypeVar("R")


def _coroutine(
    method: Callable[Concatenate[Context, P], R],
) -> Callable[Concatenate[AsyncContext, P], Coroutine[Any, Any, R]]:
    """Make a coroutine of a method of Context: of the method that the context at hand has."""
    name = method.__name__

    @functools.wraps(method)
    async def call(self: AsyncContext, /, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = await self.run(getattr(self.context, name), *args, **kwargs)
        return result

    call.__doc__ = f"As :meth:`llama_state.Context.{name}`."
    return call


def _stoppable(
    method: Callable[Concatenate[Context, P], R],
) -> Callable[Concatenate[AsyncContext, P], Coroutine[Any, Any, R]]:
    """Make a coroutine of a method that reports progress: where it does, it can be stopped."""
    name = method.__name__

    @functools.wraps(method)
    async def call(self: AsyncContext, /, *args: P.args, **kwargs: P.kwargs) -> R:
        stop = threading.Event()
        kwargs["progress"] = _until(stop, kwargs.get("progress"))  # type: ignore[arg-type]
        work = functools.partial(getattr(self.context, name), *args, **kwargs)
        result: R = await self._finish(work, stop)
        return result

    call.__doc__ = (
        f"As :meth:`llama_state.Context.{name}`; *progress* is called in the context's thread."
    )
    return call


@checked
class AsyncContext:
    """A context whose methods are coroutines, run in a thread of its own.

    Calls of several tasks wait for each other, and never the event loop for them. A task that is
    cancelled leaves everything whole: what has not begun does not begin; a save or a load that
    reads its file stops at the next step of its progress, with the old file in place and the
    context as it was; any other call is waited for, and its effect is there. The
    ``CancelledError`` comes when the context is free again.

    Args:
        context: The context; use it through this only while coroutines run.

    Attributes:
        context: The context.
        library, n_ctx, n_batch, n_seq_max, n_vocab, arch: Those of the context.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.library: Library = context.library
        self.n_ctx: int = context.n_ctx
        self.n_batch: int = context.n_batch
        self.n_seq_max: int = context.n_seq_max
        self.n_vocab: int = context.n_vocab
        self.arch: str = context.arch
        self._worker = ThreadPoolExecutor(1, "llama_state-aio")

    def __repr__(self) -> str:
        return f"<AsyncContext of {self.context!r}>"

    def __reduce__(self) -> Any:
        return self.context.__reduce__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the context once no call runs on it. Safe to call again."""
        # Not behind what waits in the thread: that fails with ClosedError then.
        try:
            await asyncio.to_thread(self.context.close)
        finally:
            self._worker.shutdown(wait=False)

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call any function in the context's thread, such as :meth:`DeviceSnapshot.restore`."""
        return await self._finish(functools.partial(function, *args, **kwargs))

    decode = _coroutine(Context.decode)
    logits = _coroutine(Context.logits)
    n_past = _coroutine(Context.n_past)
    seq_rm = _coroutine(Context.seq_rm)
    seq_cp = _coroutine(Context.seq_cp)
    clear = _coroutine(Context.clear)

    checkpoint = _coroutine(Context.checkpoint)
    resume = _coroutine(Context.resume)

    state_size = _coroutine(Context.state_size)
    restore = _coroutine(Context.restore)
    save_state = _stoppable(Context.save_state)
    load_state = _stoppable(Context.load_state)

    seq_state_size = _coroutine(Context.seq_state_size)
    seq_restore = _coroutine(Context.seq_restore)
    seq_device_snapshot = _coroutine(Context.seq_device_snapshot)
    seq_save_state = _stoppable(Context.seq_save_state)
    seq_load_state = _stoppable(Context.seq_load_state)

    @overload
    async def snapshot(self) -> bytes: ...
    @overload
    async def snapshot(self, out: Buffer) -> memoryview: ...
    async def snapshot(self, out: Buffer | None = None) -> bytes | memoryview:
        """As :meth:`llama_state.Context.snapshot`."""
        if out is None:
            return await self.run(self.context.snapshot)
        return await self.run(self.context.snapshot, out)

    @overload
    async def seq_snapshot(self, seq_id: int = 0, *, partial: bool = False) -> bytes: ...
    @overload
    async def seq_snapshot(
        self, seq_id: int = 0, *, out: Buffer, partial: bool = False
    ) -> memoryview: ...
    async def seq_snapshot(
        self, seq_id: int = 0, out: Buffer | None = None, *, partial: bool = False
    ) -> bytes | memoryview:
        """As :meth:`llama_state.Context.seq_snapshot`."""
        work = functools.partial(self.context.seq_snapshot, seq_id, partial=partial)
        return await self.run(work if out is None else functools.partial(work, out=out))

    @asynccontextmanager
    async def savepoint(self, *seq_ids: int) -> AsyncIterator[None]:
        """As :meth:`llama_state.Context.savepoint`; a block that is cancelled is undone."""
        point = self.context.savepoint(*seq_ids)
        await self.run(point.__enter__)
        try:
            yield
        except GeneratorExit:
            raise  # nobody waits any more, and others may have gone on from there
        except BaseException as error:
            undo = functools.partial(point.__exit__, type(error), error, error.__traceback__)
            with suppress(ClosedError):  # there is nothing left to be undone
                await self._finish(undo, droppable=False)
            raise

    async def _finish(
        self, work: Callable[[], R], stop: threading.Event | None = None, *, droppable: bool = True
    ) -> R:
        """Do *work* in the thread, and leave only when it is over, also when cancelled.

        Args:
            work: What to do.
            stop: Set when the task is cancelled.
            droppable: A task that is cancelled before its turn has come leaves the work undone.
        """
        self.context.library.check_process("context")  # the thread is not in a forked process
        try:
            running = self._worker.submit(work)
        except RuntimeError:
            raise ClosedError("the context was closed") from None
        done = asyncio.wrap_future(running)
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            if stop is not None:
                stop.set()
            # One that waits in the queue is taken out; one that runs cannot be, and ends.
            if droppable:
                running.cancel()
            while not done.done():
                # Cancelled again: it makes no difference.
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([done])
            if not done.cancelled():
                done.exception()  # seen: asyncio need not complain of it
            raise
        return done.result()


@checked
class AsyncPrefixStore:
    """A prefix store whose methods are coroutines, run in the thread of the context given.

    A task that is cancelled leaves everything whole: what has not begun does not begin; a prefill
    stops at the next chunk, and the sequence holds what was decoded until then; any other call is
    waited for, and its effect is there. A context manager.

    Args:
        store: The store. Contexts of several threads can use it at once.
    """

    def __init__(self, store: PrefixStore) -> None:
        self.store = store

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """As :meth:`llama_state.store.PrefixStore.close`."""
        await asyncio.to_thread(self.store.close)

    async def flush(self, timeout: float | None = None) -> bool:
        """As :meth:`llama_state.store.PrefixStore.flush`."""
        return await asyncio.to_thread(self.store.flush, timeout)

    async def find(self, actx: AsyncContext, tokens: Iterable[Token], seq_id: int = 0) -> Match:
        """As :meth:`llama_state.store.PrefixStore.find`."""
        return await _own(actx).run(self.store.find, actx.context, tokens, seq_id)

    async def recall(
        self, actx: AsyncContext, tokens: Iterable[Token], seq_id: int = 0
    ) -> Recalled:
        """As :meth:`llama_state.store.PrefixStore.recall`."""
        return await _own(actx).run(self.store.recall, actx.context, tokens, seq_id)

    async def remember(
        self, actx: AsyncContext, tokens: Iterable[Token], seq_id: int = 0, *, wait: bool = True
    ) -> Remembered:
        """As :meth:`llama_state.store.PrefixStore.remember`."""
        return await _own(actx).run(self.store.remember, actx.context, tokens, seq_id, wait=wait)

    async def prefill(
        self,
        actx: AsyncContext,
        tokens: Iterable[Token],
        seq_id: int = 0,
        *,
        progress: Progress | None = None,
    ) -> Recalled:
        """As :meth:`llama_state.store.PrefixStore.prefill`, chunk by chunk.

        *progress* is called in the context's thread.
        """
        stop = threading.Event()
        work = functools.partial(
            self.store.prefill,
            _own(actx).context,
            tokens,
            seq_id,
            progress=_until(stop, progress),
        )
        return await actx._finish(work, stop)

    async def pin(
        self,
        actx: AsyncContext,
        tokens: Iterable[Token],
        seq_id: int = 0,
        *,
        ttl: float | None = None,
    ) -> int:
        """As :meth:`llama_state.store.PrefixStore.pin`."""
        return await _own(actx).run(self.store.pin, actx.context, tokens, seq_id, ttl=ttl)

    async def forget(self, actx: AsyncContext, tokens: Iterable[Token], seq_id: int = 0) -> int:
        """As :meth:`llama_state.store.PrefixStore.forget`."""
        return await _own(actx).run(self.store.forget, actx.context, tokens, seq_id)


@checked
def _own(actx: AsyncContext) -> AsyncContext:
    """Return *actx*: what is none raises a TypeError."""
    return actx


class _Stopped(Exception):
    """The task that waits for a call was cancelled."""


@checked
def _until(stop: threading.Event, progress: Progress | None) -> Progress:
    """Return a progress that stops the call when *stop* is set."""

    def report(done: int, total: int) -> None:
        if stop.is_set():
            raise _Stopped
        if progress is not None:
            progress(done, total)

    return report
