"""Errors as a person at a terminal reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import StateError


class CommandError(StateError):
    """A command cannot be done; the text names the file or option, and what to do."""


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the name of the file at *path* before errors that do not name it."""
    try:
        yield
    except StateError as error:
        if isinstance(error, OSError):
            raise
        from ..inspection.words import problem_text

        raise CommandError(f"{path}: {problem_text(error)}") from error


def sentence(error: Exception) -> str:
    """Return the text of an error."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
