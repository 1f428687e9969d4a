"""No signal skips what a block does at its end, on any Python."""

from __future__ import annotations

import sys

import pytest

from tests import handlers

SKIPS = sys.version_info[:2] in [(3, 12), (3, 13), (3, 14)]

BAD = """
def loop_of_a_condition(lock, names):
    with lock:
        for name in names:
            if name:
                lock.note(name)

def comprehension(names):
    try:
        return [name for name in names if name]
    finally:
        names.close()
"""

GOOD = """
def loop_elsewhere(lock, names):
    with lock:
        return loop(names)

def loop(names):
    for name in names:
        if name:
            return name

def loop_in_a_generator_manager(names):
    with generator(names):
        for name in names:
            if name:
                names.note(name)
"""


def test_none_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    ended = handlers.main()
    found = capsys.readouterr().out
    assert ended == 0, f"give the loop a function of its own: {found}"
    assert "0 loops" in found


def test_it_finds_them() -> None:
    found = set(handlers.skipped_of(BAD, set()))
    assert len(found) == (2 if SKIPS else 0)
    assert not set(handlers.skipped_of(GOOD, {"generator"}))
