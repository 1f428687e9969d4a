"""Every error that llama_state raises, with its facts in fields.

Each class also derives from a built-in exception, so ``except ValueError`` around a restore works::

    StateError
    |- FormatError (ValueError)
    |  |- TruncatedError
    |  |- ChecksumError
    |  `- VersionError
    |- MismatchError (ValueError)
    |- CapacityError (ValueError)
    |- SequenceIdError (IndexError)
    |- SaveError (OSError)
    |- RestoreError (RuntimeError)
    |- DecodeError (RuntimeError)
    |- ModelLoadError (RuntimeError)
    |  `- ModelNotFoundError (FileNotFoundError)
    |- ContextError (RuntimeError)
    |- ClosedError (RuntimeError)
    |- StaleError (RuntimeError)
    |- LibraryNotFoundError (ImportError)
    `- UnsupportedError (NotImplementedError)

A file that is not there is a built-in ``FileNotFoundError``, whatever it was to hold. An argument
of the wrong type is a ``TypeError``, one with a value that can never be right a ``ValueError``;
both name it. All errors can be copied and pickled.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

__all__ = [
    "CapacityError",
    "ChecksumError",
    "ClosedError",
    "ContextError",
    "DecodeError",
    "Difference",
    "FormatError",
    "IdentityWarning",
    "LibraryNotFoundError",
    "MismatchError",
    "MismatchWarning",
    "ModelLoadError",
    "ModelNotFoundError",
    "RestoreError",
    "SaveError",
    "SequenceIdError",
    "StaleError",
    "StateError",
    "TruncatedError",
    "UnsupportedError",
    "VersionError",
    "VersionWarning",
]


# What built-in errors keep outside of their ``__dict__``.
_SLOTS: Final = ("msg", "name", "path", "errno", "strerror", "filename", "filename2")


class Difference(NamedTuple):
    """One property in which a saved state and a context disagree."""

    name: str
    saved: object
    current: object

    def __str__(self) -> str:
        return f"{self.name}: saved {self.saved}, this context {self.current}"


class StateError(Exception):
    """Base of every error raised by llama_state."""

    def of_file(self, path: str | os.PathLike[str]) -> StateError:
        """Name the file that holds the data. Return the error itself."""
        self.args: tuple[Any, ...] = (f"{os.fspath(path)}: {self}", *self.args[1:])
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with the text alone. This one calls no constructor.
        kept = {name: value for name in _SLOTS if (value := getattr(self, name, None)) is not None}
        return _blank, (type(self), self.args), {**vars(self), **kept}


class FormatError(StateError, ValueError):
    """The bytes are not a llama.cpp state, or are damaged.

    Attributes:
        reason: What is wrong, without path and offset.
        offset: Byte offset of the fault; None if it has no single place.
        path: The file that holds the data; None for bytes in memory.
    """

    def __init__(self, reason: str, *, offset: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.offset = offset
        self.path: str | None = None

    def __str__(self) -> str:
        return self._in_place(self.reason)

    def _in_place(self, text: str) -> str:
        """Add path and offset to a text, as far as they are known."""
        path = "" if self.path is None else f"{self.path}: "
        return f"{path}{text}" + ("" if self.offset is None else f" (at byte {self.offset})")

    def moved(self, by: int) -> FormatError:
        """Add *by* to the offset: the data begins *by* bytes earlier. Return the error itself."""
        self.offset = None if self.offset is None else self.offset + by
        return self

    def of_file(self, path: str | os.PathLike[str]) -> FormatError:
        """Name the file that holds the data, unless one is named. Return the error itself."""
        if self.path is None:
            self.path = os.fspath(path)
        return self


class TruncatedError(FormatError):
    """The data ends too early.

    Attributes:
        need: The length that the data must have at least.
        have: The length that it has.
    """

    def __init__(self, what: str, *, need: int, have: int, offset: int | None = None) -> None:
        super().__init__(what, offset=offset)
        self.need: int = need
        self.have: int = have

    def __str__(self) -> str:
        hint = "" if self.path is None else "; inspect_file() shows what is there"
        return self._in_place(f"{self.reason}: need {self.need} bytes, have {self.have}{hint}")

    def moved(self, by: int) -> FormatError:
        """Add *by* to the offset, and to *need* and *have*. Return the error itself."""
        self.need += by
        self.have += by
        return super().moved(by)


class ChecksumError(FormatError):
    """The bytes are not those that were written."""


class VersionError(FormatError):
    """A version of a format that is not supported.

    Attributes:
        found: The version in the data.
        expected: The version, or the versions, that are supported.
    """

    def __init__(
        self, what: str, *, found: int, expected: int | Sequence[int], offset: int | None = None
    ) -> None:
        wanted = expected if isinstance(expected, int) else " or ".join(map(str, expected))
        super().__init__(f"{what}: version {found}, expected {wanted}", offset=offset)
        self.found = found
        self.expected = expected


class MismatchError(StateError, ValueError):
    """The state is sound but does not fit this context.

    Attributes:
        differences: A :class:`Difference` (name, saved, current) for each property.
    """

    def __init__(self, differences: Sequence[Difference], *, hint: str = "") -> None:
        why = "; ".join([*map(str, differences), *([hint] if hint else [])])
        super().__init__(f"the state does not fit: {why}")
        self.differences: tuple[Difference, ...] = tuple(differences)


class IdentityWarning(UserWarning):
    """A checkpoint does not know what it belongs to, or which tokens gave it.

    The text says what, and what to do.
    """


class MismatchWarning(UserWarning):
    """``check="warn"`` let a state pass; the text is that of the :class:`MismatchError`."""


class VersionWarning(UserWarning):
    """A libllama writes states of a version that cannot be read; the text says what that means."""


class CapacityError(StateError, ValueError):
    """Too few cells in a cache, sequences in a context, or bytes in a buffer.

    Attributes:
        need: The number needed.
        have: The number available.
    """

    def __init__(self, what: str, *, need: int, have: int, hint: str = "") -> None:
        super().__init__(f"{what}: need {need}, have {have}" + (f"; {hint}" if hint else ""))
        self.need = need
        self.have = have


class SequenceIdError(StateError, IndexError):
    """A sequence id outside ``0 .. n_seq_max - 1``.

    Attributes:
        seq_id: The id that was given.
        limit: The context's ``n_seq_max``.
    """

    def __init__(self, seq_id: int, *, limit: int) -> None:
        super().__init__(f"sequence id {seq_id} is outside 0 .. {limit - 1} (n_seq_max is {limit})")
        self.seq_id = seq_id
        self.limit = limit


class SaveError(StateError, OSError):
    """A file could not be written; the old file, if there was one, is unchanged.

    Exception: if the text says that the state was saved, only the folder could not be synced.
    """


class RestoreError(StateError, RuntimeError):
    """llama.cpp rejected a state that had passed our checks.

    Attributes:
        log: The lines that llama.cpp logged during the call.
        rolled_back: True if the destination holds what it held before the call, False if it
            was emptied.
    """

    def __init__(self, reason: str, *, log: Sequence[str] = (), rolled_back: bool = False) -> None:
        after = "the destination is as it was" if rolled_back else "the destination was emptied"
        super().__init__(_with_log(f"{reason}; {after}", log))
        self.log: tuple[str, ...] = tuple(log)
        self.rolled_back = rolled_back


class DecodeError(StateError, RuntimeError):
    """``llama_decode`` failed.

    Attributes:
        code: Its return value.
        log: The lines that llama.cpp logged during the call.
    """

    def __init__(self, reason: str, *, code: int, log: Sequence[str] = ()) -> None:
        super().__init__(_with_log(f"{reason} (llama_decode returned {code})", log))
        self.code = code
        self.log: tuple[str, ...] = tuple(log)


class ModelLoadError(StateError, RuntimeError):
    """A model could not be loaded.

    Attributes:
        path: The model file.
        log: The lines that llama.cpp logged during the call.
    """

    def __init__(self, reason: str, *, path: str, log: Sequence[str] = ()) -> None:
        super().__init__(_with_log(f"{path}: {reason}", log))
        self.path = path
        self.log: tuple[str, ...] = tuple(log)


class ModelNotFoundError(ModelLoadError, FileNotFoundError):
    """The model's file is not there."""

    # Of the two built-in bases only this one knows the fields of an OSError.
    __new__ = FileNotFoundError.__new__  # type: ignore[assignment]

    def __init__(self, path: str) -> None:
        super().__init__("there is no such file", path=path)
        self.errno: int | None = errno.ENOENT
        self.strerror: str | None = os.strerror(errno.ENOENT)
        self.filename: Any = path

    def __str__(self) -> str:
        return str(self.args[0])


