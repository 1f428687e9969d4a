"""Save llama.cpp's inference state from Python, and bring it back verified.

Importing this loads no libllama: the first :class:`Model`, :func:`load_library` or
:func:`attach` does.
"""

try:
    from ._llama_cffi import lib as _compiled  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"{__path__[0]} is a source tree whose extension is not built. Run `pip install -e .` "
        "there, or Python from another folder to use the installed package."
    ) from error

from ._buffers import trim_buffers
from ._discovery import load_library
from ._library import Library
from .attaching import attach
from .checkpoint import Checkpoint
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
    MismatchWarning,
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
from .fingerprint import Fingerprint, model_fields
from .inspection import StateFile, inspect_file
from .model import Model
from .state import Restored, Span

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "Checkpoint",
    "ChecksumError",
    "ClosedError",
    "Context",
    "DecodeError",
    "DeviceSnapshot",
    "Difference",
    "Fingerprint",
    "FormatError",
    "Library",
    "LibraryNotFoundError",
    "MismatchError",
    "MismatchWarning",
    "Model",
    "ModelLoadError",
    "RestoreError",
    "Restored",
    "SaveError",
    "SequenceIdError",
    "Span",
    "StaleError",
    "StateError",
    "StateFile",
    "TruncatedError",
    "UnsupportedError",
    "VersionError",
    "__version__",
    "attach",
    "inspect_file",
    "load_library",
    "model_fields",
    "trim_buffers",
]
