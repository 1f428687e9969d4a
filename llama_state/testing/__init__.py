"""Tools to test a model, a llama.cpp build, or your own program that saves states.

:mod:`llama_state.testing.strategies` needs hypothesis, and writing models needs gguf: install the
extra ``testing``.
"""

from __future__ import annotations

from .conformance import (
    CONFIGURATIONS,
    NMSE_LIMIT,
    NMSE_LIMITS,
    QUICK,
    Report,
    Row,
    check_model,
    nmse,
    round_trips,
)
from .models import KINDS, write_benchmark_model, write_model, write_probe

__all__ = [
    "CONFIGURATIONS",
    "KINDS",
    "NMSE_LIMIT",
    "NMSE_LIMITS",
    "QUICK",
    "Report",
    "Row",
    "check_model",
    "nmse",
    "round_trips",
    "write_benchmark_model",
    "write_model",
    "write_probe",
]