class ContextError(StateError, RuntimeError):
    """llama.cpp did not make a context: the options do not go together, or there is no memory.

    Attributes:
        path: The model file.
        log: The lines that llama.cpp logged during the call.
    """

    def __init__(self, reason: str, *, path: str, log: Sequence[str] = ()) -> None:
        super().__init__(_with_log(f"{path}: {reason}", log))
        self.path = path
        self.log: tuple[str, ...] = tuple(log)


class ClosedError(StateError, RuntimeError):
    """The model or context was closed."""


class LibraryNotFoundError(StateError, ImportError):
    """No usable libllama, or the compiled extension that calls it is missing.

    Attributes:
        tried: A pair (place, reason) for every place that was searched, in order.
    """

    def __init__(self, reason: str, *, tried: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__("\n  ".join([reason, *(f"{place}: {why}" for place, why in tried)]))
        self.tried: tuple[tuple[str, str], ...] = tuple(tried)


class StaleError(StateError, RuntimeError):
    """The data of a snapshot on the device was replaced by a later one of the same sequence."""


class UnsupportedError(StateError, NotImplementedError):
    """Not possible with this llama.cpp, this kind of memory or this format."""


def _blank(kind: type[StateError], args: tuple[object, ...]) -> StateError:
    """Return an error for a copy to be made of: its fields are set afterwards."""
    error = kind.__new__(kind)
    error.args = args
    return error


def _with_log(message: str, log: Sequence[str]) -> str:
    return "\n  llama.cpp: ".join([message, *log])
