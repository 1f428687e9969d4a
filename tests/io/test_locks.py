"""A lock is free after its block, wherever a signal came, and in a forked process."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType

import pytest

from llama_state._io.locks import Lock
from tests.interruptions import Interruption

ROUNDS = 50

posix = pytest.mark.skipif(os.name != "posix", reason="no signals of threads, and no fork")


@pytest.fixture
def interruptions() -> Iterator[None]:
    """A signal whose handler raises, and threads that go on until they wait."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interruption

    handler, interval = signal.signal(signal.SIGUSR1, end), sys.getswitchinterval()
    sys.setswitchinterval(10)
    yield
    sys.setswitchinterval(interval)
    signal.signal(signal.SIGUSR1, handler)


def is_free(lock: Lock, wait: float = 5) -> bool:
    """Whether another thread can take it."""
    found: list[bool] = []

    def look() -> None:
        found.append(lock.acquire(timeout=wait))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


@posix
@pytest.mark.usefixtures("interruptions")
@pytest.mark.parametrize("released_first", [True, False])
def test_a_signal_while_it_is_taken(released_first: bool) -> None:
    """In a thread that waits for it: just after it has got it, or just before."""
    lock, main = Lock(), threading.get_ident()
    for _ in range(ROUNDS):
        held, waits = threading.Event(), threading.Event()

        def give_it(held: threading.Event, waits: threading.Event) -> None:
            with lock:
                held.set()
                waits.wait(0.01)  # the other one waits for the lock by then
                if not released_first:
                    signal.pthread_kill(main, signal.SIGUSR1)
            if released_first:  # nothing in between: this thread goes on until it waits
                signal.pthread_kill(main, signal.SIGUSR1)

        thread = threading.Thread(target=give_it, args=(held, waits))
        thread.start()
        held.wait()
        with pytest.raises(Interruption), lock:
            waits.wait(5)
        thread.join()
        assert is_free(lock)


@posix
@pytest.mark.usefixtures("interruptions")
def test_a_signal_in_its_block() -> None:
    lock = Lock()
    with pytest.raises(Interruption), lock, lock:
        signal.raise_signal(signal.SIGUSR1)
    assert is_free(lock)


def test_it_is_taken_again_by_its_thread() -> None:
    lock = Lock()
    with lock:
        with lock, suppress(ZeroDivisionError), lock:
            raise ZeroDivisionError
        assert not is_free(lock, 0.01)
    assert is_free(lock)


@posix
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork where there are threads
def test_a_fork() -> None:
    """What another thread had is free in the child; what its own thread had is not yet."""
    others, own = Lock(), Lock()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with others:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with own:
        if (child := os.fork()) == 0:
            code = 1
            with suppress(BaseException):
                code = 0 if others.acquire(timeout=5) and not is_free(own, 0.01) else 3
    if child == 0:
        os._exit(code if is_free(own) else 2)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
