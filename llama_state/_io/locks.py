"""A lock that nothing leaves taken: no signal, and no fork."""

from __future__ import annotations

import weakref
from _thread import RLock
from typing import Final

from .platform.processes import in_each_child


class Lock(RLock):  # type: ignore[misc]  # typeshed says that it is final; it is not
    """A lock for ``with``, which its thread can take again: the collector can call in any line.

    Where a signal handler raises (Ctrl-C), wherever that is, the lock is free after the block.
    That of ``threading`` stays taken where it is between ``__enter__`` and the block: Python 3.14
    looks for signals behind that call, if it is one of C. In a process made by fork it is free,
    unless the thread that forked had it.
    """

    __slots__ = ()

    def __init__(self) -> None:
        _ALL.add(self)

    # A function of Python: no signal is looked for between its return and the block. __exit__
    # stays that of C, which releases before anything looks for one.
    def __enter__(self) -> bool:  # type: ignore[override]  # typeshed: an alias of acquire
        try:
            return self.acquire()
        except BaseException:
            try:  # noqa: SIM105 - a signal could come before suppress()
                self.release()
            except RuntimeError:
                pass  # the signal came while it waited
            raise


_ALL: Final[weakref.WeakSet[Lock]] = weakref.WeakSet()


def _renew() -> None:
    for each in _ALL:
        if not each._is_owned():  # type: ignore[attr-defined]
            each._at_fork_reinit()  # type: ignore[attr-defined]


in_each_child(_renew)
