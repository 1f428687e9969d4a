"""Say what to do when a file cannot be replaced."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from . import StrPath
from .platform.files import OPEN_FILES_STAY

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def advice(number: int | None, path: StrPath) -> str:
    """Return what to add to the text of an error.

    Args:
        number: Its ``errno``.
        path: The file that was to be saved.
    """
    folder = Path(os.path.realpath(path)).parent
    if number == errno.EBUSY:
        return (
            "; something is mounted on this very file, and such a file cannot be replaced: "
            "mount its folder instead"
        )
    if number in _NOT_WRITABLE and OPEN_FILES_STAY and os.path.lexists(path):
        return (
            "; a file that something has open or mapped cannot be replaced on this system: close it"
            " there, and load checkpoints with mapped=False"
        )
    if number in _NOT_WRITABLE:
        return f"; a new file is made beside the old one, so its folder {folder} must be writable"
    if number == errno.ENOENT and not folder.is_dir():
        return f"; there is no folder {folder}"
    return ""
