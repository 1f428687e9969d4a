"""What the memory of each kind of tiny model can do, by its architecture."""

from __future__ import annotations

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

UNCOUNTED = frozenset(
    {"deepseek32", "deepseek4", "dots3note", "minimax-m3", "qwen2vl", "qwen4exp"}
)
"""It is never certain that enough cells are free."""
