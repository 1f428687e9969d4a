"""One loaded libllama: its function table, what it can do, which state formats it writes."""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from .._io import forks
from .._io.platform.memory import memory_file
from ..errors import LibraryNotFoundError, UnsupportedError, VersionWarning
from ..layout import SEQUENCE_VERSION
from ._llama_cffi import ffi, lib
from .log import LogTap
from .params import model_offsets

# What not every supported libllama has, and the functions that make it up.
CAPABILITIES: Final[Mapping[str, tuple[str, ...]]] = {
    "backend-plugins": ("ggml_backend_load_all",),
    "backend-folder": ("ggml_backend_reg_count", "ggml_backend_load_all_from_path"),
    "log-get": ("llama_log_get",),
    "state-flags": (
        "llama_state_seq_get_size_ext",
        "llama_state_seq_get_data_ext",
        "llama_state_seq_set_data_ext",
    ),
    "version": ("llama_version",),
    "commit": ("ggml_commit",),
}
_OPTIONAL = frozenset(name for names in CAPABILITIES.values() for name in names)
# Functions of llama.cpp in the order in which it got them. It still has every one of them.
_HISTORY = (
    "llama_state_get_data",
    "llama_model_load_from_file",
    "llama_get_memory",
    "llama_model_is_hybrid",
    "llama_n_ctx_seq",
)
_PROBE_MODEL = Path(__file__).with_name("probe.gguf")
_SEQUENCE_BLOB_MAGIC: Final = 0xAF143CD8


class Library:
    """A libllama that is loaded in this process.

    Made by :func:`llama_state.load_library`. Handles of one library are never given to another.

    Attributes:
        path: The shared object's file.
        source: How it was found: ``"path"``, ``"environment"``, ``"process"``, ``"system"``, or the
            package that brings it, as ``"xllamacpp"`` or ``"llama_cpp"``.
        capabilities: The names in ``CAPABILITIES`` whose functions it has.
        session_version: The version of the session files that it writes (9, 10 or 11 so far; the
            states of others cannot be read).
        sequence_version: The version of its sequence files (2, 3 or 4 so far).
        sequence_head: Whether its sequence blobs begin with an 8-byte head (builds before May
            2026 write none).
    """

    def __init__(self, handle: ctypes.CDLL, path: Path, source: str, *, borrowed: bool) -> None:
        self.path = path
        self.source = source
        self._pid = os.getpid()
        self.api: Any
        self.api, missing = _bind(handle)
        if missing - _OPTIONAL:
            raise LibraryNotFoundError(f"{path} {_what_is_wrong(missing)}")
        self.capabilities: frozenset[str] = frozenset(
            name for name, functions in CAPABILITIES.items() if missing.isdisjoint(functions)
        )
        readable = "log-get" in self.capabilities
        self.log: LogTap = LogTap(self.api, owned=not borrowed, readable=readable)
        self._start(borrowed=borrowed)
        self.session_version: int
        self.sequence_version: int
        self.sequence_head: bool
        self.session_version, self.sequence_version, self.sequence_head = self._probe()

    def __repr__(self) -> str:
        return (
            f"<Library {str(self.path)!r} from {self.source}, session version "
            f"{self.session_version}, sequence version {self.sequence_version}>"
        )

    def __reduce__(self) -> Any:
        raise TypeError("a Library belongs to its process and cannot be pickled")

    def check_process(self, what: str = "library") -> None:
        """Raise UnsupportedError in another process than the one that loaded it.

        Args:
            what: What of it is used, for the error.
        """
        forks.check_process(self._pid, what)

    def require(self, capability: str) -> None:
        """Raise UnsupportedError unless this library has *capability*."""
        if capability not in self.capabilities:
            raise UnsupportedError(
                f"{self.path} has no {capability} (it lacks {', '.join(CAPABILITIES[capability])})"
            )

    @property
    def build(self) -> str:
        """What the library says of its own version, or an empty string where it says nothing."""
        for capability, function in (("version", lib.llama_version), ("commit", lib.ggml_commit)):
            if capability in self.capabilities:
                text = ffi.string(function(self.api)).decode("utf-8", "replace")
                return "" if text == "unknown" else text
        return ""

    def warn_of_version(self, *, stacklevel: int) -> None:
        """Warn with a VersionWarning where states of the library's version cannot be read.

        Args:
            stacklevel: As of ``warnings.warn`` in the caller.
        """
        if not self._is_known:
            warnings.warn(f"{self._unknown}; update llama_state", VersionWarning, stacklevel + 1)

    def require_known_version(self) -> None:
        """Raise UnsupportedError where states of the library's version cannot be read."""
        if not self._is_known:
            raise UnsupportedError(self._unknown)

    @property
    def _is_known(self) -> bool:
        return (self.session_version, self.sequence_version) in SEQUENCE_VERSION.items()

    @property
    def _unknown(self) -> str:
        known = ", ".join(map(str, SEQUENCE_VERSION))
        return (
            f"{self.path} writes states of session version {self.session_version} and sequence "
            f"version {self.sequence_version}, which this llama_state does not know (it knows the "
            f"session versions {known}): they can be saved, but restored only unchecked, with "
            "validate=False"
        )

    def _start(self, *, borrowed: bool) -> None:
        with self.log.capture():
            if not borrowed:
                if "backend-plugins" in self.capabilities:
                    lib.ggml_backend_load_all(self.api)
                lib.llama_backend_init(self.api)
            self._load_plugins_beside()

    def _load_plugins_beside(self) -> None:
        """Load the back ends in the library's folder, where none is there yet.

        llama.cpp itself looks for plug-ins beside the program, which is Python.
        """
        if "backend-folder" not in self.capabilities or not self.path.is_absolute():
            return
        if not lib.ggml_backend_reg_count(self.api):
            lib.ggml_backend_load_all_from_path(self.api, os.fsencode(self.path.parent))

    def _probe(self) -> tuple[int, int, bool]:
        """Learn the formats from the library itself, with an empty context of a 4 kB model."""
        with self.log.capture(silent=True), self._probe_context() as ctx:
            with _scratch_file() as file:
                name = os.fsencode(file)
                lib.llama_state_save_file(self.api, ctx, name, ffi.NULL, 0)
                session = _file_version(file)
                lib.llama_state_seq_save_file(self.api, ctx, name, 0, ffi.NULL, 0)
                sequence = _file_version(file)
            blob = ffi.new("uint8_t[]", lib.llama_state_seq_get_size(self.api, ctx, 0))
            lib.llama_state_seq_get_data(self.api, ctx, blob, len(blob), 0)
            head = bytes(ffi.buffer(blob))[:4] == struct.pack("<I", _SEQUENCE_BLOB_MAGIC)
        return session, sequence, head

    @contextmanager
    def _probe_context(self) -> Iterator[Any]:
        params = lib.llama_model_default_params(self.api)
        block = ffi.buffer(ffi.addressof(params))
        # A GPU is not worth waking for a model of one layer; unknown layouts keep the default.
        with suppress(UnsupportedError):
            struct.pack_into("<i", block, model_offsets(bytes(block))["n_gpu_layers"], 0)
        model = lib.llama_model_load_from_file(self.api, os.fsencode(_PROBE_MODEL), params)
        try:
            ctx = model and lib.llama_init_from_model(
                self.api, model, lib.llama_context_default_params(self.api)
            )
            if not ctx:
                lines = [("llama.cpp", line) for line in self.log.lines()]
                raise LibraryNotFoundError(f"{self.path} cannot load a model", tried=lines)
            try:
                yield ctx
            finally:
                lib.llama_free(self.api, ctx)
        finally:
            if model:
                lib.llama_model_free(self.api, model)


