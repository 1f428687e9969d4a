"""Type names shared by every module."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Buffer as Buffer

StrPath: TypeAlias = "str | os.PathLike[str]"

Progress: TypeAlias = "Callable[[int, int], object]"
"""Called with the bytes that are done and those there will be; what it raises stops the work."""
