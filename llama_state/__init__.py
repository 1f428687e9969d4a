"""Save llama.cpp's inference state from Python, and bring it back verified.

Importing this loads no libllama: the first :class:`Model`, :func:`load_library` or
:func:`attach` does.
"""

from ._discovery import load_library
from ._library import Library
from .attaching import attach
from .context import Context
from .device import DeviceSnapshot
from .errors import (
    CapacityError,
    ChecksumError,
    ClosedError,
    DecodeError,
    Difference,
    FormatError,
    LibraryNotFoundError,
    MismatchError,
    ModelLoadError,
    RestoreError,
    SaveError,
    SequenceIdError,
    StaleError,
    StateError,
    TruncatedError,
    UnsupportedError,
    VersionError,
)
from .model import Model
from .state import Restored, Span

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "ChecksumError",
    "ClosedError",
    "Context",
    "DecodeError",
    "DeviceSnapshot",
    "Difference",
    "FormatError",
    "Library",
    "LibraryNotFoundError",
    "MismatchError",
    "Model",
    "ModelLoadError",
    "RestoreError",
    "Restored",
    "SaveError",
    "SequenceIdError",
    "Span",
    "StaleError",
    "StateError",
    "TruncatedError",
    "UnsupportedError",
    "VersionError",
    "__version__",
    "attach",
    "load_library",
]
