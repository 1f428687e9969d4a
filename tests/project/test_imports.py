"""The architecture as a test: imports go one way between the rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_state

PACKAGE = Path(llama_state.__file__).parent

# A room imports rooms above it only, and everybody may import errors.
ROOMS = (
    "errors",
    "_install",
    "_io",
    "layout",
    "_llama",
    "checkpoint",
    "store",
    "context",
    "aio",
    "inspection",
    "adapters",
    "testing",
    "pytest_plugin",
    "cli",
    "__init__",
)
# These work where no libllama is and no extension was built, and so import only each other.
BYTES = {"errors", "_install", "_io", "layout", "checkpoint", "store", "inspection"}
# Modules that only hand on the names of a room, for those who imported them before it was one.
OLD_NAMES = {"container": "checkpoint", "fingerprint": "checkpoint"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The room that a file of the package is in; ``python -m`` of any room is a command."""
    if path.name == "__main__.py":
        return "cli"
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return OLD_NAMES.get(name, name)


def imported(path: Path) -> Iterator[str]:
    """The other rooms that a file imports, inside functions and for type checking too."""
    package = ["llama_state", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = [*start, *(node.module.split(".") if node.module else [])]
            names = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "llama_state":
                # ``from . import __version__`` takes a name of the package itself.
                other = OLD_NAMES.get(name[1], name[1]) if len(name) > 1 else "__init__"
                yield other if other in ROOMS else "__init__"


def test_every_file_is_in_a_room() -> None:
    """A new file at the top of the package is a new room: give it its place."""
    assert {room(path) for path in MODULES} == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    """A room imports the rooms above it in the list; what needs no llama.cpp, only its like."""
    own = room(path)
    above = set(ROOMS[: ROOMS.index(own) + 1])
    allowed = above & BYTES if own in BYTES else above
    if own == "cli":
        allowed.add("__init__")  # its public names
    assert set(imported(path)) - {own} <= allowed


@pytest.mark.linux
def test_importing_loads_no_libllama() -> None:
    """``import llama_state`` opens no shared object but our own and prints nothing."""
    code = (
        "import llama_state\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'xllamacpp' not in maps and 'libllama' not in maps\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
