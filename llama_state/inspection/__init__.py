"""Describe, verify, compare, draw and convert state files, without any libllama.

Comparing values, and showing them on a page, needs numpy and gguf, drawing a picture matplotlib
(extra ``plot``).
"""

from __future__ import annotations

from .conversion import Converted, convert_file
from .diff import Comparison, PositionDifference, RowDifference, compare
from .picture import render
from .source import inspect_file
from .statefile import Digests, FileKind, StateFile
from .summary import describe
from .verification import Verdict, verify_file
from .web import render_html

__all__ = [
    "Comparison",
    "Converted",
    "Digests",
    "FileKind",
    "PositionDifference",
    "RowDifference",
    "StateFile",
    "Verdict",
    "compare",
    "convert_file",
    "describe",
    "inspect_file",
    "render",
    "render_html",
    "verify_file",
]
