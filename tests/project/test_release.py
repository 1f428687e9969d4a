"""What is released: tag, version and changelog agree, and an index can show the README."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llama_state

ROOT = Path(__file__).parents[2]
CHANGELOG = "# Changelog\n\n## {}\n\n### Added\n\n## 0.1.0 (2026-01-31)\n"


@pytest.mark.parametrize(
    ("tag", "heading", "problem"),
    [
        ("v0.2.0", "0.2.0 (2026-12-01)", ""),
        ("v0.3.0", "0.2.0 (2026-12-01)", "the tag is v0.3.0, the version 0.2.0"),
        ("v0.2.0", "Unreleased", "the changelog begins with 'Unreleased', not '0.2.0' and a date"),
        ("v0.2.0", "0.2.0", "the changelog begins with '0.2.0', not '0.2.0' and a date"),
    ],
)
def test_a_tag_is_compared(tmp_path: Path, tag: str, heading: str, problem: str) -> None:
    """Only a tag of the version whose section in the changelog has a date is released."""
    for name in (".ci", "llama_state", "docs"):
        (tmp_path / name).mkdir()
    checks = tmp_path / ".ci" / "checks.py"
    checks.write_text((ROOT / ".ci" / "checks.py").read_text())
    (tmp_path / "llama_state" / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (tmp_path / "docs" / "changelog.md").write_text(CHANGELOG.format(heading))
    done = subprocess.run(
        [sys.executable, checks, "release", tag], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (bool(problem), problem)


def test_the_metadata_is_that_of_the_tree() -> None:
    """The version is the package's, and every link of the README names its site."""
    asked = [sys.executable, "setup.py", "-q", "--version", "--long-description"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    version, _, readme = done.stdout.partition("\n")
    assert version == llama_state.__version__
    links = re.findall(r"\]\((.*?)\)", re.sub(r"(?ms)^```.*?^```$", "", readme))
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []


def test_the_address_is_the_same_everywhere() -> None:
    """Where the project is to be found is decided in pyproject.toml."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert all(url.startswith(urls["Source"]) for url in urls.values())
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^repository-code: (.*)$", citation) == [urls["Source"]]
