"""Memory and disk. This package knows neither llama.cpp nor states."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Buffer as Buffer

StrPath: TypeAlias = "str | os.PathLike[str]"

Progress: TypeAlias = "Callable[[int, int], object]"
"""Called with the bytes done and the bytes in total. Raise in it to stop the work."""
