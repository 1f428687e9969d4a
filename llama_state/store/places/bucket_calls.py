"""Calls of obstore: with errors that say what to do, and never where they would hang.

obstore does its work in threads of its own. A fork does not copy them, and so a child waits for
ever where its parent had used obstore: also with a store that it opens itself.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ..._install import pip_install
from ..._io.threads import Threads
from ...errors import UnsupportedError

if TYPE_CHECKING:
    from types import ModuleType

T = TypeVar("T")

OUT_OF_RANGE: Final = errno.ERANGE
"""Of the error for bytes that an object does not have."""

_USED_IN: Final[list[int]] = []  # the process that has sent the first request

_CODE = re.compile(r"<Code>\s*(\w+)")
_MESSAGE = re.compile(r"<Message>\s*([^<]{1,300})")
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_QUERY = re.compile(r"\?[^\s\"')]*")  # where Azure has its signature
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist")
_NO_CREDENTIALS = re.compile(  # where the machines of a cloud ask, when the environment has none
    r"169\.254\.1\d\d\.\d+|/latest/(api/token|meta-data)|computeMetadata|token request"
    r"|/metadata/identity|MissingCredentials"
)
_TIMEOUT = re.compile(r"kind: Timeout|TimedOut|operation timed out")
_REFUSED: Final = frozenset({"401", "403"})


def load_obstore() -> ModuleType:
    """Import obstore.

    Raises:
        UnsupportedError: It is not installed.
    """
    try:
        import obstore
    except ImportError:
        raise UnsupportedError(f"a store in a bucket needs obstore: {pip_install('s3')}") from None
    return obstore


def call(location: str, act: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call obstore.

    Args:
        location: Where the bucket is, for the errors.
        act: A function of obstore.

    Raises:
        FileNotFoundError: There is no such object.
        PermissionError: The server refuses.
        TimeoutError: It did not answer in time.
        OSError: Anything else, and in a process that was forked after obstore was used.
    """
    check_process(location)
    try:
        return act(*arguments, **options)
    except Exception as error:
        failed = _oserror(error, location)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how Rust says that it gives up
            raise
        failed = _oserror(error, location)
    raise failed  # not from the other one, whose text can hold what is secret


def check_process(location: str) -> None:
    """Refuse to use obstore in a process that was forked after it was used.

    Raises:
        OSError: It was.
    """
    here = os.getpid()
    if not _USED_IN:
        _USED_IN.append(here)
    elif _USED_IN[0] != here:
        raise OSError(
            errno.ENOTSUP,
            f"obstore was used in process {_USED_IN[0]} before process {here} was forked from it:"
            " its threads are not in the copy, and a store opened here would hang as well. Start"
            ' processes by spawn or forkserver, as multiprocessing.get_context("spawn") does, or'
            " fork before the first use of the store",
            location,
        )


def together(acts: Sequence[Callable[[], T]], most: int) -> list[T]:
    """Do several things in up to *most* threads, and return what came of each, in that order."""
    if len(acts) < 2:
        return [act() for act in acts]
    with Threads(min(most, len(acts))) as threads:
        answers = [threads.ask(act) for act in acts]
        return [answer.result() for answer in answers]


def _oserror(error: BaseException, location: str) -> OSError:
    text = str(error)
    number, why = _meaning(error, text)
    return OSError(number, why, location)


def _meaning(error: BaseException, text: str) -> tuple[int, str]:
    code = match[1] if (match := _CODE.search(text)) else ""
    status = match[1] if (match := _STATUS.search(text)) else ""
    said = _said(text, code)
    if _NO_BUCKET.search(text):
        return errno.ENODEV, "the bucket does not exist: make it, or correct the URL"
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT, "no such object"
    if code == "RequestTimeTooSkewed":
        return errno.EACCES, "the clocks of this machine and of the server differ: set this one"
    if _NO_CREDENTIALS.search(text):
        return errno.EACCES, (
            "no credentials were found: set those of the service in the environment, as"
            f" AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({said})"
        )
    kind = type(error).__name__
    if status in _REFUSED or kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return errno.EACCES, f"the server refuses: check credentials and rights ({said})"
    if status == "416":
        return OUT_OF_RANGE, "the object has not as many bytes"
    if _TIMEOUT.search(text):
        return (
            errno.ETIMEDOUT,
            "no answer in time: see whether the server is there, or raise deadline=",
        )
    if "without LOCATION" in text or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return errno.ENODEV, f"the bucket is in another region: say region= in the URL ({said})"
    # Not EIO, which would say that the object is damaged.
    return errno.ECONNABORTED, f"the server cannot be used: {said}"


def _said(text: str, code: str) -> str:
    """Return what a person can use of an error's text: nothing of queries, headers, bodies."""
    if code:
        message = match[1].strip() if (match := _MESSAGE.search(text)) else ""
        return f"{code}: {message}" if message else code
    lines = text.strip().splitlines() or [""]
    return _QUERY.sub("", lines[0])[:300]
