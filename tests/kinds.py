"""What the memory of each kind of tiny model can do, and how much of it is tried."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

import hypothesis
from hypothesis import settings
from hypothesis.strategies import SearchStrategy

import llama_state as ls

Test: TypeAlias = Callable[..., None]

ENDS_ONLY = frozenset({"deepseek4", "jamba", "lfm2", "mamba2", "qwen3next", "qwen4exp"})
"""Something runs beside the cells, or instead of them: no part of a sequence can be removed."""

WINDOWS = {"dots3note": 32, "gemma3": 32}
"""The window that decides how far a sequence can be cut back."""

ALL_WINDOWS = {**WINDOWS, "deepseek4": 32, "lfm2": 32}
"""The window of every model that has one."""

PARTIAL = ENDS_ONLY - {"mamba2"} | WINDOWS.keys()
"""A partial state leaves something out."""

K_ONLY = frozenset({"deepseek2", "deepseek32", "deepseek4", "dots3note"})
"""No cache keeps V, so there is one type for both."""

OWN_STREAMS = frozenset({"deepseek4"})
"""Each sequence has a stream of its own, in a unified context too."""

UNCOUNTED = frozenset({"deepseek32", "deepseek4", "dots3note", "minimax-m3", "qwen2vl", "qwen4exp"})
"""It is never certain that enough cells are free."""

FIGURES = {
    "deepseek2": 2.4e-13,
    "deepseek32": 7.0e-14,
    "deepseek4": 1.8e-6,
    "dots3note": 5.5e-7,
    "gemma3": 1.2e-6,
    "jamba": 3.5e-13,
    "lfm2": 1.7e-6,
    "llama": 1.0e-13,
    "mamba2": 0.0,
    "minimax-m3": 1.2e-13,
    "qwen2vl": 8.6e-14,
    "qwen3next": 2.6e-14,
    "qwen4exp": 4.9e-14,
}
"""Worst error of a conformance check with the newest wheel of xllamacpp."""

HOST_FIGURES = {"deepseek32": 4.2e-10, "minimax-m3": 1.5e-9, "qwen2vl": 6.2e-10}
"""Those of a build of llama-cpp-python that are much larger."""

SAMPLED = frozenset({"deepseek32", "deepseek4", "dots3note", "minimax-m3", "qwen4exp"})
"""Of these the slow tests try few examples, except in the profiles "whole" and "soak"."""

SHARE = 5
"""Of how many examples one is tried of a sampled kind."""

SLOWEST_SHARE = 10
"""Of how many examples one is tried of any kind, in the slowest tests."""


def is_sampled(arch: str, *, slowest: bool = False) -> bool:
    """Whether the slow tests try few examples of this architecture; the slowest of any."""
    profile = os.environ.get("HYPOTHESIS_PROFILE", "quick")
    return (slowest or arch in SAMPLED) and profile in ("quick", "ci")


def examples(arch: str, *, slowest: bool = False) -> settings:
    """How many examples of this architecture are tried, of the slowest tests or of the others."""
    whole = settings().max_examples
    if not is_sampled(arch, slowest=slowest):
        return settings(max_examples=whole)
    return settings(max_examples=whole // (SLOWEST_SHARE if slowest else SHARE))


def given(**strategies: SearchStrategy[Any]) -> Callable[[Test], Test]:
    """As hypothesis's, for tests that take a ``model``: of some kinds few examples are tried."""

    def decorate(test: Test) -> Test:
        whole = hypothesis.given(**strategies)(test)
        few = settings(max_examples=settings().max_examples // SHARE)(
            hypothesis.given(**strategies)(test)
        )

        @wraps(whole)
        def run(*, model: ls.Model, **fixtures: Any) -> None:
            (few if is_sampled(model.arch) else whole)(model=model, **fixtures)

        return run

    return decorate
