"""Other systems, by what they lack: this one with its facilities taken away, before a real run.

    python -m tests.systems SYSTEM MODEL FOLDER [REFERENCE]

does in FOLDER everything that touches files, memory and shared libraries, and prints what came of
it as JSON: "works", or the error. Where a folder of a run without any system is given as REFERENCE,
the same files must have come about. ``tests/context/test_platforms.py`` says what is expected.

"darwin" and "win32" lack what these systems lack, and the calls that they have in its place are
made of Linux's here: the real ones are only run by the workflow of GitHub.
"""

from __future__ import annotations

import builtins
import ctypes
import ctypes.util
import errno
import fcntl
import json
import logging
import mmap
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

__all__ = ["OPERATIONS", "SYSTEMS"]

OPTIONS: Final = {"n_ctx": 256, "kv_unified": True, "n_seq_max": 3, "n_threads": 1}
PROMPT: Final = tuple(range(3, 103))
CALLED: Final[list[Any]] = []
"""What a system was asked for, by the calls that it has and Linux has not."""

_flock, _fcntl, _open = fcntl.flock, fcntl.fcntl, os.open
_fallocate = getattr(os, "posix_fallocate", None)  # macOS collects the tests of this, too


# -- systems


def without(owner: object, *names: str) -> None:
    """Take functions and constants away."""
    for name in names:
        if hasattr(owner, name):
            delattr(owner, name)


def no_fcntl() -> None:
    sys.modules["fcntl"] = None  # type: ignore[assignment]


def no_leases() -> None:
    without(fcntl, "F_SETLEASE", "F_GETLEASE", "F_SETSIG")
    without(signal, "SIGURG")


def no_reserving() -> None:
    without(os, "posix_fallocate")


def no_modes() -> None:
    without(os, "fchmod", "geteuid", "getuid")


def no_reading_at() -> None:
    without(os, "pread", "pwrite", "preadv", "pwritev", "sendfile")


def no_mapping_flags() -> None:
    without(mmap, *(name for name in dir(mmap) if name.startswith(("MAP_", "MADV_"))))


def no_pages() -> None:
    """The calls for pages, which are compiled."""
    from llama_state._io import pages

    lib = SimpleNamespace(
        pages_huge=lambda *_: None,
        pages_populate=lambda *_: errno.EINVAL,
        pages_writable=lambda *_: sys.platform != "win32" and real.pages_writable(*_),
    )
    real, pages.lib = pages.lib, lib


def no_links() -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    os.link = link


def no_forks() -> None:
    without(os, "register_at_fork", "fork", "sched_getaffinity")


def no_loaders() -> None:
    without(os, "RTLD_NOLOAD", "memfd_create")


def no_proc() -> None:
    """``/proc``, as in some containers."""

    def missing(path: object) -> None:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def call(real: Callable[..., Any], path: Any, *arguments: Any, **options: Any) -> Any:
        missing(path)
        return real(path, *arguments, **options)

    for owner, name in ((os, "stat"), (os, "open"), (builtins, "open"), (os, "listdir")):
        real = getattr(owner, name)
        setattr(owner, name, partial(call, real))
    sys.addaudithook(lambda event, args: missing(args[0]) if event == "open" else None)


def darwin() -> None:
    """MacOS: dyld is a library that was loaded before, for F_* see there."""
    sys.platform = "darwin"
    for system in (no_leases, no_reserving, no_proc):
        system()
    without(os, "memfd_create", "sched_getaffinity", "sendfile")
    without(mmap, *(name for name in dir(mmap) if name.startswith("MADV_") and "FREE" not in name))
    fcntl.F_FULLFSYNC = 51  # type: ignore[attr-defined]

    def control(file: Any, command: int, argument: Any = 0) -> Any:
        if command == 51:
            CALLED.append("F_FULLFSYNC")
            os.fsync(file)
        elif command == 42:
            # fstore_t of 64-bit macOS: two words of 32 bits, three of 64.
            words = memoryview(argument)
            size = words[16:24].cast("q")[0]
            CALLED.append(["F_PREALLOCATE", *words[:8].cast("i"), words[8:16].cast("q")[0]])
            assert (len(words), os.fstat(file).st_size) == (32, 0)
            assert _fallocate is not None
            _fallocate(file, 0, size)
            os.ftruncate(file, 0)
        else:
            return _fcntl(file, command, argument)
        return argument

    fcntl.fcntl = control
    no_pages()


