"""Save llama.cpp's inference state from Python, and bring it back verified.

Importing this loads nothing: each public name is imported at its first use, and the first
:class:`Model`, :func:`load_library` or :func:`attach` finds a libllama.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._io.buffers import trim_buffers
    from ._llama.discovery import load_library
    from ._llama.library import Library
    from .adapters.attach import attach
    from .checkpoint.checkpoint import Checkpoint
    from .checkpoint.fingerprint import Fingerprint, model_fields
    from .context.context import Context
    from .context.device import DeviceSnapshot
    from .context.model import Model
    from .context.state import Restored, Span
    from .errors import (
        CapacityError,
        ChecksumError,
        ClosedError,
        ContextError,
        DecodeError,
        Difference,
        FormatError,
        IdentityWarning,
        LibraryNotFoundError,
        MismatchError,
        MismatchWarning,
        ModelLoadError,
        ModelNotFoundError,
        RestoreError,
        SaveError,
        SequenceIdError,
        StaleError,
        StateError,
        TruncatedError,
        UnsupportedError,
        VersionError,
        VersionWarning,
    )
    from .inspection import StateFile, inspect_file
    from .layout import RestorePoint
    from .store import Media, PrefixStore, Recalled, Remembered

__version__ = "0.2.0"
"""The version of this package."""

__all__ = [
    "CapacityError",
    "Checkpoint",
    "ChecksumError",
    "ClosedError",
    "Context",
    "ContextError",
    "DecodeError",
    "DeviceSnapshot",
    "Difference",
    "Fingerprint",
    "FormatError",
    "IdentityWarning",
    "Library",
    "LibraryNotFoundError",
    "Media",
    "MismatchError",
    "MismatchWarning",
    "Model",
    "ModelLoadError",
    "ModelNotFoundError",
    "PrefixStore",
    "Recalled",
    "Remembered",
    "RestoreError",
    "RestorePoint",
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
    "VersionWarning",
    "__version__",
    "attach",
    "inspect_file",
    "load_library",
    "model_fields",
    "trim_buffers",
]

# Public name -> the module that has it; those that are not here are errors.
_HOME = {
    "Checkpoint": "checkpoint.checkpoint",
    "Context": "context.context",
    "DeviceSnapshot": "context.device",
    "Fingerprint": "checkpoint.fingerprint",
    "Library": "_llama.library",
    "Media": "store",
    "Model": "context.model",
    "PrefixStore": "store",
    "Recalled": "store",
    "Remembered": "store",
    "RestorePoint": "layout",
    "Restored": "context.state",
    "Span": "context.state",
    "StateFile": "inspection",
    "attach": "adapters.attach",
    "inspect_file": "inspection",
    "load_library": "_llama.discovery",
    "model_fields": "checkpoint.fingerprint",
    "trim_buffers": "_io.buffers",
}
_PUBLIC_MODULES = frozenset({"aio", "errors", "inspection", "layout", "store", "testing"})


def __getattr__(name: str) -> Any:
    """Import a public name, or a public module, at its first use."""
    if name in __all__:
        value = getattr(import_module(f".{_HOME.get(name, 'errors')}", __name__), name)
    elif name in _PUBLIC_MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # What a user can want: not what this module imports, nor submodules that have been imported.
    special = (name for name in globals() if name.startswith("__"))
    return sorted({*special, *__all__, *_PUBLIC_MODULES})
