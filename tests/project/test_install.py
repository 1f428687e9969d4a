"""How the package is installed: its extras, and what messages and pages tell the reader."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from llama_state._install import pip_install

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Where a reader can meet a command: the messages, the pages, the examples, the workflows.
PLACES = ("*.md", "*.py", "*.yml", ".github", "benchmarks", "docs", "examples", "llama_state")
TOLD = sorted(
    path
    for place in PLACES
    for found in ROOT.glob(place)
    for path in (found.rglob("*") if found.is_dir() else [found])
    if path.suffix in {".md", ".py", ".pyi", ".yml", ".ipynb", ".html"}
)
# The package by its name, which an index would be asked for: no address follows it.
STRAY = re.compile(
    r"pip install (?:(?!in |&& )\S+ )*?[\"']?llama[-_]state\b(?!(?:\[.*?\])? @ git\+https:)"
)
OF_A_CHECKOUT = re.compile(r"pip install[^\n]*?\.\[([\w,-]+)\]")


def names(requirements: list[str]) -> set[str]:
    """The packages that requirements name; what an extra of ours brings is named by it."""
    return {re.match(r"[\w-]+", each)[0] for each in requirements}  # type: ignore[index]


def rows() -> dict[str, str]:
    """The table of the guide: extra -> what it installs."""
    text = (ROOT / "docs" / "guide.md").read_text()
    lines = re.findall(
        r"^\| `([\w-]+)` \| (.*?) \|", text.partition("## Models and contexts")[0], re.MULTILINE
    )
    assert len(lines) == len(dict(lines))
    return dict(lines)


def test_the_table_has_every_extra() -> None:
    """Each once, in the order of pyproject.toml."""
    assert list(rows()) == list(EXTRAS)


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_table_has_every_package(extra: str) -> None:
    """What an extra installs, and nothing else."""
    installs = set(re.findall(r"`([\w-]+)`", rows()[extra]))
    own = {name for each in EXTRAS[extra] for name in extras_of(each)}
    parts = {name for name in names(EXTRAS[extra]) if re.search(r"-part\d+$", name)}
    assert installs == own | (names(EXTRAS[extra]) - {"llama-state"} - parts)


def extras_of(requirement: str) -> list[str]:
    """The extras of the package itself that a requirement names."""
    found = re.match(r"llama-state\[(.*)\]", requirement)
    return found[1].split(",") if found else []


def test_all_brings_what_users_need() -> None:
    """Every extra but the binding that is compiled for minutes, and those for work on this."""
    of_the_project = {"real", "test", "browser", "docs", "lint", "workflows", "release", "dev"}
    (everything,) = EXTRAS["all"]
    assert {*extras_of(everything), "all", "llama-cpp-python"} == set(EXTRAS) - of_the_project


@pytest.mark.parametrize("path", TOLD, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_index_is_asked_for_the_package(path: Path) -> None:
    """Commands install from a checkout or an address, with extras that there are."""
    text = path.read_text()
    assert STRAY.findall(text) == []
    for extras in OF_A_CHECKOUT.findall(text):
        assert set(extras.split(",")) <= set(EXTRAS)


@pytest.mark.parametrize(
    ("command", "is_stray"),
    [
        ("pip install llama-state", True),
        ("pip install 'llama-state[zstd]'", True),
        ("pip install --force-reinstall llama_state", True),
        ('pip install pytest "llama-state[engine]"', True),
        ('pip install pytest "llama-state[engine] @ git+https://example.org/x"', False),
        ("pip install -e '.[zstd]' in a checkout of llama_state", False),
        ("pip install -e . && llama-state demo", False),
        ("pip install llama-cpp-python", False),
    ],
)
def test_what_a_stray_is(command: str, is_stray: bool) -> None:
    """The name alone, however it is written."""
    assert bool(STRAY.search(command)) is is_stray


def test_messages_lead_to_a_checkout() -> None:
    """With and without extras; each message that names one has it from here."""
    assert pip_install() == "pip install -e . in a checkout of llama_state"
    assert pip_install("a", "b") == "pip install -e '.[a,b]' in a checkout of llama_state"
    text = "".join(path.read_text() for path in (ROOT / "llama_state").rglob("*.py"))
    assert set(re.findall(r"pip_install\([\"'](\w+)[\"']\)", text)) <= set(EXTRAS)
    assert len(re.findall(r"pip install", text.replace("pip install cffi", ""))) == 1
