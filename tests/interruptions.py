"""Ends a call by an exception at every place where one can end it.

A place is a line, or the return of a call, in a function of this library or of ``contextlib``
under it, together with the lines that led there. :func:`places` finds those of a call, and
:func:`interrupted` makes the call again and raises at one.

Left out is what no signal can end: CPython looks for signals where a function begins, where a
loop goes back and after a call, so neither between ``__enter__`` and the block of a ``with``, nor
between the block and ``__exit__`` or ``finally``, nor where a generator yields, nor between an
exception and the block that handles it. Python 3.14 looks behind an ``__enter__`` of C, too, of
which no trace tells: :func:`at_signals` finds it, and ``tests/io/test_locks.py``.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import Context, copy_context
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import llama_state
from llama_state._io.locks import _ALL, Lock

_PACKAGE = str(Path(llama_state.__file__).parent) + os.sep
# Python itself reports and drops what a finalizer raises.
_FINALIZERS = ("__del__", "doom", "finalize")
_LOAD_CONST = dis.opmap["LOAD_CONST"]


_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
STRIDE = {"quick": 23, "ci": 5, "whole": 5, "soak": 1}[_PROFILE]
"""Of how many places one is tried."""
SIGNALS = {"quick": 5, "ci": 30, "whole": 30, "soak": 700}[_PROFILE]
"""Signals over one call."""


class Interruption(KeyboardInterrupt):
    """What is raised."""


class Place(NamedTuple):
    """Where a call can end.

    Attributes:
        event: "line" or "return".
        stack: (function, line) of the frames of this library, the innermost last.
    """

    event: str
    stack: tuple[tuple[str, int], ...]


def places(call: Callable[[], object]) -> list[Place]:
    """Make a call and return the places that it went by, each once."""
    seen: dict[Place, None] = {}
    _traced(call, lambda place: bool(seen.setdefault(place)))
    return list(seen)


def interrupted(call: Callable[[], object], at: Place) -> BaseException | None:
    """Make a call, raise an :class:`Interruption` at a place, and return what came out of it."""
    pending = [at]

    def reached(place: Place) -> bool:
        return place in pending and not pending.clear()

    try:
        _traced(call, reached)
    except BaseException as error:
        if pending:
            raise
        return error
    return None


def at_places(
    name: str, call: Callable[[], object], fresh: Callable[[], object]
) -> Iterator[tuple[Place, str]]:
    """End a call at one of every :data:`STRIDE` places, from the same state each time.

    Args:
        name: The call's, which says where to begin.
        call: The call.
        fresh: Brings that state back.

    Yields:
        The place, and what was said, after the call ended there and left nothing open.
    """
    fresh()
    found = places(call)
    fresh()
    opened, settings = open_files(), copy_context()
    for place in found[sum(map(ord, name)) % STRIDE :: STRIDE]:
        fresh()
        said = said_of(interrupted(call, place))
        left = left_open(opened)
        assert not left, (place, left)
        assert not left_taken(), place
        assert not left_set(settings), place
        yield place, said


def at_signals(
    call: Callable[[], object], fresh: Callable[[], object]
) -> Iterator[tuple[Place, str]]:
    """End a call by :data:`SIGNALS` signals that are swept over it; yields as :func:`at_places`."""
    fresh()
    start = time.perf_counter()
    call()
    took, settings = time.perf_counter() - start, copy_context()
    for i in range(SIGNALS):
        fresh()
        said = said_of(signalled(call, took * (i + 1) / SIGNALS))
        assert not left_taken(), i
        assert not left_set(settings), i
        yield Place(f"signal {i}", ()), said


def signalled(call: Callable[[], object], after: float) -> BaseException | None:
    """Make a call in the main thread and end it by a signal, *after* so many seconds.

    Returns:
        What came out of the call; None where the signal came too late.
    """

    armed = [True]

    def end(number: int, frame: FrameType | None) -> None:
        if armed:  # one that comes after the call would end the test
            raise Interruption

    handler = signal.signal(signal.SIGALRM, end)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        call()
        armed.clear()
    except BaseException as error:
        armed.clear()
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        _release_loggings()
    return None


def _release_loggings() -> None:
    """Release the locks of ``logging``, which Python 3.14 can leave taken for ever."""
    handlers = [ref() for ref in logging._handlerList]  # type: ignore[attr-defined]
    for lock in [logging._lock, *(each.lock for each in handlers if each)]:  # type: ignore[attr-defined]
        while lock is not None and lock._is_owned():
            lock.release()


def _traced(call: Callable[[], object], reached: Callable[[Place], bool]) -> None:
    """Make a call; raise where *reached* says so."""
    caller = sys._getframe()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not _is_ours(frame):
            return None
        if event in ("line", "return") and _can_end(frame, event):
            stack = _stack(frame, caller)
            if stack and reached(Place(event, stack)):
                sys.settrace(None)
                raise Interruption
        return trace

    before = sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        threading.settrace(before)  # type: ignore[arg-type]


def _is_ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if file == contextlib.__file__:
        return frame.f_back is not None and frame.f_back.f_code.co_filename.startswith(_PACKAGE)
    return file.startswith(_PACKAGE) and frame.f_code.co_name not in _FINALIZERS


def _stack(frame: FrameType | None, caller: FrameType) -> tuple[tuple[str, int], ...]:
    """Return the frames of the library up to *caller*; nothing below a finalizer."""
    found: list[tuple[str, int]] = []
    while frame is not None and frame is not caller:
        if frame.f_code.co_name in _FINALIZERS:
            return ()
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE) or file == contextlib.__file__:
            found.append((frame.f_code.co_qualname, frame.f_lineno))
        frame = frame.f_back
    return tuple(reversed(found))


def _can_end(frame: FrameType, event: str) -> bool:
    code, at = frame.f_code, frame.f_lasti
    if event == "return":
        own_enter = code.co_name == "__enter__" and code.co_filename.startswith(_PACKAGE)
        # Neither where a generator yields, nor where an exception is on its way out.
        return not own_enter and dis.opname[code.co_code[at]].startswith("RETURN_")
    if code.co_filename == contextlib.__file__ and frame.f_lineno not in _lines_that_call(code):
        return False
    # An exception on its way to its handler meets no signal either.
    on_its_way = dis.opname[code.co_code[at]] in ("PUSH_EXC_INFO", "CLEANUP_THROW")
    return not (on_its_way or _leaves_with(code, at) or _leaves_try(code, at))


@functools.cache
def _lines_that_call(code: CodeType) -> set[int]:
    """The lines of a function on which CPython looks for signals."""
    return {
        each.positions.lineno
        for each in dis.get_instructions(code)
        if each.opname.startswith("CALL") and each.positions and each.positions.lineno
    }


def _leaves_with(code: CodeType, at: int) -> bool:
    """Tell whether a line event is that before ``__exit__(None, None, None)``."""
    opcodes = list(code.co_code[at : at + 10 : 2])
    return any(opcodes[i : i + 3] == [_LOAD_CONST] * 3 for i in (0, 1, 2))


def _leaves_try(code: CodeType, at: int) -> bool:
    """Tell whether a line event is that of the first line of ``finally``, or behind a ``try``.

    A signal that comes after the last call of the block is its handlers': they are in force yet.
    """
    before, here = _handler(code, at - 2), _handler(code, at)
    around = [before]  # the handlers around that one, from the inside out
    while around[-1] is not None:
        around.append(_handler(code, around[-1]))
    return here in around[1:]


@functools.cache
def _handler(code: CodeType, at: int) -> int | None:
    """Where an exception of an instruction goes in its function."""
    table = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    return next((each.target for each in table if each.start <= at < each.end), None)


def is_free(ctx: llama_state.Context) -> bool:
    """Whether another thread can use the context."""
    thread = threading.Thread(target=ctx.n_past, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


def left_taken() -> list[Lock]:
    """The locks of the library that this thread has."""
    return [lock for lock in tuple(_ALL) if lock._is_owned()]  # type: ignore[attr-defined]


def left_set(before: Context) -> list[str]:
    """The names of the context variables that are not what they were."""
    return [var.name for var, value in copy_context().items() if value is not before.get(var)]


def left_open(before: Counter[str]) -> Counter[str]:
    """What is open beside *before*, once the garbage is collected.

    Frames of ``contextlib`` and the exceptions that ended them can refer to each other.
    """
    if open_files() - before:
        gc.collect()
    return open_files() - before


def open_files() -> Counter[str]:
    """The files and sockets that this process has open, where the system lists them."""
    found: Counter[str] = Counter()
    if sys.platform != "linux":
        return found
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[str(fd.readlink())] += 1
    return Counter({name: n for name, n in found.items() if not name.startswith("/proc/")})


def said_of(error: BaseException | None) -> str:
    """The texts and the notes of an exception and of those that it came after.

    Nothing refers to the exception then, whose frames hold what they had open.
    """
    found: list[str] = []
    while error is not None:
        found += [str(error), *getattr(error, "__notes__", [])]
        error = error.__context__
    return " ".join(found)
