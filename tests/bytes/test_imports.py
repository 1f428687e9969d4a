"""The architecture as a test: imports point down, and the two islands are two."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_state

PACKAGE = Path(llama_state.__file__).parent

# Lower ranks know nothing of higher ones. Everybody may import errors and _types.
RANKS = [
    {"errors", "_types"},
    {"_buffers", "_progress", "_replacing"},
    {"_llama_cffi", "layout", "_files", "_params", "_digests", "_zstd"},
    {"_log", "_gguf", "container", "_opening"},
    {"_library", "fingerprint"},
    {"_discovery", "_handles", "checkpoint"},
    {"_memory", "_transfer", "_facts", "_refusals", "inspection"},
    {"_fitting", "_identity"},
    {"_restoring"},
    {"engine", "state"},
    {"device", "decoding"},
    {"checkpointing"},
    {"context"},
    {"model", "adapters", "aio"},
    {"attaching"},
    {"testing"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
BYTES = {
    *("errors", "_types", "layout", "_buffers", "_files", "_gguf", "_params", "_refusals"),
    *("_digests", "_progress", "_replacing", "_zstd", "container", "fingerprint", "checkpoint"),
    "inspection",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The module or subpackage of llama_state that *path* belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_imports(path: Path) -> Iterator[str]:
    """The modules of llama_state that a file imports, type-checking imports included."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
            yield from (name for name in names if name in RANK)
            # ``from . import __version__`` takes a name of the package itself.
            yield from ("__init__" for name in names if name not in RANK)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    """A module imports only modules of a lower rank."""
    own = room(path)
    for name in own_imports(path):
        if (own, name) in {("cli", "__init__")}:
            continue
        assert RANK[name] < RANK[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_bytes_know_nothing_of_native(path: Path) -> None:
    """Parsers, files and error texts work without any ffi."""
    if room(path) in BYTES:
        assert set(own_imports(path)) <= BYTES


def test_every_module_has_a_rank() -> None:
    """A new file must be given its place."""
    assert {room(path) for path in modules()} <= set(RANK)


def test_the_docs_have_the_same_table() -> None:
    """``docs/architecture.md`` shows the ranks and islands that are enforced here."""
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|(.*)\|(.*)\|$", page, re.MULTILINE)
    shown = {
        int(rank): [set(re.findall(r"`(\w+)/?`", cell)) for cell in cells] for rank, *cells in rows
    }
    assert shown == {rank: [names & BYTES, names - BYTES] for rank, names in enumerate(RANKS)}


def test_importing_loads_no_libllama() -> None:
    """``import llama_state`` opens no shared object but our own and prints nothing."""
    code = (
        "import llama_state\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'xllamacpp' not in maps and 'libllama' not in maps\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
