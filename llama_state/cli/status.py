"""The exit statuses of all commands."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """What a command exits with, as ``diff`` and ``grep`` do."""

    OK = 0
    """Done, and where there was a question the answer is yes."""
    NO = 1
    """The answer is no: damaged, different, not restored as it was, no library."""
    TROUBLE = 2
    """No answer: wrong use, a file that cannot be read or written, a package or library missing."""
