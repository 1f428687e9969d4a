"""Check that states restore correctly: for any model, any llama.cpp and any back end.

Every method to save and restore is used between two contexts, of which the second held something
else. The result is compared with the original: bytes, positions, tokens, and the next logits, which
must be those of a run without interruption.
"""

from __future__ import annotations

import itertools
import math
import random
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .._io import StrPath
from .._io.arguments import checked
from .._llama.library import Library
from ..context.context import Context
from ..context.model import Model
from ..context.state import Restored
from ..errors import ModelLoadError, StateError

__all__ = [
    "CONFIGURATIONS",
    "NMSE_LIMIT",
    "NMSE_LIMITS",
    "Report",
    "Row",
    "check_model",
    "nmse",
    "round_trips",
]

Outcome: TypeAlias = Literal["same", "differs", "error", "not available"]

NMSE_LIMIT = 1e-5
"""The error below which logits count as equal: the bound of llama.cpp's own test."""

NMSE_LIMITS: Mapping[str, float] = {"deepseek4": 5e-5}
"""Architecture -> its bound, where it is another. With flash attention, what deepseek4 computes
depends on where the cells lie: up to 1.6e-5 after a restore. A wrong token makes 1.4e-4 or more."""

_SEQUENCES: Mapping[str, Mapping[str, Any]] = {
    "1 sequence": {"n_seq_max": 1},
    "3 unified": {"n_seq_max": 3, "kv_unified": True},
    "3 split": {"n_seq_max": 3, "kv_unified": False},
}
_CACHES: Mapping[str, Mapping[str, Any]] = {
    "flash, f16": {"flash_attn": True},
    "flash, q8_0": {"flash_attn": True, "type_k": "q8_0", "type_v": "q8_0"},
    "flash, window": {"flash_attn": True, "swa_full": False, "n_batch": 32},
    "plain, f16": {"flash_attn": False},
    "plain, q8_0": {"flash_attn": False, "type_k": "q8_0", "type_v": "q8_0"},
}

CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    f"{sequences}, {cache}": {**_SEQUENCES[sequences], **_CACHES[cache]}
    for sequences, cache in itertools.product(_SEQUENCES, _CACHES)
}
"""Name in the report -> options for ``Model.context``."""


@dataclass(frozen=True)
class Row:
    """The result of one method to save and restore, in one configuration.

    Attributes:
        configuration: Name of the context's options.
        function: The functions that were called.
        nbytes: Size of the state, or of the file.
        seconds: Time to save and to restore it.
        nmse: Normalized mean squared error of the next logits, the worst of all sequences.
        outcome: "same", "differs", "error" or, if llama.cpp cannot create such a context, "not
            available".
        detail: What differs, or why there is no result.
    """

    configuration: str
    function: str = ""
    nbytes: int = 0
    seconds: float = 0.0
    nmse: float = 0.0
    outcome: Outcome = "same"
    detail: str = ""


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
        return "same" in outcomes and outcomes <= {"same", "not available"}

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        head = _LINE.format("configuration", "function", "bytes", "ms", "nmse", "outcome")
        counts = Counter(row.outcome for row in self.rows)
        foot = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
        lines = itertools.chain.from_iterable(map(_lines, self.rows))
        return "\n".join([self.model, self.library, "", head, *lines, "", foot])


@checked
def check_model(
    model: Model | StrPath,
    *,
    library: Library | None = None,
    n_tokens: int = 48,
    configurations: Mapping[str, Mapping[str, Any]] = CONFIGURATIONS,
    seed: int = 0,
) -> Report:
    """Check every method to save and restore the state of *model*.

    Args:
        model: A model, or the path of one.
        library: The llama.cpp for a path; default: the one that ``load_library`` finds.
        n_tokens: Tokens in the first sequence: more than the model's attention window.
        configurations: Name in the report -> options for ``Model.context``.
        seed: Seed of the tokens.
    """
    if not isinstance(model, Model):
        with Model(model, library) as opened:
            return check_model(opened, n_tokens=n_tokens, configurations=configurations, seed=seed)
    rows = [
        row
        for name, options in configurations.items()
        for row in round_trips(model, options, name=name, n_tokens=n_tokens, seed=seed)
    ]
    return Report(model.path, str(model.library.path), tuple(rows))


