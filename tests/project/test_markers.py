"""What the markers say is so: ``-m 'not libllama'`` leaves out only what needs a libllama."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
MARKED = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.(libllama|real_model)\b", re.MULTILINE)


def imported(path: Path) -> set[Path]:
    """The other files of the tests that are imported with this one, by these too."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        for node in ast.parse(waiting.pop().read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                file = ROOT / f"{str(node.module).replace('.', '/')}.py"
                if file.exists() and file not in found:
                    found.add(file)
                    waiting.append(file)
    return found


def test_some_modules_load_the_library() -> None:
    """And the others do not: what the next test looks for is there to be found."""
    loading = [path for path in TESTS if ROOT / "tests" / "libllama.py" in imported(path)]
    assert 20 < len(loading) < len(TESTS) - 20


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_a_module_that_loads_the_library_is_marked_whole(path: Path) -> None:
    """Without a libllama it is skipped whole, so all of it has to need one."""
    if ROOT / "tests" / "libllama.py" in imported(path):
        text = path.read_text(encoding="utf-8")
        assert MARKED.search(text), f"{path.name} is not marked libllama"
