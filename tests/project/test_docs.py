"""The documentation: its API page is that of the code, its links and test names lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!\w+:)([^)#]*)(?:#([^)]*))?\)")
TEST = re.compile(r"`((?:bytes|native|hosts|fuzz)/\w+\.py)`")


def text_of(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What can stand behind a # in a link to the page: its headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_api_page_is_that_of_the_code() -> None:
    """It was made by ``python docs/make_api.py > docs/api.md``."""
    command = [sys.executable, str(ROOT / "docs" / "make_api.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "api.md").read_text() == done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files, and headings of them."""
    for target, anchor in LINK.findall(text_of(page)):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    """A page that calls a test to witness names its file."""
    for name in TEST.findall(page.read_text()):
        assert (ROOT / "tests" / name).is_file(), name
