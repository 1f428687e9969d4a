"""A restore stays easy to follow: few modules, few calls deep."""

from __future__ import annotations

import pytest

from benchmarks import call_depth

pytestmark = pytest.mark.libllama


def test_load_state_is_easy_to_follow() -> None:
    """At most 12 modules and 10 calls deep, where a room that knows no context counts as one."""
    (found,) = call_depth.walks(["load_state"])
    assert len(found.modules) <= 12, sorted(found.modules)
    assert found.depth <= 10, found.deepest
