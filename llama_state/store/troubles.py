"""The store's own troubles: counted, logged once of each kind, and no exception."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from .._io import records
from ..errors import ClosedError, SequenceIdError, StateError
from .counting import counting

LOGGER = records.logger("store")

_OF_THE_CALLER = (ClosedError, SequenceIdError)


class Troubles:
    """Counts what a store does, and what fails.

    Args:
        location: What to call the store.

    Attributes:
        counts: What was done.
        lost: Why a recall found no more -> the tokens that it did not find.
        failures: Kind of trouble -> how often it was met.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self.counts: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    def count(self, **done: int) -> None:
        """Add to the counts."""
        with counting():
            self.counts.update(done)

    def lose(self, why: str, n_tokens: int) -> None:
        """Count tokens that a recall did not find."""
        with counting():
            self.lost[why] += n_tokens

    def done(self, doing: str, **facts: object) -> None:
        """Log what was done, for who has set the level to DEBUG: as text, and as ``facts``."""
        records.done(LOGGER, doing, facts)

    @contextmanager
    def tolerated(self, doing: str) -> Iterator[None]:
        """End the block at a trouble of the store; errors of the caller are raised."""
        try:
            yield
        except _OF_THE_CALLER:
            raise
        except (OSError, StateError) as error:
            self.failed(doing, error)

    def failed(self, doing: str, error: BaseException) -> None:
        """Count a trouble; the first of a kind is logged."""
        kind = f"{doing}: {type(error).__name__}"
        with counting():
            self.failures[kind] += 1
            first = self.failures[kind] == 1
        if first:
            # As text: who keeps the record would keep the frames of the error, and what they hold.
            LOGGER.warning("%s: %s failed: %s", self._location, doing, str(error))
