"""Objects in a bucket: of S3 and whatever speaks like it, of Google's or Azure's storage.

An object lies at ``prefix/PARENT/KEY-POSITIONS.KIND``, and so what goes on from a prefix is one
listing. A bucket knows when objects were written, and nothing of their use. When a pin ends is in
the name of an empty object beside it, ``….P.MILLISECONDS``, which a listing shows without
another request. All other objects of the bucket are left alone.

Nothing depends on conditional requests, which some servers ignore: what is written twice is the
same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from ..objects import Name
from .backend import Stored, name_of, text_of
from .bucket_calls import OUT_OF_RANGE, call, load_obstore, together
from .remote import Advice, check_size
from .urls import deadline_of

T = TypeVar("T")

PART: Final = 16 << 20
"""The most bytes of one request: more of them are read and written by several at once."""

_SMALLEST: Final = 4 << 20  # smaller parts take longer than one request
_CHUNK: Final = 1 << 18  # copied at once: what is larger has to be gathered first
_AT_ONCE: Final = 4  # large requests
_SMALL_AT_ONCE: Final = 16
_PAGE: Final = 1000  # objects of one answer to a listing
_LONGEST: Final = 3600.0  # seconds
_SERVICES: Final = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
# Option of the URL -> the name that obstore has for it.
_SETTINGS: Final[Mapping[str, Mapping[str, str]]] = {
    "s3": {"endpoint": "endpoint", "region": "region"},
    "gs": {"endpoint": "base_url"},
    "az": {"endpoint": "endpoint", "account": "account_name"},
}
_CREDENTIALS: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_KEY",
}


def open_engine(parts: SplitResult, options: dict[str, str]) -> BucketEngine:
    """Open a bucket; nothing is sent yet.

    Args:
        parts: ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``.
        options: ``endpoint``, ``region`` (of S3), ``account`` (of Azure), ``deadline``.

    Raises:
        ValueError: The URL names no bucket or has a password, or an option is not known.
        UnsupportedError: obstore is not installed.
    """
    scheme = parts.scheme
    settings = _SETTINGS[scheme]
    if "@" in parts.netloc:
        raise ValueError(
            f"a {scheme}: URL must hold no password, since it is shown and logged: set"
            f" {_CREDENTIALS[scheme]} in the environment"
        )
    bucket, prefix = parts.netloc, unquote(parts.path).strip("/")
    if not bucket or ":" in bucket:
        raise ValueError(
            f"{scheme}://{bucket} names no bucket: say {scheme}://bucket/prefix, and the server"
            " as endpoint="
        )
    known = sorted([*settings, "deadline"])
    if unknown := set(options) - set(known):
        raise ValueError(
            f"{scheme}: option {min(unknown)!r} is not known: {', '.join(known)} are. Credentials"
            f" belong into the environment: {_CREDENTIALS[scheme]}"
        )
    seconds = deadline_of(options)
    if not 0 < seconds <= _LONGEST:
        raise ValueError(f"deadline={options['deadline']}: it must be more than 0, up to 1h")
    deadline = timedelta(seconds=seconds)
    endpoint = _endpoint(options["endpoint"]) if "endpoint" in options else ""
    where = [
        f"{name}={options[name].rstrip('/')}" for name in ("endpoint", "account") if name in options
    ]
    location = f"{scheme}://{bucket}/{prefix}".rstrip("/") + "?" * bool(where) + "&".join(where)
    obstore = load_obstore()
    config = {settings[name]: value for name, value in options.items() if name in settings}
    client: dict[str, Any] = {"timeout": deadline, "connect_timeout": deadline}
    if endpoint.startswith("http:"):
        client["allow_http"] = True
    retry = {
        "max_retries": 3,
        "retry_timeout": deadline,
        "backoff": {
            "init_backoff": timedelta(milliseconds=50),
            "max_backoff": timedelta(seconds=1),
            "base": 2,
        },
    }
    try:
        store = getattr(obstore.store, _SERVICES[scheme])(
            bucket,
            prefix=prefix or None,
            config=config,
            client_options=client,
            retry_config=retry,
        )
    except (obstore.exceptions.BaseError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"{location} cannot be opened: {why}") from None
    return BucketEngine(store, location)


def _endpoint(text: str) -> str:
    """Return an endpoint that obstore can use: at others it gives up with a panic."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError("endpoint= must be the URL of a server, as https://host:9000")
    if parts.query or parts.fragment:
        raise ValueError(f"endpoint= must have no query: {parts.scheme}://{parts.netloc}")
    return text.rstrip("/")


