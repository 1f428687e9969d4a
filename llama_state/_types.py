"""Type names shared by every module."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Buffer as Buffer

StrPath: TypeAlias = "str | os.PathLike[str]"
