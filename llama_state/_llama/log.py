"""llama.cpp's log: kept quiet, handed to the exception it belongs to and to Python's logging.

The callback itself is C (``include/log_sink.h``): it stores lines, and :class:`LogTap` takes
them after the call on the thread that made it. No Python code ever runs inside llama.cpp.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from .._io.locks import Lock
from .._io.records import logger
from ._llama_cffi import ffi, lib

LOGGER = logger("llama_cpp")

# ggml_log_level: none, debug, info, warning, error; 5 continues the line before.
_LEVELS = (logging.INFO, logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
_CONTINUED = 5


class LogLine(NamedTuple):
    """One line of llama.cpp's log with its level as Python's ``logging`` counts."""

    level: int
    text: str


class LogTap:
    """Collects what one library logs.

    Args:
        api: The library's function table.
        owned: True where no other binding uses the library: our callback is installed for good and
            the lines go to the logger ``llama_state.llama_cpp``. False where another binding
            loaded it: its callback stays served, ours stands in front of it only for the
            length of a call, and only where *readable*.
        readable: The library has ``llama_log_get``.
    """

    def __init__(self, api: Any, *, owned: bool, readable: bool) -> None:
        self._api = api
        # Ours already is where this package was imported before in the process.
        self._owned = owned or (readable and lib.log_sink_installed(api))
        self._readable = readable
        self._lock = Lock()
        self._users: set[object] = set()  # one for each open block
        self._before: tuple[Any, Any] | None = None  # the callback that ours stands in front of
        self._chain = lib.log_sink_chain()
        if owned:
            lib.log_sink_install(api, self._chain)

    @contextmanager
    def capture(self, *, silent: bool = False) -> Iterator[None]:
        """Collect the calling thread's lines inside the block; see :meth:`lines`.

        Args:
            silent: Do not pass lines on to the other binding's callback or to the logger.
        """
        depth, user = lib.log_sink_depth(), object()
        try:
            if not self._owned and self._readable:
                self._step_in(user, silent)
            lib.log_sink_set_depth(depth + 1)
            yield
        finally:
            try:
                stored = lib.log_sink_size(False) or lib.log_sink_size(True)
                if self._owned and not silent and stored:
                    _hand_on([*_stored(shared=False), *_stored(shared=True)])
            finally:  # a handler may raise
                lib.log_sink_set_depth(depth)
                if not self._owned and self._readable:
                    self._step_out(user)

    def lines(self) -> tuple[str, ...]:
        """Take what this thread's calls have logged so far: warnings and errors."""
        if not lib.log_sink_size(False):
            return ()
        stored = _stored(shared=False)
        if self._owned:
            _hand_on(stored)
        return tuple(line.text for line in stored if line.level >= logging.WARNING)

    def _step_in(self, user: object, silent: bool) -> None:
        with self._lock:
            self._users.add(user)
            # A second thread finds ours already in place and must not chain it to itself.
            if len(self._users) == 1 and not lib.log_sink_installed(self._api):
                following, data = ffi.new("ggml_log_callback *"), ffi.new("void **")
                lib.llama_log_get(self._api, following, data)
                self._before = (following[0], data[0])
                self._chain.next = ffi.NULL if silent else following[0]
                self._chain.next_data = data[0]
                lib.log_sink_install(self._api, self._chain)

    def _step_out(self, user: object) -> None:
        with self._lock:
            self._users.discard(user)
            if not self._users and self._before is not None:
                before, self._before = self._before, None
                # Where the other binding has set a new callback meanwhile, that one stays.
                if lib.log_sink_installed(self._api):
                    lib.llama_log_set(self._api, *before)


def _hand_on(lines: Iterable[LogLine]) -> None:
    for line in lines:
        LOGGER.log(line.level, "%s", line.text)


def _stored(*, shared: bool) -> list[LogLine]:
    size = lib.log_sink_size(shared)
    out = ffi.new("char[]", size)
    taken = lib.log_sink_take(shared, out, size)
    return parse(bytes(ffi.buffer(out, taken)))


def parse(stored: bytes) -> list[LogLine]:
    """Turn the sink's records (level digit, text, NUL) into lines, continuations joined."""
    lines: list[LogLine] = []
    open_line = False
    for record in stored.split(b"\0")[:-1]:
        level, text = record[0] - ord("0"), record[1:].decode("utf-8", "replace")
        if level == _CONTINUED and lines and open_line:
            lines[-1] = LogLine(lines[-1].level, lines[-1].text + text)
        else:
            lines.append(LogLine(_LEVELS[level if level < _CONTINUED else 0], text))
        open_line = not text.endswith("\n")
    return [LogLine(line.level, text) for line in lines if (text := line.text.strip())]
