"""Errors as a person at a terminal reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import StateError


class CommandError(StateError):
    """A command cannot be done; the text names the file or option, and what to do."""


@contextmanager
def naming(path: str, real: str | None = None) -> Iterator[None]:
    """Put the name of the file at *path* before errors that do not name it.

    Args:
        path: Its name, as it was given.
        real: Where it is, if that is another name: errors do not name that.
    """
    try:
        yield
    except StateError as error:
        if isinstance(error, OSError):
            raise
        from ..inspection.words import problem_text

        text = problem_text(error).removeprefix(f"{real or path}: ")
        raise CommandError(f"{path}: {text}") from error


def sentence(error: Exception) -> str:
    """Return the text of an error."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
