"""What a process made by fork may use: nothing of llama.cpp, and no lock of its parent.

A fork copies memory and one thread. llama.cpp's worker threads are not in the copy, so a call
waits for them for ever, and a lock that another thread held stays locked.
"""

from __future__ import annotations

import os

from ..errors import UnsupportedError


def check_process(pid: int, what: str) -> None:
    """Refuse what another process made.

    Args:
        pid: The process that made it.
        what: What it is, for the error.

    Raises:
        UnsupportedError: This process is another one.
    """
    here = os.getpid()
    if here != pid:
        raise UnsupportedError(
            f"this {what} was made in process {pid}, and process {here} was forked from it: "
            "llama.cpp's threads are not in the copy. Start processes by spawn, as "
            'multiprocessing.get_context("spawn") does, and load the library there'
        )
