"""What is wanted of the figures, and whether it holds.

A ratio is taken round by round: the time of one way over that of the other in the same round, a
second or so apart. Its value is the median of those, with the smallest and the largest beside it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import _small
import _ways
from _chats import Chats
from _states import CONFIGURATIONS
from _timing import Timing, times_as_fast

Bounds = Mapping[str, float]

_FLASH, _PLAIN, _QUANTIZED = map(str, CONFIGURATIONS)
_FLAT_WITHIN = 1.25
_TINY_MICROSECONDS = 250.0
# A save waits for the disk.
_GAINS: Bounds = {_ways.LOAD: 50.0, _ways.SAVE_DURABLE: 5.0}
# llama.cpp's own calls are told, not judged: ours can be no flatter than these.
_FLAT_WAYS: Mapping[str, float | None] = {
    _ways.GET_DATA: None,
    _ways.SNAPSHOT_OUT: _FLAT_WITHIN,
    _ways.SNAPSHOT: _FLAT_WITHIN,
    _ways.SET_DATA: None,
    _ways.RESTORE: _FLAT_WITHIN,
    _ways.SAVE: _FLAT_WITHIN,
    _ways.LOAD: _FLAT_WITHIN,
}


def _both(bound: float) -> Bounds:
    """Return bounds with flash attention and without; quantized caches are only measured."""
    return {_FLASH: bound, _PLAIN: bound}


@dataclass(frozen=True)
class Target:
    """How many times as fast as *base* a way should be at least.

    Attributes:
        way: Ours.
        base: The other.
        bounds: Configuration -> the smallest ratio; none: it is only told.
    """

    way: str
    base: str
    bounds: Bounds


TARGETS = (
    Target(_ways.GET_DATA, _ways.MEMCPY, {}),
    Target(_ways.SNAPSHOT_OUT, _ways.MEMCPY, _both(0.85)),
    Target(_ways.SNAPSHOT, _ways.ION7_SNAPSHOT, _both(1.7)),
    Target(_ways.SNAPSHOT, _ways.LLAMA_SAVE, _both(3.0)),
    Target(_ways.SET_DATA, _ways.MEMCPY, {}),
    Target(_ways.RESTORE, _ways.MEMCPY, _both(0.75)),
    Target(_ways.RESTORE, _ways.SET_DATA, {}),
    Target(_ways.RESTORE_MAPPED, _ways.RESTORE, {}),
    Target(_ways.RESTORE, _ways.ION7_RESTORE, {}),
    Target(_ways.RESTORE, _ways.LLAMA_LOAD, _both(5.0)),
    Target(_ways.CACHE_HIT, _ways.SET_DATA, {}),
    Target(_ways.SEQ_SNAPSHOT_OUT, _ways.SEQ_GET, {}),
    Target(_ways.SEQ_RESTORE, _ways.SEQ_SET, {}),
    Target(_ways.SAVE, _ways.SAVE_FILE, {_FLASH: 2.5, _PLAIN: 4.0}),
    # "No slower", with what two equal ways differ by.
    Target(_ways.SAVE_OVER, _ways.SAVE, _both(0.95)),
    Target(_ways.SAVE_OVER, _ways.SAVE_FILE_OVER, {}),
    Target(_ways.LOAD, _ways.LOAD_FILE, _both(1.0)),
    Target(_ways.SAVE_LIMITED, _ways.SAVE, {}),
    Target(_ways.LOAD_LIMITED, _ways.LOAD, {}),
    # At most 1.25 and 1.35 times as long.
    Target(_ways.CHECKPOINT, _ways.SNAPSHOT_OUT, _both(0.8)),
    Target(_ways.RESUME, _ways.RESTORE, _both(0.74)),
    Target(_ways.LOAD_AND_RESUME, _ways.RESTORE, {}),
)

# At least half of the speed of a state that needs no rewriting.
CONVERSION_TARGETS = (
    *(
        Target(way, _ways.RESTORE, _both(0.5))
        for way in (_ways.RESTORE_VERSION, _ways.RESTORE_TURNED, _ways.RESTORE_STREAMS)
    ),
    *(
        Target(way, _ways.SEQ_RESTORE, _both(0.5))
        for way in (_ways.SEQ_VERSION, _ways.SEQ_TURNED, _ways.SEQ_STREAMS)
    ),
    Target(_ways.LOAD_VERSION, _ways.LOAD, _both(0.5)),
)

# A turn of 64 tokens after 4,096, and all of them back.
STORE_TARGETS = (
    Target(_ways.REMEMBER, _ways.SAVE, _both(20.0)),
    Target(_ways.REMEMBER, _ways.SAVE_FILE, {}),
    Target(_ways.REMEMBER, _ways.SEQ_RANGE, {}),
    Target(_ways.RECALL, _ways.LOAD, {_FLASH: 0.85, _PLAIN: 0.75}),
)
# From a server, beside what its client does alone with as many bytes.
SERVER_TARGETS = (
    Target(_ways.PLACE_PUT, _ways.CLIENT_SET, {}),
    Target(_ways.PLACE_OPEN, _ways.CLIENT_GET, {}),
    Target(_ways.RECALL, _ways.CLIENT_GET, {"redis": 0.6, "unix": 0.6}),
)
# How the time of a turn grows with the tokens before it, beside that of what llama.cpp does.
_GROWING: Mapping[str, float | None] = {
    _ways.REMEMBER: 1.5,
    _ways.SEQ_RANGE: None,
    _ways.SAVE: None,
}
_KEPT_WITHIN = 1.05

# At most 1.3 times as long.
LARGE_TARGETS = (Target(_ways.SAVE, _ways.SAVE_UNCOPIED, {_FLASH: 0.77}),)


@dataclass(frozen=True)
class Finding:
    """A figure made of timings.

    Attributes:
        label: What it is.
        configuration: Where it was measured.
        value: The figure.
        low: Of the rounds, the smallest.
        high: The largest.
        bound: What is wanted; None where nothing is.
        at_least: *bound* is the smallest that will do, not the largest.
    """

    label: str
    configuration: str
    value: float
    low: float
    high: float
    bound: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """Whether it is as wanted."""
        if self.bound is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def wanted(self) -> str:
        """*bound* as the tables show it."""
        if self.bound is None:
            return ""
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


def findings(timings: Sequence[Timing], chats: Iterable[Chats] = ()) -> list[Finding]:
    """All figures that *timings* and *chats* allow."""
    ratios = [
        *_ratios(timings, "states", TARGETS),
        *_ratios(timings, "conversions", CONVERSION_TARGETS),
        *_ratios(timings, "large", LARGE_TARGETS),
        *_ratios(timings, "turns", STORE_TARGETS),
        *_ratios(timings, "servers", SERVER_TARGETS),
    ]
    others = (_flatness, _growth, _calls, _threads, _gains)
    return [*ratios, *(found for of in others for found in of(timings)), *_kept(chats)]


def _ratios(
    timings: Sequence[Timing], section: str, targets: Iterable[Target]
) -> Iterator[Finding]:
    for target in targets:
        for configuration, by_way in _by_configuration(timings, section):
            if target.way in by_way and target.base in by_way:
                ratios = times_as_fast(by_way[target.way], by_way[target.base])
                bound = target.bounds.get(configuration)
                label = f"{target.way} / {target.base}"
                yield _finding(label, configuration, ratios, bound)


def _flatness(timings: Sequence[Timing]) -> Iterator[Finding]:
    """Yield the largest time for a byte over the smallest, over all sizes of states."""
    return _spread(timings, "sizes", "time for a byte", _FLAT_WAYS, lambda one: one.nbytes)


def _growth(timings: Sequence[Timing]) -> Iterator[Finding]:
    """Yield the largest time over the smallest, over all lengths of what was before a turn."""
    return _spread(timings, "growth", "time", _GROWING, lambda _: 1)


def _spread(
    timings: Sequence[Timing],
    section: str,
    what: str,
    bounds: Bounds | Mapping[str, float | None],
    share: Callable[[Timing], int],
) -> Iterator[Finding]:
    for name, bound in bounds.items():
        grown: defaultdict[str, list[Timing]] = defaultdict(list)
        for timing in timings:
            if timing.section == section and timing.way == name:
                grown[timing.configuration].append(timing)
        for configuration, sizes in grown.items():
            if len(sizes) > 1:
                rounds = zip(*([s / share(one) for s in one.seconds] for one in sizes), strict=True)
                spread = [max(one) / min(one) for one in rounds]
                times = [one.median / share(one) for one in sizes]
                value = max(times) / min(times)
                label = f"most / least {what}, {name}"
                low, high = min(spread), max(spread)
                yield Finding(label, configuration, value, low, high, bound, at_least=False)


def _kept(chats: Iterable[Chats]) -> Iterator[Finding]:
    """Yield the bytes that are kept over those of the shared prompt and of what is new."""
    for one in chats:
        if one.least:
            value = one.nbytes / one.least
            label = f"bytes / one prompt and what is new, {one.way}"
            yield _finding(label, one.model, [value], _KEPT_WITHIN, at_least=False)


def _calls(timings: Sequence[Timing]) -> Iterator[Finding]:
    """Microseconds that our snapshot and restore of a tiny sequence take above the bare calls."""
    for configuration, by_way in _by_configuration(timings, "tiny"):
        ours = by_way[_ways.SEQ_SNAPSHOT], by_way[_ways.SEQ_RESTORE]
        bare = by_way[_ways.SEQ_GET], by_way[_ways.SEQ_SET]
        above = [
            1e6 * (save + restore - get - put)
            for save, restore, get, put in zip(
                *(one.seconds for one in (*ours, *bare)), strict=True
            )
        ]
        label = "us above llama.cpp, snapshot and restore"
        yield _finding(label, configuration, above, _TINY_MICROSECONDS, at_least=False)


def _threads(timings: Sequence[Timing]) -> Iterator[Finding]:
    """Return the share of its speed that a counting thread keeps."""
    for configuration, by_way in _by_configuration(timings, "threads"):
        for name, timing in by_way.items():
            if name != _small.COUNTING:
                ratios = times_as_fast(timing, by_way[_small.COUNTING])
                yield _finding(f"{name} / alone", configuration, ratios, 0.8)


def _gains(timings: Sequence[Timing]) -> Iterator[Finding]:
    """Return how many times as fast as evaluating a text of a real model its state is moved."""
    for configuration, by_way in _by_configuration(timings, "real"):
        for name, bound in _GAINS.items():
            ratios = times_as_fast(by_way[name], by_way[_ways.EVALUATE])
            yield _finding(f"{name} / {_ways.EVALUATE}", configuration, ratios, bound)


def _by_configuration(
    timings: Iterable[Timing], section: str
) -> Iterable[tuple[str, dict[str, Timing]]]:
    found: defaultdict[str, dict[str, Timing]] = defaultdict(dict)
    for timing in timings:
        if timing.section == section:
            found[timing.configuration][timing.way] = timing
    return found.items()


def _finding(
    label: str,
    configuration: str,
    values: Sequence[float],
    bound: float | None,
    *,
    at_least: bool = True,
) -> Finding:
    value, low, high = statistics.median(values), min(values), max(values)
    return Finding(label, configuration, value, low, high, bound, at_least)
