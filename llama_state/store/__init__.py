"""Prefixes in pieces, kept beyond the process: the prefix store."""

from __future__ import annotations

from .metrics import PlaceStats, Stats
from .places.backend import Backend, Place, Stored
from .prefix_store import PrefixStore
from .prompt import Media
from .results import Entry, Match, Recalled, Remembered, Verified, Why

__all__ = [
    "Backend",
    "Entry",
    "Match",
    "Media",
    "Place",
    "PlaceStats",
    "PrefixStore",
    "Recalled",
    "Remembered",
    "Stats",
    "Stored",
    "Verified",
    "Why",
]
