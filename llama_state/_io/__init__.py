"""Memory and disk. Nothing here knows of llama.cpp or of states."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Buffer as Buffer

StrPath: TypeAlias = "str | os.PathLike[str]"

Progress: TypeAlias = "Callable[[int, int], object]"
"""Called with the bytes that are done and the bytes in all. Raise in it to stop the work."""