@checked
def round_trips(
    model: Model, options: Mapping[str, Any], *, name: str = "", n_tokens: int = 48, seed: int = 0
) -> Iterator[Row]:
    """Use every method to save and restore between two contexts of one configuration.

    Args:
        model: The model.
        options: For ``Model.context``; the default of ``n_ctx`` is what the tokens need.
        name: Name of the configuration.
        n_tokens: Tokens in the first sequence; each further sequence has one more.
        seed: Seed of the tokens.

    Yields:
        A row for each method, or a single one if llama.cpp rejects the configuration.
    """
    n_seq = options.get("n_seq_max", 1)
    make = partial(model.context, **{"n_ctx": n_seq * (n_tokens + n_seq + _SPARE), **options})
    rng = random.Random(seed)  # noqa: S311 - no secrets
    texts = [_tokens(rng, model.n_vocab, n_tokens + seq_id) for seq_id in range(n_seq)]
    others = [_tokens(rng, model.n_vocab, 1 + n_tokens // 4) for _ in range(n_seq)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        try:
            filled = _without_interruption(make, texts)
        except ModelLoadError as error:
            yield Row(name, outcome="not available", detail=(error.log or (str(error),))[0].strip())
            return
        empty = _without_interruption(make, [()] * n_seq)
        for expected, methods in ((filled, _methods(n_seq)), (empty, _methods_for_empty())):
            with make() as source:
                _fill(source, expected.texts)
                for method in methods:
                    before = expected.texts if method.in_place else others
                    with make() as target:
                        _fill(target, before)
                        trip = _Trip(method, expected, before, source, target, path)
                        yield _run(trip, Row(name, method.function))


@checked
def nmse(expected: memoryview[float], got: memoryview[float]) -> float:
    """Return the squared error of *got* relative to the squares of *expected*, 0.0 if equal."""
    if expected.tobytes() == got.tobytes():
        return 0.0
    squares = math.fsum(value * value for value in expected)
    errors = math.fsum((a - b) ** 2 for a, b in zip(expected, got, strict=True))
    return errors / squares if squares else math.inf


_SPARE = 8
_NEXT_TOKEN = 1


@dataclass(frozen=True)
class _Expected:
    """What a context holds, and the next logits of a run without interruption.

    Attributes:
        texts: The tokens of each sequence.
        logits: The logits after one more token in each.
    """

    texts: Sequence[Sequence[int]]
    logits: Sequence[memoryview[float]]


@dataclass(frozen=True)
class _Method:
    """A method to save and restore.

    Attributes:
        function: Name in the report: the functions that it calls.
        call: Saves and restores. Returns what was restored, None if the functions do not tell.
        whole: Whether it saves all sequences, or only the first.
        dest: The id that the first sequence gets, if only that is saved.
        tokens: Whether it saves the tokens of the first sequence too.
        in_place: Whether source and target hold the same before: the target is rolled back.
    """

    function: str
    call: Callable[[_Trip], Restored | None]
    whole: bool = True
    dest: int = 0
    tokens: bool = False
    in_place: bool = False


@dataclass(frozen=True)
class _Trip:
    """A round trip by *method* from *source*, which holds *expected*, to *target* (*before*)."""

    method: _Method
    expected: _Expected
    before: Sequence[Sequence[int]]
    source: Context
    target: Context
    path: Path

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens that are saved with the state."""
        return self.expected.texts[0] if self.method.tokens else ()

    @property
    def arriving(self) -> Mapping[int, Sequence[int]]:
        """Sequence id in the target -> the tokens of each sequence that is restored."""
        texts = self.expected.texts
        return dict(enumerate(texts)) if self.method.whole else {self.method.dest: texts[0]}


class _Abandon(Exception):
    """Raised to leave a savepoint."""


def _snapshot(trip: _Trip) -> Restored:
    return trip.target.restore(trip.source.snapshot())


def _snapshot_out(trip: _Trip) -> Restored:
    return trip.target.restore(trip.source.snapshot(out=bytearray(trip.source.state_size())))


def _save(trip: _Trip) -> Restored:
    trip.source.save_state(trip.path, tokens=trip.tokens, durable=False)
    return trip.target.load_state(trip.path)


def _seq_snapshot(trip: _Trip) -> Restored:
    return trip.target.seq_restore(trip.source.seq_snapshot(), trip.method.dest)


def _seq_save(trip: _Trip) -> Restored:
    trip.source.seq_save_state(trip.path, tokens=trip.tokens, durable=False)
    return trip.target.seq_load_state(trip.path, trip.method.dest)


def _checkpoint(trip: _Trip) -> Restored:
    return trip.target.resume(trip.source.checkpoint(tokens=trip.tokens))


def _seq_checkpoint(trip: _Trip) -> Restored:
    return trip.target.resume(trip.source.checkpoint(0, tokens=trip.tokens), trip.method.dest)


def _savepoint(trip: _Trip) -> None:
    try:
        with trip.target.savepoint():
            trip.target.decode([_NEXT_TOKEN] * (_SPARE // 2))
            raise _Abandon
    except _Abandon:
        return


_WHOLE = _Method("snapshot/restore", _snapshot)
_WHOLE_FILE = _Method("save_state/load_state", _save, tokens=True)
_ONE = _Method("seq_snapshot/seq_restore", _seq_snapshot, whole=False)
_ONE_FILE = _Method("seq_save_state/seq_load_state", _seq_save, whole=False)


def _methods(n_seq: int) -> Iterator[_Method]:
    """Yield all methods for contexts of *n_seq* sequences."""
    yield from (_WHOLE, _Method("snapshot(out=)/restore", _snapshot_out), _WHOLE_FILE)
    yield from (_ONE, _ONE_FILE, replace(_ONE_FILE, function="seq_save_state, tokens", tokens=True))
    if n_seq > 1:
        yield replace(_ONE, function="seq_restore, other id", dest=n_seq - 1)
        yield replace(_ONE_FILE, function="seq_load_state, other id", dest=n_seq - 1)
    yield _Method("checkpoint/resume", _checkpoint, tokens=True)
    yield _Method("checkpoint(0)/resume", _seq_checkpoint, whole=False, dest=n_seq - 1, tokens=True)
    yield _Method("savepoint", _savepoint, in_place=True)


def _methods_for_empty() -> Iterator[_Method]:
    """Yield the methods to use for an empty context."""
    for method in (_WHOLE, _WHOLE_FILE, _ONE, _ONE_FILE):
        yield replace(method, function=f"empty {method.function}")


def _run(trip: _Trip, row: Row) -> Row:
    """Make a round trip; return *row* with its result."""
    try:
        started = time.perf_counter()
        restored = trip.method.call(trip)
        seconds = time.perf_counter() - started
        nbytes = restored.nbytes if restored else trip.target.state_size()
        row = replace(row, nbytes=nbytes, seconds=seconds)
        differences = [*_differences(trip, restored)]
        # A sequence that is saved alone is the first one, and so are its expected logits.
        error = max(map(nmse, trip.expected.logits, _next_logits(trip.target, trip.arriving)))
    except StateError as state_error:
        detail = f"{type(state_error).__name__}: {state_error}"
        return replace(row, outcome="error", detail=detail)
    limit = NMSE_LIMITS.get(trip.target.arch, NMSE_LIMIT)
    if not error < limit:
        differences.append(f"logits: error {error:.1e}, not below {limit:.0e}")
    outcome: Outcome = "differs" if differences else "same"
    return replace(row, nmse=error, outcome=outcome, detail="; ".join(differences))


def _differences(trip: _Trip, restored: Restored | None) -> Iterator[str]:
    """Yield the differences between source and target, except those of the logits."""
    arriving = {seq_id: len(text) for seq_id, text in trip.arriving.items()}
    expected = {**{seq_id: len(text) for seq_id, text in enumerate(trip.before)}, **arriving}
    actual = {seq_id: trip.target.n_past(seq_id) for seq_id in expected}
    if actual != expected:
        yield f"positions: {actual} instead of {expected}"
    if restored is not None:
        reported = {seq_id: span.n_past for seq_id, span in restored.sequences.items()}
        if reported != {seq_id: length for seq_id, length in arriving.items() if length}:
            yield f"reported positions: {reported} instead of {arriving}"
        if restored.tokens != tuple(trip.tokens):
            yield f"tokens: {len(restored.tokens)}, not the {len(trip.tokens)} that were saved"
    saved, again = (_bytes(trip, context) for context in (trip.source, trip.target))
    if again != saved:
        yield f"bytes: other ones when saved again ({len(saved)} before, {len(again)} now)"


def _bytes(trip: _Trip, context: Context) -> bytes:
    """Return the state that was saved, or restored, as llama.cpp saves it from *context*."""
    if trip.method.whole:
        return context.snapshot()
    if context is trip.target and trip.method.dest != 0:
        # The bytes contain the id: copy the sequence to the one that it had.
        context.seq_restore(context.seq_snapshot(trip.method.dest), 0)
    context.seq_save_state(trip.path, 0, durable=False)
    return trip.path.read_bytes()


def _without_interruption(make: Callable[[], Context], texts: Sequence[Sequence[int]]) -> _Expected:
    """Decode *texts* and one more token in each; return the expected logits."""
    with make() as context:
        _fill(context, texts)
        return _Expected(texts, _next_logits(context, range(len(texts))))


def _fill(context: Context, texts: Sequence[Sequence[int]]) -> None:
    for seq_id, text in enumerate(texts):
        context.decode(text, seq_id)


def _next_logits(context: Context, seq_ids: Iterable[int]) -> list[memoryview[float]]:
    """Decode one more token in each sequence; return the logits after each."""
    logits = []
    for seq_id in seq_ids:
        context.decode([_NEXT_TOKEN], seq_id)
        logits.append(context.logits())
    return logits


def _tokens(rng: random.Random, n_vocab: int, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(n_vocab) for _ in range(count))


_LINE = "{:<24} {:<35} {:>11} {:>8} {:>7} {}"


def _lines(row: Row) -> Iterator[str]:
    """Yield the lines of a row in the table."""
    if row.outcome == "not available":
        yield f"{row.configuration:<24} {row.outcome}"
    else:
        error = f"{row.nmse:.1e}" if row.nmse else "0"
        figures = (row.nbytes, f"{1000 * row.seconds:.2f}", error, row.outcome)
        yield _LINE.format(row.configuration, row.function, *figures)
    yield from textwrap.wrap(row.detail, 96, initial_indent="    ", subsequent_indent="    ")
