"""Prefixes in pieces, kept beyond the process: the prefix store."""

from __future__ import annotations

from .prefix_store import PrefixStore
from .prompt import Media
from .results import Entry, Match, PlaceStats, Recalled, Remembered, Stats, Verified, Why

__all__ = [
    "Entry",
    "Match",
    "Media",
    "PlaceStats",
    "PrefixStore",
    "Recalled",
    "Remembered",
    "Stats",
    "Verified",
    "Why",
]
