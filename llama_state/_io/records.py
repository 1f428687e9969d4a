"""What is said to Python's logging: nothing, unless a program asks for it.

All loggers are below ``llama_state``. A record of what was done is text for people, and has the
same as ``record.facts``, a dict, for programs.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any, Self

from ..errors import StateError

logging.getLogger("llama_state").addHandler(logging.NullHandler())


def logger(name: str) -> logging.Logger:
    """Return the logger of a part of this library."""
    return logging.getLogger(f"llama_state.{name}")


def done(to: logging.Logger, doing: str, facts: dict[str, Any]) -> None:
    """Log at DEBUG what was done."""
    if to.isEnabledFor(logging.DEBUG):
        text = " ".join(f"{name}={value!r}" for name, value in facts.items())
        to.debug("%s %s", doing, text, extra={"facts": {"doing": doing, **facts}})


class Doing:
    """Logs at DEBUG what a block has done and how long that took, or why it did not.

    A state that is refused, by any :class:`~llama_state.errors.StateError`, is the fact
    ``refused``; every other exception is ``failed``.

    Args:
        to: The logger.
        doing: What is done.
        facts: What is known before.
    """

    def __init__(self, to: logging.Logger, doing: str, **facts: object) -> None:
        self._to = to
        self._doing = doing
        self._facts = facts
        self._start = time.perf_counter()

    def add(self, **facts: object) -> None:
        """Add what is known now."""
        self._facts.update(facts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._to.isEnabledFor(logging.DEBUG):
            return
        self._facts["seconds"] = round(time.perf_counter() - self._start, 6)
        if error is not None:
            # As text: who keeps the record would keep the frames of the error, and what they hold.
            outcome = "refused" if isinstance(error, StateError) else "failed"
            self._facts[outcome] = f"{type(error).__name__}: {error}"
        done(self._to, self._doing, self._facts)
