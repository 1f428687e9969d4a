"""Work in threads beside the one that calls, whatever signal ends a call of it.

A signal is handled in the main thread, after any call, also one of Python's own modules. Where an
exception of it ends ``Condition.__enter__`` the lock stays held for ever, and ``Thread.start`` and
the pools of ``concurrent.futures`` then wait for ever. Here all that threads share is changed by
single calls of C.
"""

from __future__ import annotations

import errno
import time
from _thread import start_new_thread
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

T = TypeVar("T")

POLL_SECONDS: Final = 0.001


class Answer(Generic[T]):
    """What a thread was asked to do, and what came of it."""

    def __init__(self, act: Callable[[], T]) -> None:
        self._todo = [act]
        self._woken: SimpleQueue[None] = SimpleQueue()
        self._value: list[T] = []
        self._error: BaseException | None = None
        self.ended = False

    def _begin(self) -> Callable[[], T] | None:
        """Return what is to be done, to one caller only."""
        try:
            return self._todo.pop()
        except IndexError:
            return None

    def run(self) -> None:
        """Do it, unless somebody else does, or it was given up."""
        if (act := self._begin()) is None:
            return
        try:
            self._value.append(act())
        except BaseException as error:
            self._error = error
        finally:
            del act  # and what it holds, before anybody goes on
            self.ended = True
            self._woken.put(None)

    def result(self) -> T:
        """Wait, and return what came of it, once; or raise that."""
        self._woken.get()
        if self._error is not None:
            raise self._error
        return self._value.pop()

    def give_up(self) -> T | None:
        """Let it not be done, or wait until it is; return what nobody has taken."""
        if self._begin() is not None:
            self.ended = True
        while not self.ended:
            time.sleep(POLL_SECONDS)
        return self._value.pop() if self._value else None


class Threads:
    """Threads that do what they are asked, in that order. A context manager.

    At its end nothing is done any more: what was begun has ended.

    Args:
        most: Threads that are started at the most.
    """

    _started = 0  # for __del__, also of one whose making was interrupted

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._asked: SimpleQueue[Answer[Any] | None] = SimpleQueue()
        self._answers: list[Answer[Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for answer in reversed(self._answers):  # the last first: it has not begun
            answer.give_up()

    def __del__(self) -> None:
        for _ in range(self._started):
            self._asked.put(None)

    def ask(self, act: Callable[[], T]) -> Answer[T]:
        """Let a thread act, in the context (contextvars) of the caller.

        Raises:
            OSError: No thread can be started.
        """
        if self._started < self._most:
            try:
                start_new_thread(_work, (self._asked,))
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, str(error)) from error
            self._started += 1
        answer = Answer(partial(copy_context().run, act))
        self._answers.append(answer)
        self._asked.put(answer)
        return answer


def _work(asked: SimpleQueue[Answer[Any] | None]) -> None:
    while (answer := asked.get()) is not None:
        answer.run()
        del answer
