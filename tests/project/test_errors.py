"""Errors are values: copied and pickled they are the same, in any process."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from llama_state import errors
from llama_state.errors import Difference

MADE: dict[type[errors.StateError], errors.StateError] = {
    type(error): error
    for error in (
        errors.StateError("text"),
        errors.FormatError("text", offset=4).moved(3).of_file("a/b"),
        errors.TruncatedError("text", need=9, have=4, offset=2).moved(3),
        errors.ChecksumError("text", offset=7),
        errors.VersionError("text", found=3, expected=[9, 10], offset=4),
        errors.MismatchError([Difference("name", 1, "two"), Difference("other", None, 2)]),
        errors.CapacityError("cells", need=3, have=2, hint="hint"),
        errors.SequenceIdError(7, limit=2),
        errors.SaveError(28, "state not saved", "a/b"),
        errors.RestoreError("text", log=["line"], rolled_back=True),
        errors.DecodeError("text", code=-1, log=["line"]),
        errors.ModelLoadError("text", path="a/b", log=["line"]),
        errors.ContextError("text", path="a/b", log=["line"]),
        errors.ModelNotFoundError("a/b"),
        errors.ClosedError("text"),
        errors.LibraryNotFoundError("text", tried=[("place", "why")]),
        errors.StaleError("text"),
        errors.UnsupportedError("text"),
    )
}


def fields(error: errors.StateError) -> tuple[object, ...]:
    outside = [getattr(error, name, None) for name in ("errno", "strerror", "filename", "msg")]
    return type(error), str(error), error.args, vars(error), outside


def fail(kind: type[errors.StateError]) -> None:
    raise MADE[kind]


def test_every_class_is_here() -> None:
    """A new error is copied and pickled here too."""
    classes = {value for value in vars(errors).values() if isinstance(value, type)}
    assert {kind for kind in classes if issubclass(kind, errors.StateError)} == set(MADE)


@pytest.mark.parametrize("kind", MADE)
def test_a_copy_is_the_same(kind: type[errors.StateError]) -> None:
    """Class, text and fields, and what the built-in classes keep elsewhere."""
    error = MADE[kind]
    error.__notes__ = ["a note"]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert fields(pickle.loads(pickle.dumps(error, protocol))) == fields(error)  # noqa: S301
    for copied in (copy.copy(error), copy.deepcopy(error)):
        assert fields(copied) == fields(error)


def test_errors_come_back_from_another_process() -> None:
    """A pool passes them on and goes on working."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for kind, error in MADE.items():
            found = pool.submit(fail, kind).exception(60)
            assert type(found) is kind
            assert str(found) == str(error)
            for name in vars(error).keys() - {"__notes__"}:
                assert getattr(found, name) == getattr(error, name)
