"""Where and with what something was measured."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import llama_state as ls


def facts(library: ls.Library, host: str | None, folder: Path) -> dict[str, str]:
    """Return what a reader of the figures must know.

    Args:
        library: The libllama that was measured.
        host: The package that it is part of, None where it is of none.
        folder: Where the files went.

    Returns:
        Name -> text, in the order to show them. Nothing in it names the machine.
    """
    llama = f"session version {library.session_version}"
    if library.build:
        llama = f"build {library.build}, {llama}"
    packages = [name for name in (host, "cffi", "numpy") if name is not None]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{_processor()}, {_cores()} cores, {_memory() / 2**30:.0f} GiB of memory",
        "system": f"{platform.system()} {platform.machine()}, files on {_file_system(folder)}, "
        f"transparent huge pages: {_huge_pages()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "llama_state": ls.__version__,
        "llama.cpp": llama,
        "packages": ", ".join(f"{name} {_version(name)}" for name in packages),
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return named[0] if named else platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _huge_pages() -> str:
    """When the system makes large pages of its own accord: always, madvise, never."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        return "?"
    return setting.read_text(encoding="ascii").partition("[")[2].partition("]")[0]


def _file_system(folder: Path) -> str:
    """Return the type of the file system that *folder* is on: the one mounted nearest above it."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "?"
    above = {str(path) for path in (folder.resolve(), *folder.resolve().parents)}
    rows = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    return max(((len(at), kind) for _, at, kind, *_ in rows if at in above), default=(0, "?"))[1]
