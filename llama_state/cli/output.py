"""What commands print and write."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from .._io import atomic
from ..errors import SaveError


def print_json(data: Any) -> None:
    """Print *data* as JSON."""
    print(json.dumps(data, indent=1, ensure_ascii=False))


def write_file(path: str, data: bytes) -> None:
    """Write a file that is no state: all of it, or nothing."""
    try:
        atomic.write_file(path, [data], durable=False)
    except SaveError as error:  # its text speaks of a state
        raise _os_error(error.errno or errno.EIO, path) from error


def require_folder(path: str) -> None:
    """Raise an error that names *path* unless its folder is there."""
    if not Path(path).parent.is_dir():
        raise _os_error(errno.ENOENT, path)


def _os_error(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)