def win32() -> None:
    """Windows: files that are open or mapped stay, locks are of msvcrt, text is the default."""
    sys.platform = "win32"
    for system in (no_fcntl, no_reserving, no_reading_at, no_modes, no_mapping_flags):
        system()
    no_forks()
    without(os, "RTLD_NOLOAD", "RTLD_LAZY", "memfd_create", "O_CLOEXEC", "O_NONBLOCK")
    without(signal, "SIGURG", "SIGIO")
    os.O_BINARY = 0x8000  # O_LARGEFILE here, which changes nothing
    os.open = opened_as_text
    # How a folder is removed: each call asks up to Python 3.13, the import has asked since.
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    shutil._rmtree_impl = getattr(shutil, "_rmtree_unsafe", None)  # type: ignore[attr-defined]
    os.add_dll_directory = dll_directory  # type: ignore[attr-defined]
    for name in ("replace", "rename", "unlink", "remove", "link"):
        setattr(os, name, refused_while_open(name, getattr(os, name)))
    sys.modules["msvcrt"] = msvcrt = ModuleType("msvcrt")
    msvcrt.LK_NBLCK, msvcrt.locking = 2, locking  # type: ignore[attr-defined]
    ctypes.WinDLL = lambda name: kernel32()  # type: ignore[attr-defined]
    no_pages()


def opened_as_text(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
    """Windows' open: no folders, and a file without O_BINARY would be changed."""
    text = os.fsdecode(path)
    if Path(text).is_dir():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), text)
    # What is made is made by FileIO, which adds O_BINARY itself where there is one.
    binary = flags & (0x8000 | os.O_EXCL)
    if not binary and sys._getframe(1).f_globals["__name__"].startswith("llama_state"):
        CALLED.append(["text mode", text])
    return _open(path, flags, *arguments, **options)


@contextmanager
def dll_directory(path: str) -> Iterator[None]:
    CALLED.append(["add_dll_directory", path])
    yield


def locking(fd: int, mode: int, nbytes: int) -> None:
    """Windows' lock of bytes: nobody else can read them, so none of the content may be locked."""
    assert (mode, nbytes) == (2, 1)
    assert os.lseek(fd, 0, os.SEEK_CUR) > os.fstat(fd).st_size
    CALLED.append("locking")
    try:
        _flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def refused_while_open(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """Windows' call of that name: none of its files may be open or mapped; names are not taken."""

    def call(*paths: Any, **options: Any) -> Any:
        if name == "rename" and os.path.lexists(paths[1]):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), paths[0])
        there = {os.path.realpath(path) for path in paths}
        if used := there & used_files():
            raise PermissionError(errno.EACCES, "used by another process", min(used))
        return real(*paths, **options)

    return call


def used_files() -> set[str]:
    """Return the files that this process has open or mapped."""
    links = Path("/proc/self/fd").iterdir()
    return {str(link.readlink()) for link in links if link.is_symlink()} | mapped_files()


def mapped_files() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[-1] for line in lines if "/" in line}