class BucketEngine:
    """An :class:`~.remote.Engine` for a bucket.

    Args:
        store: A store of obstore, whose paths are those of our objects.
        location: Where it is.
    """

    best_bytes = PART
    readonly = False

    def __init__(self, store: Any, location: str) -> None:
        self.location = location
        self._store = store
        self._obstore: Any = load_obstore()

    def _call(self, act: Callable[..., T], *arguments: Any, **options: Any) -> T:
        return call(self.location, act, self._store, *arguments, **options)

    # -- reading

    def listed(self, parents: Sequence[bytes]) -> list[Mapping[Name, int]]:
        """See :class:`~.remote.Engine`: one listing for each."""
        return together([partial(self._listed, each) for each in parents], _SMALL_AT_ONCE)

    def _listed(self, parent: bytes) -> Mapping[Name, int]:
        named = ((_name(each["path"]), each["size"]) for each in self._objects(parent.hex()))
        return {name: nbytes for name, nbytes in named if name is not None}

    def heads(self, names: Sequence[Name], nbytes: int) -> list[bytes | None]:
        """See :class:`~.remote.Engine`: one request for each."""
        return together([partial(self._head, each, nbytes) for each in names], _SMALL_AT_ONCE)

    def _head(self, name: Name, nbytes: int) -> bytes | None:
        if nbytes == 0:
            return None if self.size(name) is None else b""
        try:
            get = self._obstore.get_range
            return bytes(self._call(get, _path(name), start=0, length=nbytes))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == OUT_OF_RANGE and self.size(name) == 0:
                return b""
            raise

    def size(self, name: Name) -> int | None:
        """See :class:`~.remote.Engine`."""
        try:
            return int(self._call(self._obstore.head, _path(name))["size"])
        except FileNotFoundError:
            return None

    def read(self, name: Name, buffer: memoryview) -> None:
        """See :class:`~.remote.Engine`: large ones by several requests at once."""
        step = part_size(len(buffer))
        # One that is read at once can be empty, and then has no ranges.
        starts = range(0, len(buffer), step) if len(buffer) > step else [0]
        together([partial(self._read, name, buffer, each, step) for each in starts], _AT_ONCE)

    def _read(self, name: Name, buffer: memoryview, start: int, step: int) -> None:
        part = buffer[start : start + step]
        options = {"range": (start, start + len(part))} if len(part) < len(buffer) else None
        try:
            found = self._call(self._obstore.get, _path(name), options=options)
        except OSError as error:
            if error.errno == OUT_OF_RANGE:  # it ends before
                check_size(buffer, self.size(name) or 0)
            raise
        check_size(buffer, found.meta["size"])
        chunks, at = found.stream(min_chunk_size=_CHUNK), 0
        while (chunk := call(self.location, next, chunks, None)) is not None:
            view = memoryview(chunk)
            check_size(part, max(at + len(view), len(part)))
            part[at : at + len(view)] = view
            at += len(view)
        check_size(part, at)

    def entries(self) -> Iterator[Stored]:
        """See :class:`~.remote.Engine`."""
        pins: list[Stored] = []
        ends: dict[Name, float] = {}
        for each in self._objects(None):
            name, pin = _name(each["path"]), _end(each["path"])
            if pin is not None:
                ends[pin[0]] = max(pin[1], ends.get(pin[0], pin[1]))
            elif name is not None:
                stored = Stored(name, each["size"], each["last_modified"].timestamp())
                if name.kind == "P":
                    pins.append(stored)
                else:
                    yield stored
        for pinned in pins:
            yield Stored(pinned.name, pinned.nbytes, ends.get(pinned.name, pinned.used))

    # -- writing

    def write(self, name: Name, parts: Sequence[memoryview]) -> None:
        """See :class:`~.remote.Engine`: large ones in parts, which nobody sees before the last."""
        large = sum(map(len, parts)) > PART
        self._call(
            self._obstore.put,
            _path(name),
            [*parts],
            use_multipart=large,
            chunk_size=PART,
            max_concurrency=_AT_ONCE,
        )

    def touch(self, names: Sequence[Name], when: float) -> None:
        """See :class:`~.remote.Engine`: only the end of a pin is noted."""
        for pin in names:
            if pin.kind != "P" or self.readonly:
                continue
            paths = [each["path"] for each in self._objects(pin.parent.hex())]
            if _path(pin) not in paths:
                continue
            end = f"{_path(pin)}.{max(round(when * 1000), 0)}"
            self._call(self._obstore.put, end, b"", use_multipart=False)
            self._delete([path for path in _ends_of(pin, paths) if path != end])

    def delete(self, names: Sequence[Name]) -> None:
        """See :class:`~.remote.Engine`."""
        paths = [_path(name) for name in names]
        for pin in names:
            if pin.kind == "P":
                beside = (each["path"] for each in self._objects(pin.parent.hex()))
                paths += _ends_of(pin, beside)
        self._delete(paths)

    def _delete(self, paths: Sequence[str]) -> None:
        try:
            if paths:
                self._call(self._obstore.delete, [*paths])
        except FileNotFoundError:  # S3 says nothing of it; the others say no more than that
            if len(paths) > 1:
                together([partial(self._delete, [path]) for path in paths], _SMALL_AT_ONCE)

    # -- what can be told of it

    def advise(self) -> list[Advice]:
        """See :class:`~.remote.Engine`: a bucket does not tell its rules."""
        began = time.monotonic()
        self._call(self._obstore.list_with_delimiter, "no such folder")
        took = (time.monotonic() - began) * 1000
        return [
            Advice("ok", f"the bucket can be listed; that took {took:.1f} ms"),
            Advice(
                "ok",
                "a bucket keeps everything until it is told otherwise: see that the prefix has a"
                " lifecycle rule by age, and one for uploads that were never completed, or run"
                " 'llama-state store evict' at times",
            ),
        ]

    def _objects(self, folder: str | None) -> Iterator[Any]:
        """Yield what obstore tells of each object in a folder, or of all."""
        stream = self._call(self._obstore.list, folder, chunk_size=_PAGE)
        while chunk := call(self.location, next, stream, None):
            yield from chunk


def part_size(nbytes: int) -> int:
    """Return the bytes of the parts by which so many are read: as many parts as go at once."""
    return min(max(-(-nbytes // _AT_ONCE), _SMALLEST), PART)


def _path(name: Name) -> str:
    return text_of(name).replace("-", "/", 1)


def _name(path: str) -> Name | None:
    """Return the name of an object at *path*; None where it is none of ours."""
    return name_of(path.replace("/", "-", 1)) if path.count("/") == 1 else None


def _end(path: str) -> tuple[Name, float] | None:
    """Return the pin whose end a path is, and when that is."""
    stem, _, end = path.rpartition(".")
    name = _name(stem)
    if name is None or name.kind != "P" or not (end.isascii() and end.isdecimal()):
        return None
    return name, int(end) / 1000


def _ends_of(pin: Name, paths: Sequence[str] | Iterator[str]) -> list[str]:
    return [path for path in paths if (end := _end(path)) is not None and end[0] == pin]
