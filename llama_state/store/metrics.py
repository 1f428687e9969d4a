"""What a store has done and holds, in figures: for programs, and as Prometheus text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from .counting import counting
from .results import Contents
from .tiers import Tier
from .troubles import Troubles

PREFIX: Final = "llama_state_store_"


@dataclass(frozen=True, slots=True)
class PlaceStats:
    """What one place of a store holds, and how it answers.

    Attributes:
        location: Where it is.
        used_bytes: Bytes that everything in it takes; 0 where it cannot be counted.
        capacity_bytes: The most that it may.
        refused: Objects that it had no room for.
        kept: Objects that were found in another place and copied to this one.
        trips: How often it failed or was too slow, and was left alone for a while.
        resting_seconds: How long it is still left alone.
        latency: Seconds until an answer without data; None where that was not measured.
        bytes_per_second: How fast objects were read; None where that was not measured.
    """

    location: str
    used_bytes: int
    capacity_bytes: int
    refused: int = 0
    kept: int = 0
    trips: int = 0
    resting_seconds: float = 0.0
    latency: float | None = None
    bytes_per_second: float | None = None

    @classmethod
    def of(cls, tier: Tier, troubles: Troubles) -> PlaceStats:
        """Return the figures of a place."""
        place, guard, used = tier.backend, tier.guard, 0
        if not tier.resting:
            with troubles.tolerated("stats"):
                used = place.used_bytes()
        found = cls(place.location, used, place.capacity_bytes, tier.refused, tier.kept)
        if guard is None:
            return found
        pace = guard.pace
        return replace(
            found,
            trips=guard.trips,
            resting_seconds=guard.resting,
            latency=pace.latency,
            bytes_per_second=pace.bytes_per_second,
        )


@dataclass(frozen=True, slots=True)
class Stats:
    """What a store holds, and what this object has done with it.

    Attributes:
        location: Where it is: all its places.
        used_bytes: Bytes that everything takes, in all places together.
        capacity_bytes: The most that it may.
        recalls: Calls of recall, those of prefill counted.
        hits: Those that found something.
        tokens_asked: Tokens of the prompts of these calls.
        tokens_recalled: Tokens that did not have to be evaluated.
        tokens_lost: Why there were not more -> the tokens that had to be evaluated for that.
        recall_seconds: What all recalls took.
        bytes_read: Bytes of objects that were put into a context.
        tokens_remembered: New tokens that were written.
        bytes_written: Bytes of objects that were written, or wait for it.
        pending_bytes: Bytes that wait to be written.
        dropped: Objects that were not written, since too much waited.
        refused: Objects that no place had room for.
        damaged: Objects that were set aside.
        holes: Objects that were gone when they were read: a server let go of them.
        failures: Kind of trouble -> how often it was met.
        places: Each place, nearest first.
    """

    location: str
    used_bytes: int
    capacity_bytes: int
    recalls: int = 0
    hits: int = 0
    tokens_asked: int = 0
    tokens_recalled: int = 0
    tokens_lost: Mapping[str, int] = field(default_factory=dict)
    recall_seconds: float = 0.0
    bytes_read: int = 0
    tokens_remembered: int = 0
    bytes_written: int = 0
    pending_bytes: int = 0
    dropped: int = 0
    refused: int = 0
    damaged: int = 0
    holes: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    places: Sequence[PlaceStats] = ()

    @classmethod
    def of(
        cls,
        location: str,
        tiers: Iterable[Tier],
        troubles: Troubles,
        *,
        pending_bytes: int,
        dropped: int,
        refused: int,
    ) -> Stats:
        """Return the figures of a store."""
        places = tuple(PlaceStats.of(tier, troubles) for tier in tiers)
        with counting():  # as they are at one moment
            counts, lost = dict(troubles.counts), dict(troubles.lost)
            failures = dict(troubles.failures)
        return cls(
            location,
            sum(place.used_bytes for place in places),
            sum(place.capacity_bytes for place in places),
            places=places,
            tokens_lost=lost,
            recall_seconds=counts.pop("recall_microseconds", 0) / 1e6,
            pending_bytes=pending_bytes,
            dropped=dropped,
            refused=refused,
            failures=failures,
            **counts,
        )

    def prometheus(self) -> str:
        """Return the figures in the text format of Prometheus, version 0.0.4.

        Source: https://prometheus.io/docs/instrumenting/exposition_formats/
        """
        return exposition(_of_stats(self))


class Metric(NamedTuple):
    """A metric of Prometheus: counters end in ``_total``.

    Attributes:
        name: Without the prefix.
        text: What it says.
        values: Labels and value of each sample.
    """

    name: str
    text: str
    values: Sequence[tuple[Mapping[str, str], float]]


def of_contents(contents: Contents) -> str:
    """Return what is in a place in the text format of Prometheus."""
    return exposition(_of_contents(contents))


def exposition(metrics: Iterable[Metric]) -> str:
    """Return metrics as text; those without a sample are left out."""
    return "".join(f"{line}\n" for metric in metrics for line in _lines(metric))


def _lines(metric: Metric) -> Iterator[str]:
    name = PREFIX + metric.name
    if metric.values:
        yield f"# HELP {name} {metric.text}"
        yield f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"
    for labels, value in metric.values:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"{name}{{{inside}}} {value:.17g}" if inside else f"{name} {value:.17g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _of_stats(stats: Stats) -> Iterator[Metric]:
    misses = stats.recalls - stats.hits
    yield Metric(
        "recalls_total",
        "Recalls, by result.",
        [({"result": "hit"}, stats.hits), ({"result": "miss"}, misses)],
    )
    for name, text, value in (
        ("tokens_asked_total", "Tokens of the prompts that were asked for.", stats.tokens_asked),
        ("tokens_recalled_total", "Tokens that were recalled.", stats.tokens_recalled),
        ("recall_seconds_total", "Seconds that recalls took.", stats.recall_seconds),
        ("read_bytes_total", "Bytes that were put into contexts.", stats.bytes_read),
        ("tokens_remembered_total", "New tokens that were written.", stats.tokens_remembered),
        ("written_bytes_total", "Bytes that were written.", stats.bytes_written),
        ("dropped_total", "Objects not written: too much waited.", stats.dropped),
        ("refused_total", "Objects that no place had room for.", stats.refused),
        ("damaged_total", "Objects that were set aside.", stats.damaged),
        ("holes_total", "Objects that were gone when they were read.", stats.holes),
        ("pending_bytes", "Bytes that wait to be written.", stats.pending_bytes),
    ):
        yield Metric(name, text, [({}, value)])
    yield Metric(
        "tokens_lost_total",
        "Tokens that were evaluated, by why they were not recalled.",
        [({"why": why}, n) for why, n in sorted(stats.tokens_lost.items())],
    )
    yield Metric(
        "failures_total",
        "Troubles of the store.",
        [({"kind": kind}, n) for kind, n in sorted(stats.failures.items())],
    )
    for name, text, values in (
        ("used_bytes", "Bytes in a place.", [p.used_bytes for p in stats.places]),
        ("capacity_bytes", "The most it may take.", [p.capacity_bytes for p in stats.places]),
        ("place_refused_total", "Objects it had no room for.", [p.refused for p in stats.places]),
        ("place_kept_total", "Objects copied to it.", [p.kept for p in stats.places]),
        ("place_trips_total", "Times it was left alone.", [p.trips for p in stats.places]),
        ("place_resting_seconds", "Left alone for.", [p.resting_seconds for p in stats.places]),
        ("place_latency_seconds", "Until an answer.", [p.latency for p in stats.places]),
        ("place_bytes_per_second", "When read.", [p.bytes_per_second for p in stats.places]),
    ):
        pairs = zip(stats.places, values, strict=True)
        known = [({"place": place.location}, value) for place, value in pairs if value is not None]
        yield Metric(name, text, known)


def _of_contents(contents: Contents) -> Iterator[Metric]:
    place = {"place": contents.location}
    yield Metric("used_bytes", "Bytes in a place.", [(place, contents.used_bytes)])
    yield Metric("prompts", "Prompts that no other goes on from.", [(place, contents.n_prompts)])
    yield Metric("pinned_prompts", "Prompts that are pinned.", [(place, contents.pinned)])
    kinds = [({**place, "kind": kind}, each) for kind, each in contents.kinds.items()]
    yield Metric("objects", "Objects, by kind.", [(labels, n) for labels, (n, _) in kinds])
    yield Metric("object_bytes", "Bytes of objects.", [(labels, n) for labels, (_, n) in kinds])
    models = [({**place, "model": model}, n) for model, n in contents.models.items()]
    yield Metric("model_prompts", "Prompts, by model.", models)
