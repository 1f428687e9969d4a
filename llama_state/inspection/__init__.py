"""What is in a state file: describe, verify, compare, draw and convert it. No libllama is needed.

numpy, gguf and matplotlib are used where they are needed (``pip install 'llama-state[plot]'``).
"""

from __future__ import annotations

from .comparing import Comparison, PositionDifference, RowDifference, compare
from .converting import Converted, convert_file
from .describing import describe
from .opening import inspect_file
from .picture import render
from .statefile import Digests, FileKind, StateFile
from .verifying import Verdict, verify_file

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
    "verify_file",
]
