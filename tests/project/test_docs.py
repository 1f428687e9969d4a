"""The documentation: its links and the names of tests lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!\w+:)([^)#]*)(?:#([^)]*))?\)")
TEST = re.compile(
    r"`((?:adapters|checkpoint|cli|context|fuzz|inspection|io|layout|llama|project|real|servers|store|testing)"
    r"/test_\w+\.py)`"
)
# Files of the package as the page on architecture names them.
MODULE = re.compile(r"`((?:\w+/)+\w*(?:\.py)?)`")
OUTSIDE = ("tests/", "include/", "examples/", "benchmarks/", "llama_state/")


def text_of(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What can stand behind a # in a link to the page: its headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files, and headings of them."""
    for target, anchor in LINK.findall(text_of(page)):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_are_named_exist(page: Path) -> None:
    """A page that calls a test to witness names its file."""
    for name in TEST.findall(page.read_text()):
        assert (ROOT / "tests" / name).is_file(), name


def test_files_that_the_architecture_names_exist() -> None:
    """The page says in which file to look."""
    names = set(MODULE.findall((ROOT / "docs" / "architecture.md").read_text()))
    assert len(names) > 20
    for name in names:
        folder = ROOT if name.startswith(OUTSIDE) else ROOT / "llama_state"
        assert (folder / name).exists(), name
