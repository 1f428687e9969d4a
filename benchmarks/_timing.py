"""Take several ways in turns and say how long each took."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

GIB = 1 << 30
MIB = 1 << 20


def nothing() -> None:
    """Do nothing: what most methods need before and after."""


@dataclass(frozen=True)
class Way:
    """One way to do a thing.

    Attributes:
        name: What the tables call it.
        party: Whose it is: "memory", "llama.cpp", "llama_state", ...
        run: What is timed. What it returns is freed after the clock has stopped.
        before: Called before each run, outside the time.
        after: Called after each run, outside the time.
    """

    name: str
    party: str
    run: Callable[[], object]
    before: Callable[[], object] = nothing
    after: Callable[[], object] = nothing


@dataclass(frozen=True)
class Timing:
    """How long one way took.

    Attributes:
        section: The part of the benchmark.
        configuration: The context that it was measured in.
        way: Its name.
        party: Whose it is.
        nbytes: Bytes of state that it moved.
        seconds: Of each run, in the order of the rounds.
    """

    section: str
    configuration: str
    way: str
    party: str
    nbytes: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds, of the middle run."""
        return statistics.median(self.seconds)

    @property
    def speed(self) -> float:
        """GiB/s, of the middle run."""
        return self.nbytes / self.median / GIB


def alternate(
    groups: Iterable[tuple[int, Iterable[Way]]],
    rounds: int,
    *,
    section: str,
    configuration: str,
    repeat: int = 1,
) -> list[Timing]:
    """Run each way once to warm it, then all of them in turns, *rounds* times.

    Each round has an order of its own, the same in every run: what one way leaves behind (pages
    to free, to flush) then meets another one each time.

    Args:
        groups: Bytes of state that the ways of a group move, and the ways.
        rounds: Times that each way is measured.
        section: For the timings.
        configuration: For the timings.
        repeat: Runs that make one measurement, for what is short; the time is that of one.
    """
    ways = [(nbytes, way) for nbytes, group in groups for way in group]
    taken: list[list[float]] = [[] for _ in ways]
    for _, way in ways:
        _timed(way, repeat)
    order = random.Random(0)  # noqa: S311
    for _ in range(rounds):
        for at in order.sample(range(len(ways)), len(ways)):
            taken[at].append(_timed(ways[at][1], repeat))
    return [
        Timing(section, configuration, way.name, way.party, nbytes, tuple(seconds))
        for seconds, (nbytes, way) in zip(taken, ways, strict=True)
    ]


def _timed(way: Way, repeat: int) -> float:
    way.before()
    start = time.perf_counter()
    for _ in range(repeat):
        result = way.run()
    seconds = time.perf_counter() - start
    del result
    way.after()
    return seconds / repeat


def times_as_fast(timing: Timing, base: Timing) -> list[float]:
    """For each round, the time of *base* over that of *timing* in the same round."""
    return [slow / fast for fast, slow in zip(timing.seconds, base.seconds, strict=True)]
