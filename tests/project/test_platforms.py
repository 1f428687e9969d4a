"""What systems do differently stays in one module: nothing else asks which system this is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_state

PACKAGE = Path(llama_state.__file__).parent
PLATFORM = PACKAGE / "_io" / "platform"

MODULES = {"fcntl", "msvcrt", "resource", "pwd", "grp", "termios", "winreg", "_winapi", "platform"}
"""Modules that some systems lack, and the one that tells which system it is."""

NAMES = {
    "sys": {"platform", "getwindowsversion"},
    "os": {
        *(
            "name",
            "uname",
            "fsync",
            "fdatasync",
            "link",
            "sync",
            "sysconf",
            "statvfs",
            "getloadavg",
        ),
        *("fchmod", "fchown", "chown", "getuid", "geteuid", "getgid", "umask", "mkfifo"),
        *("pread", "pwrite", "preadv", "pwritev", "readv", "writev", "sendfile", "copy_file_range"),
        *("posix_fallocate", "posix_fadvise", "memfd_create", "sched_getaffinity", "startfile"),
        *("fork", "register_at_fork", "wait", "waitpid", "killpg", "add_dll_directory"),
    },
    "ctypes": {"WinDLL", "windll"},
}
"""Names that some systems lack, or that do less on some."""

PREFIXES = {
    "os": ("O_", "RTLD_", "SF_", "POSIX_"),
    "mmap": ("MAP_", "MADV_", "PROT_"),
    "signal": ("SIGURG", "SIGIO", "SIGUSR", "SIGKILL", "SIGHUP", "SIGALRM", "SIGPIPE"),
}
# Of all systems.
EVERYWHERE = {"O_RDONLY", "O_WRONLY", "O_RDWR", "O_CREAT", "O_EXCL", "O_TRUNC", "O_APPEND"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if PLATFORM not in path.parents)


def strays(text: str) -> Iterator[str]:
    """Yield what a module has of what belongs into the one for it."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import():
                yield from (each.name for each in node.names if each.name in MODULES)
            case ast.ImportFrom(module=str(module), level=0):
                yield from (module for _ in [0] if module in MODULES)
                yield from (each.name for each in node.names if differs(module, each.name))
            case ast.Attribute(attr="madvise"):
                yield "madvise"
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                yield from (f"{owner}.{name}" for _ in [0] if differs(owner, name))
            case ast.Call(func=ast.Name(id="hasattr" | "getattr" as asks), args=[first, *_]):
                if isinstance(first, ast.Name) and first.id in {"os", "sys", "mmap", "signal"}:
                    yield f"{asks}({first.id}, ...)"
            case ast.Call(func=ast.Attribute(attr="CDLL" | "PyDLL")):
                yield "ctypes.CDLL(...)"
            case ast.Constant(value=str(value)) if value.startswith(("/proc", "/dev", "/sys")):
                yield value


def differs(module: str, name: str) -> bool:
    """Whether a module's name is not the same on all systems."""
    known = name in NAMES.get(module, ()) or name.startswith(PREFIXES.get(module, ("\0",)))
    return known and name not in EVERYWHERE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_other_module_knows_systems(path: Path) -> None:
    assert [*strays(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "line",
    [
        "import fcntl",
        "from fcntl import flock",
        "from os import pread",
        "if sys.platform == 'linux': pass",
        "os.name",
        "os.fsync(fd)",
        "mmap.MAP_PRIVATE",
        "memory.madvise(1)",
        "hasattr(os, 'fork')",
        "getattr(os, 'O_CLOEXEC', 0)",
        "ctypes.CDLL('x')",
        "Path('/proc/self/maps')",
        "signal.SIGURG",
        "os.O_NOFOLLOW",
    ],
)
def test_strays_are_seen(line: str) -> None:
    assert [*strays(line)] != []
    assert [*strays("import os, sys, signal\nos.open(p, os.O_RDONLY)\nsignal.SIGINT")] == []


def test_the_module_has_them() -> None:
    """It is looked for where it is: its files have what the others must not."""
    found = {stray for path in PLATFORM.glob("*.py") for stray in strays(path.read_text("utf-8"))}
    assert {"fcntl", "os.pread", "os.fsync", "sys.platform", "/proc/self/maps"} <= found
