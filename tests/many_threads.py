"""Many threads at once, which the interpreter changes as often as it can.

So what is no single step is interrupted with a GIL, too.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def together(n_threads: int, work: Callable[[int], object]) -> None:
    """Do it in all threads, which begin at once, and raise what one of them raises."""
    gate = threading.Barrier(n_threads)

    def one(n: int) -> None:
        gate.wait()
        work(n)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            for done in [pool.submit(one, n) for n in range(n_threads)]:
                done.result()
    finally:
        sys.setswitchinterval(before)
