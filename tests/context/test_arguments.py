"""Whatever is passed: an error that names the argument, and nothing has changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .argument_cases import ALL, DANGEROUS, World, rows, wrongs

pytestmark = pytest.mark.libllama


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("arguments"))
    yield made
    made.close()


def test_every_function_has_a_valid_call(world: World) -> None:
    """A new public function needs one."""
    assert set(ALL.names) - set(world.calls()) - {"describe"} == set()


@pytest.mark.parametrize("name", ALL.names)
def test_every_parameter_has_a_row(name: str) -> None:
    """A new parameter needs a row: what it may not be."""
    assert [one for one, bad in rows(name, ALL.functions[name]).items() if bad is None] == []


@pytest.mark.parametrize("name", [n for n in ALL.names if n not in (*DANGEROUS, "describe")])
def test_bad_values_are_refused(world: World, name: str) -> None:
    """The error is ours, a ValueError or a TypeError, and names the argument."""
    assert wrongs(world, name, ALL.functions[name]) == []


@pytest.mark.parametrize("name", DANGEROUS)
def test_bad_values_do_not_kill(name: str) -> None:
    """What llama.cpp would abort on does not reach it."""
    command = [sys.executable, "-m", "tests.context.argument_cases", name]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr[-500:]