def _bind(handle: ctypes.CDLL) -> tuple[Any, frozenset[str]]:
    """Return a filled function table, and the names that *handle* does not export."""
    table = ffi.new("struct llama_api *")
    missing = set()
    for name, field in ffi.typeof("struct llama_api").fields:
        try:
            address = ctypes.cast(getattr(handle, name), ctypes.c_void_p).value
        except AttributeError:
            missing.add(name)
        else:
            setattr(table, name, ffi.cast(field.type, address))
    return table, frozenset(missing)


def _what_is_wrong(missing: frozenset[str]) -> str:
    """Say of a library that lacks what is needed what it is, as far as its functions tell."""
    lacks = f"lacks {', '.join(sorted(missing - _OPTIONAL))}"
    there = [name not in missing for name in _HISTORY]
    if not any(there):
        return f"is no libllama: it {lacks}"
    if all(there):
        return lacks
    earlier = there.index(False)
    if True in there[earlier:]:
        later = there.index(True, earlier)
        return (
            "is a fork of llama.cpp, which cannot be used in its place: it has "
            f"{_HISTORY[later]}, but not the older {_HISTORY[earlier]}; it {lacks}"
        )
    return f"is a llama.cpp that is too old: it has no {_HISTORY[earlier]} yet; it {lacks}"


@contextmanager
def _scratch_file() -> Iterator[Path]:
    """Yield a file for the library to write: in memory if possible, as no folder may be usable.

    Raises:
        LibraryNotFoundError: It can be made nowhere.
    """
    if (memory := memory_file("llama_state-probe")) is not None:
        with memory[0]:
            yield memory[1]
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="llama_state-")
    except OSError as error:
        reason = f"there is no folder for its temporary files: {error.strerror}; set TMPDIR"
        raise LibraryNotFoundError(reason) from error
    with folder:
        yield Path(folder.name, "probe")


def _file_version(file: Path) -> int:
    """Return the format version in the file that llama.cpp has just written: its second word."""
    version: int = struct.unpack_from("<II", file.read_bytes())[1]
    return version
