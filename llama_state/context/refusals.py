"""What llama.cpp means when it refuses a state: its log lines as errors with facts in fields.

The texts are those of llama.cpp b8672 to b11549; a line that none of the patterns knows leaves
the plain :class:`RestoreError`. In these lines a count "a instead of b" names the state's value
first, a value "a != b" the context's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import CapacityError, Difference, MismatchError, StateError
from ..layout import TYPES, Layout

_NAMES = {
    "wrong model arch": "architecture",
    "mismatched layer count": "layer count",
    "incompatible key rotation": "n_rot_k",
    "incompatible value rotation": "n_rot_v",
    "mismatched key type": "type_k",
    "mismatched value type": "type_v",
    "mismatched key row size": "K row size",
    "mismatched value row size": "V row size",
    "mismatched value element size": "V element size",
    "mismatched GQA embedding size": "V row size",
    "mismatched r type": "R type",
    "mismatched r row size": "R row size",
    "mismatched s type": "S type",
    "mismatched s row size": "S row size",
}
_LINE = re.compile(
    rf"(?P<text>{'|'.join(_NAMES)}):? \(?'?(?P<a>\w+)'? (?P<how>!=|instead of) '?(?P<b>\w+)'?"
    r"(?:, layer (?P<layer>\d+))?"
)
_NO_CELLS = re.compile(r"not enough cells in kv cache|failed to find \d* ?available cells")


def explain(
    log: Sequence[str], state: Layout, *, types: Mapping[str, str], cells: int
) -> StateError | None:
    """Return the error that *log* stands for, or None where no line is known.

    Args:
        log: llama.cpp's lines of the failing call.
        state: The state that was refused.
        types: Cache types that the context was created with, by option name, where known.
        cells: Cells that a stream of the context has.
    """
    for line in log:
        if match := _LINE.search(line):
            return MismatchError([*_other_types(state, types), _difference(match)])
        if "incompatible V transposition" in line:
            on_off = ("on", "off (V transposed)")
            saved = any(getattr(cache, "v_trans", False) for cache in state.geometry.caches)
            return MismatchError([Difference("flash attention", on_off[saved], on_off[not saved])])
        if _NO_CELLS.search(line):
            need = max(max(streams, default=0) for streams in state.cells_needed.values())
            return CapacityError("free cells for the state", need=need, have=cells, hint=line)
    return None


def _other_types(state: Layout, types: Mapping[str, str]) -> list[Difference]:
    """llama.cpp names one difference; these are often the reason behind it."""
    found = []
    for name, requested in types.items():
        rows = [getattr(cache, name.removeprefix("type_")) for cache in state.geometry.caches]
        saved = {TYPES[type_id].name for row in rows for type_id, _ in row or ()}
        if saved and saved != {requested}:
            found.append(Difference(name, ", ".join(sorted(saved)), requested))
    return found


def _difference(match: re.Match[str]) -> Difference:
    name, first, second = _NAMES[match["text"]], match["a"], match["b"]
    saved, current = (first, second) if match["how"] == "instead of" else (second, first)
    layer = f" (layer {match['layer']})" if match["layer"] else ""
    return Difference(name + layer, *(_shown(name, value) for value in (saved, current)))


def _shown(name: str, value: str) -> str:
    known = TYPES.get(int(value)) if "type" in name else None
    return known.name if known else value
