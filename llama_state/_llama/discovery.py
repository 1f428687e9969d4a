"""Which libllama: the one that is named, the one in the process, or one that is installed.

Nothing here imports another package: importing could run a back end's start-up code. A package
is only asked where its files are, and ctypes opens the shared object.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .._install import pip_install
from .._io import StrPath
from .._io.arguments import checked
from .._io.locks import Lock
from .._io.platform import libraries
from ..errors import LibraryNotFoundError
from .library import Library

ENVIRONMENT_VARIABLE = "LLAMA_STATE_LIBRARY"
_LLAMA = libraries.library_patterns("llama")
# Packages that bring a libllama along, by the names under which they are imported, and where it
# lies inside the package; none where nothing can call it. They are looked for in this order. A new
# host is one line here.
HOSTS = {
    "xllamacpp": libraries.extension_patterns("xllamacpp"),
    "llama_cpp": tuple(f"lib/{pattern}" for pattern in _LLAMA),
    "llama_cpp_py_sync": _LLAMA,
}
_NOT_EXPORTED = (
    "its xllamacpp.pyd exports nothing but its start, as every module of Python on Windows: use the"
    " llama.dll of llama-cpp-python, or one of your own"
)
# What the loader says of a library that another one needs, and the packages that have it.
_MISSING = re.compile(r"opened: ([^/:]+): cannot open shared object file")
_TOO_NEW = re.compile(r"version `GLIBC_([\d.]+)' not found")
_PACKAGES = {"libgomp.so.1": "Debian, Ubuntu: apt install libgomp1; Fedora: dnf install libgomp"}
_MARK = "llama_state_get_size"

_lock = Lock()
_loaded: dict[Path, Library] = {}


class Candidate(NamedTuple):
    """A place that was looked at: a file to open, or the reason why there is none."""

    source: str
    place: str
    path: Path | None
    why: str = ""


class Verdict(NamedTuple):
    """What became of a candidate: a library, or the reason why not."""

    candidate: Candidate
    library: Library | None
    why: str


@checked
def load_library(path: StrPath | None = None) -> Library:
    """Find a libllama and bind it. The same file gives the same :class:`Library` every time.

    The first of these that is given or found decides: *path*; the environment variable
    ``LLAMA_STATE_LIBRARY``; a libllama that is already loaded in this process; the installed
    ``xllamacpp``, ``llama_cpp`` or ``llama_cpp_py_sync``; the system's ``libllama``. A *path* or
    variable that does not work is an error: nothing else is tried in its place.

    A library whose session version is not known can be used, but its states cannot be read: a
    :class:`VersionWarning` says so.

    Args:
        path: The shared object's file, or a folder that holds one. Relative to the current
            folder, also if it is a name alone.

    Returns:
        The bound library.

    Raises:
        LibraryNotFoundError: Nothing usable; ``tried`` names every place and why it failed.
        UnsupportedError: The process that this one was forked from has loaded it.
    """
    with _lock:
        tried: list[tuple[str, str]] = []
        for verdict in examine(path):
            if verdict.library is not None:
                return verdict.library
            tried.append((verdict.candidate.place, verdict.why))
        raise LibraryNotFoundError(advice(path, tried), tried=tried)


def advice(path: StrPath | None = None, tried: Iterable[tuple[str, str]] = ()) -> str:
    """Say what to do where :func:`load_library` finds nothing for *path*.

    Args:
        path: As there.
        tried: What was tried, and why it failed.
    """
    for place, why in tried:
        if missing := _MISSING.search(why):
            package = f" ({_PACKAGES[missing[1]]})" if missing[1] in _PACKAGES else ""
            return f"{place} needs {missing[1]}, which this system lacks: install it{package}"
        if newer := _TOO_NEW.search(why):
            return (
                f"{place} needs glibc {newer[1]}, and this system's is older: use a libllama that "
                "was built for it, or a newer system"
            )
    if path is not None:
        return (
            "the libllama that was asked for cannot be used; give the file of a shared library "
            "that exports llama.cpp's C API, or leave it out to use one that is installed"
        )
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return (
            f"the libllama that {ENVIRONMENT_VARIABLE} names cannot be used; set it to the file "
            "of a shared library that exports llama.cpp's C API, or unset it to use one that is "
            "installed"
        )
    return f"no usable libllama; install one with: {pip_install('engine')}"


def examine(path: StrPath | None = None) -> Iterator[Verdict]:
    """Try every candidate in order, lazily, and say what became of it."""
    for candidate in candidates(path):
        if candidate.path is None:
            yield Verdict(candidate, None, candidate.why)
            continue
        try:
            yield Verdict(candidate, _open(candidate.path, candidate.source), "")
        except LibraryNotFoundError as error:
            yield Verdict(candidate, None, str(error))


def candidates(path: StrPath | None = None) -> Iterator[Candidate]:
    """Return the places to look at, in order."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if path is not None:
        yield _named("path", os.fspath(path), os.fspath(path))
    elif chosen:
        yield _named("environment", f"{ENVIRONMENT_VARIABLE}={chosen}", chosen)
    else:
        yield Candidate("environment", ENVIRONMENT_VARIABLE, None, "not set")
        yield _in_process()
        for package, patterns in HOSTS.items():
            yield _installed(package, patterns)
        yield _system()


