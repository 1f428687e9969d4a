"""What a conformance check found, as rows and as a table."""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from .._io.markup import table

Outcome: TypeAlias = Literal["same", "as llama.cpp itself", "differs", "error", "not available"]

EQUAL: frozenset[Outcome] = frozenset({"same", "as llama.cpp itself"})
"""The outcomes of methods that restore all that llama.cpp itself does."""


@dataclass(frozen=True)
class Row:
    """The result of one method to save and restore, in one configuration.

    Attributes:
        configuration: Name of the context's options.
        function: The functions that were called.
        nbytes: Size of the state, or of the file.
        seconds: Time to save and to restore it.
        nmse: Normalized mean squared error of the next logits, relative to those of a run without
            interruption, the worst of all sequences.
        nmse_llama: The same, relative to the logits after llama.cpp's own restore of the same
            state into the same context; None where llama.cpp refuses it.
        nmse_moved: The same of runs without interruption whose cells lie in other places, or whose
            tokens were decoded in other pieces: what rounding makes of them without any restore.
        outcome: "same"; "as llama.cpp itself", if the logits or the tokens differ no more than
            those of both controls; "differs"; "error"; or, if llama.cpp cannot create such a
            context, "not available".
        detail: What differs, or why there is no result.
    """

    configuration: str
    function: str = ""
    nbytes: int = 0
    seconds: float = 0.0
    nmse: float = 0.0
    nmse_llama: float | None = None
    nmse_moved: float = 0.0
    outcome: Outcome = "same"
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the method was checked and restores what llama.cpp itself would."""
        return self.outcome in EQUAL


@dataclass(frozen=True)
class Report:
    """The result of :func:`check_model`; ``str()`` returns a table that fits 100 columns."""

    model: str
    library: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether at least one method was checked and none failed."""
        outcomes = {row.outcome for row in self.rows}
        return not EQUAL.isdisjoint(outcomes) and outcomes <= EQUAL | {"not available"}

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        head = _LINE.format("configuration", "function", "bytes", "ms", "nmse", "outcome")
        counts = Counter(row.outcome for row in self.rows)
        foot = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
        lines = itertools.chain.from_iterable(map(_lines, self.rows))
        return "\n".join([self.model, self.library, "", head, *lines, "", foot])

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        head = ("configuration", "function", "bytes", "ms", "nmse", "outcome", "detail")
        rows = [
            (
                row.configuration,
                row.function,
                f"{row.nbytes:,}",
                f"{1000 * row.seconds:.2f}",
                f"{row.nmse:.1e}" if row.nmse else "0",
                row.outcome,
                row.detail,
            )
            for row in self.rows
        ]
        verdict = "passed" if self.ok else "NOT passed"
        return table(rows, head=head, caption=f"{self.model}, {self.library}: {verdict}")


_LINE = "{:<24} {:<35} {:>10} {:>7} {:>7} {}"
# In the table, which has no room for more.
_SHORT: Mapping[str, str] = {"as llama.cpp itself": "as llama.cpp"}


def _lines(row: Row) -> Iterator[str]:
    """Yield the lines of a row in the table."""
    if row.outcome == "not available":
        yield f"{row.configuration:<24} {row.outcome}"
    else:
        error = f"{row.nmse:.1e}" if row.nmse else "0"
        figures = (
            row.nbytes,
            f"{1000 * row.seconds:.2f}",
            error,
            _SHORT.get(row.outcome, row.outcome),
        )
        yield _LINE.format(row.configuration, row.function, *figures)
    yield from textwrap.wrap(row.detail, 96, initial_indent="    ", subsequent_indent="    ")