def kernel32() -> SimpleNamespace:
    """The functions of Windows that list what is loaded."""
    modules = [name for name in sorted(mapped_files()) if ".so" in name]

    class Function(SimpleNamespace):
        def __call__(self, *arguments: Any) -> Any:
            return self.act(*arguments)

    def enumerate_modules(process: int, handles: Any, size: int, needed: Any) -> int:
        needed._obj.value = 8 * len(modules)
        for at in range(min(len(modules), size // 8)):
            handles[at] = at + 1
        return 1

    def file_name(module: Any, text: Any, size: int) -> int:
        text.value = modules[module.value - 1]
        return len(text.value)

    def handle(name: str) -> int:
        return int(name in mapped_files())

    return SimpleNamespace(
        GetCurrentProcess=Function(act=lambda: -1),
        K32EnumProcessModules=Function(act=enumerate_modules),
        GetModuleFileNameW=Function(act=file_name),
        GetModuleHandleW=Function(act=handle),
    )


SYSTEMS: Final[dict[str, Callable[[], None]]] = {
    "linux": lambda: None,
    "no fcntl": no_fcntl,
    "no leases": no_leases,
    "no posix_fallocate": no_reserving,
    "no fchmod": no_modes,
    "no pread": no_reading_at,
    "no MAP_*, MADV_*": no_mapping_flags,
    "no calls for pages": no_pages,
    "no links": no_links,
    "no forks": no_forks,
    "no memfd, RTLD_NOLOAD": no_loaders,
    "no /proc": no_proc,
    "darwin": darwin,
    "win32": win32,
}


# -- operations: each gets a context with a prompt in it, and an empty folder


class Bench:
    """A context, another one, and a folder."""

    def __init__(self, model: Path, folder: Path) -> None:
        import llama_state as ls

        self.ls = ls
        self.folder = folder
        self.model = ls.Model(model)
        self.full, self.other = (self.model.context(**OPTIONS) for _ in range(2))
        for seq_id, tokens in enumerate((PROMPT, PROMPT[:30])):
            self.full.decode(tokens, seq_id)
        self.before = self.full.snapshot()

    def path(self, name: str) -> Path:
        return self.folder / name

    def check(self) -> None:
        """Whether the other context has all that the full one has."""
        assert self.other.snapshot() == self.before
        self.other.clear()


def save(bench: Bench) -> None:
    bench.full.save_state(bench.path("state"), PROMPT)


def save_over(bench: Bench) -> None:
    path = bench.path("over")
    path.write_bytes(bytes(1 << 20))
    path.chmod(0o640)
    bench.full.save_state(path, PROMPT)
    assert path.read_bytes() == bench.path("state").read_bytes()
    assert path.stat().st_mode & 0o777 == 0o640 or not hasattr(os, "fchmod")


def save_without_memory(bench: Bench) -> None:
    path = bench.path("bound")
    path.write_bytes(b"old")
    try:
        bench.full.save_state(path, PROMPT, memory_limit=0)
    except bench.ls.SaveError:
        assert path.read_bytes() == b"old"
        raise
    assert path.read_bytes() == bench.path("state").read_bytes()


def load(bench: Bench) -> None:
    assert bench.other.load_state(bench.path("state")).tokens == PROMPT
    bench.check()


def load_without_memory(bench: Bench) -> None:
    assert bench.other.load_state(bench.path("state"), memory_limit=0).tokens == PROMPT
    bench.check()


def save_sequence(bench: Bench) -> None:
    bench.full.seq_save_state(bench.path("sequence"), 1, PROMPT[:30])
    assert bench.other.seq_load_state(bench.path("sequence"), 1).tokens == PROMPT[:30]
    assert bench.other.seq_snapshot(1) == bench.full.seq_snapshot(1)
    bench.other.clear()


def roll_back(bench: Bench) -> None:
    damaged = bench.full.seq_snapshot(0)[:-1]
    rolled_back = False
    try:
        bench.full.seq_restore(damaged, 0, validate=False)
    except bench.ls.RestoreError as error:
        rolled_back = error.rolled_back
    assert rolled_back
    assert bench.full.snapshot() == bench.before


def checkpoint(bench: Bench) -> None:
    path = bench.path("checkpoint")
    bench.full.checkpoint(0, tokens=PROMPT).save(path)
    loaded = bench.ls.Checkpoint.load(path)
    assert bench.other.resume(loaded, 2).tokens == PROMPT
    loaded.save(path)  # over itself
    assert bench.ls.Checkpoint.load(path).to_bytes() == loaded.to_bytes()
    bench.other.clear()


def save_over_mapped(bench: Bench) -> None:
    path = bench.path("mapped")
    bench.full.checkpoint(0, tokens=PROMPT).save(path)
    loaded = bench.ls.Checkpoint.load(path, mapped=True)
    before = path.read_bytes()
    try:
        bench.full.checkpoint(1, tokens=PROMPT[:30]).save(path)
    finally:
        assert loaded.to_bytes() == before
    assert path.read_bytes() != before


def inspect(bench: Bench) -> None:
    from llama_state import inspection

    for name in ("state", "sequence", "checkpoint"):
        assert inspection.verify_file(bench.path(name)).sound
        text = str(inspection.inspect_file(bench.path(name)).layout)
        bench.path(f"{name}.txt").write_text(text)


def know_the_model(bench: Bench) -> None:
    bench.path("fingerprint").write_text(str(bench.full.fingerprint))


def store(bench: Bench) -> None:
    from llama_state.store import PrefixStore

    with PrefixStore(bench.path("kv"), capacity_bytes=1 << 30, durable=True) as kv:
        assert kv.remember(bench.full, PROMPT).new_tokens
        recalled = kv.recall(bench.other, PROMPT, 1)
        assert recalled.n_past >= 64, recalled
        assert not kv.verify().damaged


def evict_what_is_read(bench: Bench) -> None:
    """What is being read is not lost to the reader; it goes now or, on Windows, next time."""
    from llama_state.store import PrefixStore
    from llama_state.store.places.folder import FolderBackend

    with PrefixStore(bench.path("kv2"), capacity_bytes=1 << 30) as kv:
        kv.remember(bench.full, PROMPT)
        place = FolderBackend(bench.path("kv2"), 1 << 30)
        stored = [*place.entries()]
        with place.open(stored[0].name, stored[0].nbytes) as view:
            before = bytes(view)
            place.evict(0)
            assert bytes(view) == before
        place.set_aside(stored[0].name)
        place.evict(0)
        assert not [*place.entries()]
        assert kv.remember(bench.full, PROMPT).new_tokens


def leftovers(bench: Bench) -> None:
    """What a killed process left goes at the next save, where it can be told by its lock."""
    left = bench.path(".again.part")
    left.write_bytes(b"left")
    os.utime(left, (0, 0))
    bench.full.save_state(bench.path("again"))
    if left.exists():
        raise FileExistsError("stays")


def find_loaded(bench: Bench) -> None:
    from llama_state._llama import discovery

    process = discovery._in_process()
    if process.path is None:
        raise FileNotFoundError(process.why)
    assert process.path == bench.model.library.path
    assert discovery._is_loaded(process.path)


OPERATIONS: Final[tuple[Callable[[Bench], None], ...]] = (
    *(save, save_over, save_without_memory, load, load_without_memory, save_sequence, roll_back),
    *(checkpoint, save_over_mapped, inspect, know_the_model, store, evict_what_is_read),
    *(leftovers, find_loaded),
)


def outcome(operation: Callable[[Bench], None], bench: Bench) -> str:
    """Do it; return "works", or the error."""
    try:
        operation(bench)
    except Exception as error:
        logging.exception(operation.__name__)
        return f"{type(error).__name__}: {error}"
    return "works"


def main(system: str, model: str, folder: str, reference: str = "") -> None:
    """Run one system."""
    if system == "linux":
        Path(folder).mkdir(exist_ok=True)
    SYSTEMS[system]()
    from llama_state._io import atomic, lease

    lease._WORTH_MAPPING = 0  # type: ignore[misc]
    atomic._SLOW_TO_FREE = 1  # type: ignore[misc]
    bench = Bench(Path(model), Path(folder))
    found = {each.__name__: outcome(each, bench) for each in OPERATIONS}
    names = ("state", "sequence", "checkpoint", "fingerprint", "state.txt", "checkpoint.txt")
    differ = [
        name
        for name in names
        if reference and bench.path(name).read_bytes() != Path(reference, name).read_bytes()
    ]
    print(json.dumps({"found": found, "called": CALLED, "differ": differ}))


if __name__ == "__main__":
    main(*sys.argv[1:])
