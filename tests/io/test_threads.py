"""Threads that do what they are asked, whatever ends a call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from llama_state._io import threads
from llama_state._io.threads import Threads


def test_answers() -> None:
    """Each answer is that of what was asked; an error is raised where it is taken."""
    with Threads(2) as pool:
        answers = [pool.ask(lambda n=n: 10 // n) for n in (1, 2, 0, 5)]  # type: ignore[misc]
        assert [answers[n].result() for n in (0, 1, 3)] == [10, 5, 2]
        with pytest.raises(ZeroDivisionError):
            answers[2].result()


def test_nothing_is_done_behind_the_end() -> None:
    """What was begun has ended, and the rest is never done."""
    begun, done = threading.Event(), []

    def slow() -> None:
        begun.set()
        time.sleep(0.1)
        done.append(1)

    with pytest.raises(KeyError), Threads() as pool:
        for _ in range(3):
            pool.ask(slow)
        begun.wait()
        raise KeyError
    assert done == [1]
    time.sleep(0.2)
    assert done == [1]


def test_given_up_twice() -> None:
    """What nobody has taken is given once."""
    with Threads() as pool:
        answer = pool.ask(lambda: 7)
        while not answer.ended:
            time.sleep(threads.POLL_SECONDS)
        assert answer.give_up() == 7
        assert answer.give_up() is None
        late = [pool.ask(lambda: time.sleep(0.05)), pool.ask(lambda: 8)][1]
        assert late.give_up() is None
        assert late.give_up() is None


def test_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none can be started, that is an error of the system."""

    def refuse(act: Callable[[], None], arguments: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "start_new_thread", refuse)
    with Threads() as pool, pytest.raises(OSError, match="can't start"):
        pool.ask(lambda: 1)


def test_one_that_was_never_made() -> None:
    """An interruption can end its making before the first line; what is there goes silently."""
    made = Threads.__new__(Threads)
    del made  # an error in there would be one of pytest