def _named(source: str, place: str, text: str) -> Candidate:
    # The loader searches the system's folders, not this one, for a name that has no slash.
    path = Path(text).absolute()
    if path.is_dir():
        names = [Path(pattern).name for patterns in HOSTS.values() for pattern in patterns]
        return _first(source, place, _in(path, names), "the folder holds no libllama")
    return _first(source, place, [path] if path.exists() else [], "no such file")


def _in_process() -> Candidate:
    place = "already loaded in this process"
    mapped = [
        path
        for path in libraries.loaded_files()
        if "llama" in path.name or not HOSTS.keys().isdisjoint(path.parts)
    ]
    found = [path for path in mapped if _is_loaded(path)]
    return _first("process", place, found, "no libllama is loaded")


def _installed(package: str, patterns: Sequence[str]) -> Candidate:
    place = f"installed package {package}"
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a stand-in in sys.modules that has no spec
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return Candidate(package, place, None, "not installed")
    if not patterns:
        return Candidate(package, place, None, _NOT_EXPORTED)
    folders = map(Path, spec.submodule_search_locations)
    found = [file for folder in folders for file in _in(folder, patterns)]
    return _first(package, place, found, f"has no {patterns[0]}")


def _system() -> Candidate:
    try:
        name = ctypes.util.find_library("llama")
    except OSError:  # it can ask a compiler, which wants a folder for temporary files
        name = None
    if name is None:
        return Candidate("system", "system library llama", None, "not installed")
    return Candidate("system", f"system library {name}", Path(name))


def _first(source: str, place: str, found: list[Path], why: str) -> Candidate:
    if not found:
        return Candidate(source, place, None, why)
    return Candidate(source, place, found[0])


def _in(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files in a folder, by the order of the patterns, and those of one by name."""
    return [file for pattern in patterns for file in sorted(folder.glob(pattern))]


def _is_loaded(path: Path) -> bool:
    """Whether *path* is a libllama that the process has already opened."""
    return hasattr(libraries.loaded_library(path), _MARK)


def _open(path: Path, source: str) -> Library:
    # A name alone is the system's library: a file of that name in the current folder is another
    # one. All else is opened where it really is, so that it finds what lies beside it.
    key = path.resolve() if path.is_absolute() else path
    with _lock:
        if key not in _loaded:
            borrowed = _is_loaded(key)
            try:
                handle = libraries.open_library(key)
            except OSError as error:
                raise LibraryNotFoundError(f"cannot be opened: {error}") from error
            _loaded[key] = Library(handle, key, source, borrowed=borrowed)
            _loaded[key].warn_of_version(stacklevel=5)
        _loaded[key].check_process()
        return _loaded[key]
