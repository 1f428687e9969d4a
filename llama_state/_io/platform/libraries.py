"""Shared libraries: what their files are called, which are loaded, and how one is loaded."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any


def library_patterns(name: str) -> tuple[str, ...]:
    """Return how files of a shared library are called, what a linker takes first."""
    if sys.platform == "win32":
        return f"{name}.dll", f"lib{name}.dll"
    if sys.platform == "darwin":
        return f"lib{name}.dylib", f"lib{name}.*.dylib", f"lib{name}.so"
    return f"lib{name}.so", f"lib{name}.so.*"


def extension_patterns(name: str) -> tuple[str, ...]:
    """Return how a compiled module of Python is called, where others can call what is in it.

    On Windows a module exports nothing but its start.
    """
    return () if sys.platform == "win32" else (f"{name}*.so",)


def loaded_files() -> list[Path]:
    """Return the files of the shared libraries of this process, as far as the system lists them."""
    if sys.platform == "win32":
        return _loaded_modules()
    if sys.platform == "darwin":
        return _loaded_images()
    try:
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes())
    except OSError:
        return []
    names = {line.split(maxsplit=5)[-1] for line in maps.split("\n") if line.count("/")}
    return sorted(Path(name) for name in names if ".so" in name)


def _loaded_images() -> list[Path]:
    """Return what macOS's loader has loaded. Another thread can unload one meanwhile: None then."""
    dyld = ctypes.CDLL(None)
    dyld._dyld_image_count.restype = ctypes.c_uint32
    dyld._dyld_get_image_name.restype = ctypes.c_char_p
    dyld._dyld_get_image_name.argtypes = [ctypes.c_uint32]
    names = map(dyld._dyld_get_image_name, range(dyld._dyld_image_count()))
    return sorted({Path(os.fsdecode(name)) for name in names if name})


def _loaded_modules() -> list[Path]:
    """Return what Windows' loader has loaded."""
    kernel = _kernel()
    room = 1024
    while True:
        handles = (ctypes.c_void_p * room)()
        needed = ctypes.c_uint32()
        size = ctypes.sizeof(handles)
        process = kernel.GetCurrentProcess()
        if not kernel.K32EnumProcessModules(process, handles, size, ctypes.byref(needed)):
            return []
        if needed.value <= size:
            break
        room = needed.value // ctypes.sizeof(ctypes.c_void_p)
    text = ctypes.create_unicode_buffer(32768)
    found = set()
    for handle in handles[: needed.value // ctypes.sizeof(ctypes.c_void_p)]:
        if kernel.GetModuleFileNameW(ctypes.c_void_p(handle), text, len(text)):
            found.add(Path(text.value))
    return sorted(found)


def _kernel() -> Any:
    kernel = getattr(ctypes, "WinDLL")("kernel32")  # noqa: B009  # only Windows has the name
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.GetModuleHandleW.restype = ctypes.c_void_p
    kernel.GetModuleHandleW.argtypes = [ctypes.c_wchar_p]
    kernel.GetModuleFileNameW.argtypes = [ctypes.c_void_p, ctypes.c_wchar_p, ctypes.c_uint32]
    kernel.K32EnumProcessModules.argtypes = (
        [ctypes.c_void_p] * 2 + [ctypes.c_uint32] + [ctypes.c_void_p]
    )
    return kernel


def loaded_library(path: Path) -> ctypes.CDLL | None:
    """Return the library of a file if it is in this process already."""
    if sys.platform == "win32":
        return ctypes.CDLL(str(path)) if _kernel().GetModuleHandleW(str(path)) else None
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None


def open_library(path: Path) -> ctypes.CDLL:
    """Load a shared library, with those that lie beside it and that it needs.

    Raises:
        OSError: It is none, or something that it needs is missing.
    """
    if sys.platform == "win32" and path.is_absolute():
        with os.add_dll_directory(str(path.parent)):
            return ctypes.CDLL(str(path))
    return ctypes.CDLL(str(path))
