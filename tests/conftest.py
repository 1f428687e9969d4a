"""Hypothesis profiles, and a clean environment for every test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A native example makes contexts and decodes; it is not slow by mistake.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=20, derandomize=True, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("soak", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# Provoked aborts must not wait for a debugger, and threads not spin where cores are few.
os.environ["GGML_NO_BACKTRACE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than some seconds")


@pytest.fixture
def shrink_once_opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Makes a file shorter right after its size was asked for."""
    fstat = os.fstat

    def shrink(path: Path, size: int) -> None:
        def then_shrink(fd: int) -> os.stat_result:
            info = fstat(fd)
            os.truncate(path, size)
            return info

        monkeypatch.setattr(os, "fstat", then_shrink)

    return shrink
