"""Hypothesis profiles, and a clean environment for every test."""

from __future__ import annotations

import os

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
