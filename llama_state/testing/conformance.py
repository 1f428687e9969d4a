"""Check that states restore correctly: for any model, any llama.cpp and any back end.

Every method to save and restore is used between two contexts, of which the second held something
else. The result is compared with the original: bytes, positions, tokens, and the next logits and
greedy tokens. These must be those of a run without interruption, or differ from them as llama.cpp's
own restore does, and no more than where cells lie explains; see :mod:`.controls`.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .._io import Progress, StrPath
from .._io.arguments import checked
from .._llama.library import Library
from ..context.model import Model
from ..context.state import Restored
from ..errors import ContextError, StateError
from .controls import Controls, put
from .report import Report, Row
from .runs import SPARE, Answers, answer, fill, nmse, run, some_tokens
from .trips import Trip, methods, methods_for_empty

__all__ = [
    "CONFIGURATIONS",
    "NMSE_LIMIT",
    "NMSE_LIMITS",
    "QUICK",
    "Report",
    "Row",
    "check_model",
    "nmse",
    "round_trips",
]

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


QUICK: Mapping[str, Mapping[str, Any]] = {
    name: CONFIGURATIONS[name]
    for name in ("1 sequence, flash, f16", "3 unified, plain, f16", "3 split, flash, q8_0")
}
"""Those of a quick check: each kind of stream, each cache type, flash attention on and off."""

OWN_LIMIT = 1e-10
"""The error below which logits are those after llama.cpp's own restore of the same state. The same
cells lie in the same places: on a CPU it is 0."""

MOVED_FACTOR = 10
"""An error that is not small may be this many times that of a run whose cells were moved."""


@checked
def check_model(
    model: Model | StrPath,
    *,
    library: Library | None = None,
    n_tokens: int = 48,
    configurations: Mapping[str, Mapping[str, Any]] = CONFIGURATIONS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Check every method to save and restore the state of *model*.

    Args:
        model: A model, or the path of one.
        library: The llama.cpp for a path; default: the one that ``load_library`` finds.
        n_tokens: Tokens in the first sequence: more than the model's attention window.
        configurations: Name in the report -> options for ``Model.context``.
        seed: Seed of the tokens.
        progress: Called with the number of round trips done, and of all.
    """
    if not isinstance(model, Model):
        with Model(model, library) as opened:
            return check_model(
                opened,
                n_tokens=n_tokens,
                configurations=configurations,
                seed=seed,
                progress=progress,
            )
    rows: list[Row] = []
    done, total = 0, sum(len(functions_of(options)) for options in configurations.values())
    for name, options in configurations.items():
        for row in round_trips(model, options, name=name, n_tokens=n_tokens, seed=seed):
            rows.append(row)
            done += len(functions_of(options)) if row.outcome == "not available" else 1
            if progress is not None:
                progress(done, total)
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
    functions = functions_of(options)
    yield from some_round_trips(model, options, functions, name=name, n_tokens=n_tokens, seed=seed)


def functions_of(options: Mapping[str, Any]) -> list[str]:
    """Return what the rows of a configuration are called, in their order."""
    every = (*methods(options.get("n_seq_max", 1)), *methods_for_empty())
    return [method.function for method in every]


def some_round_trips(
    model: Model,
    options: Mapping[str, Any],
    functions: Collection[str],
    *,
    name: str,
    n_tokens: int = 48,
    seed: int = 0,
) -> Iterator[Row]:
    """Yield the rows of :func:`round_trips` that *functions* names."""
    n_seq = options.get("n_seq_max", 1)
    make = partial(model.context, **{"n_ctx": n_seq * (n_tokens + n_seq + SPARE), **options})
    rng = random.Random(seed)  # noqa: S311 - no secrets
    texts = [some_tokens(rng, model.n_vocab, n_tokens + seq_id) for seq_id in range(n_seq)]
    others = [some_tokens(rng, model.n_vocab, 1 + n_tokens // 4) for _ in range(n_seq)]
    try:
        filled = run(make, texts)
    except ContextError as error:
        yield Row(name, outcome="not available", detail=(error.log or (str(error),))[0].strip())
        return
    empty = run(make, [()] * n_seq)
    with tempfile.TemporaryDirectory() as folder:
        for expected, listed in ((filled, methods(n_seq)), (empty, methods_for_empty())):
            chosen = [method for method in listed if method.function in functions]
            if not chosen:
                continue
            controls = Controls(make, expected)
            with make() as source:
                fill(source, expected.texts)
                for method in chosen:
                    before = expected.texts if method.in_place else others
                    with make() as target:
                        fill(target, before)
                        trip = Trip(method, expected, before, source, target, Path(folder, "state"))
                        yield _run(trip, controls, Row(name, method.function))


def nmse_limit(arch: str) -> float:
    """Return the error below which logits of an architecture count as equal."""
    return NMSE_LIMITS.get(arch, NMSE_LIMIT)


def _run(trip: Trip, controls: Controls, row: Row) -> Row:
    """Make a round trip; return *row* with its result."""
    try:
        started = time.perf_counter()
        restored = trip.method.call(trip)
        seconds = time.perf_counter() - started
        nbytes = restored.nbytes if restored else trip.target.state_size()
        row = replace(row, nbytes=nbytes, seconds=seconds)
        differences = [*_differences(trip, restored)]
        again = trip.state_of(trip.target)
        got = answer(trip.target, trip.arriving)
        differences += _byte_differences(trip, again)
        return _judged(row, trip, controls, got, differences)
    except StateError as state_error:
        detail = f"{type(state_error).__name__}: {state_error}"
        return replace(row, outcome="error", detail=detail)


def _judged(
    row: Row, trip: Trip, controls: Controls, got: Answers, differences: Sequence[str]
) -> Row:
    """Return *row* with the outcome of a trip after which the target answers *got*.

    Where llama.cpp refuses to restore the state by itself, only the bound of the error is left.
    """
    own, moved = controls.restored(trip), controls.moved()
    # A sequence that is saved alone is the first one, and so are its expected answers.
    expected = trip.expected.answers.first(len(got.logits))
    error = _error(expected, got)
    from_own = None if own is None else _error(own, got)
    from_moved = max((_error(trip.expected.answers, one) for one in moved), default=0.0)
    row = replace(row, nmse=error, nmse_llama=from_own, nmse_moved=from_moved)
    limit = nmse_limit(trip.target.arch)
    same = error < limit and got.tokens == expected.tokens
    wrong = [*differences]
    if own is not None and not (_is_own(from_own) and got.tokens == own.tokens):
        wrong.append(
            f"logits: error {from_own:.1e} to llama.cpp's own restore of the state"
            f"{'' if got.tokens == own.tokens else ', other greedy tokens'}"
        )
    explained = own is not None and error < max(limit, MOVED_FACTOR * from_moved)
    if not same and not explained:
        wrong.append(
            f"logits: error {error:.1e}, not below {limit:.0e}, with moved cells {from_moved:.1e}"
            f"{'' if got.tokens == expected.tokens else ', other greedy tokens'}"
        )
    if wrong:
        return replace(row, outcome="differs", detail="; ".join(wrong))
    return row if same else replace(row, outcome="as llama.cpp itself")


def _is_own(error: float | None) -> bool:
    return error is not None and error < OWN_LIMIT


def _error(expected: Answers, got: Answers) -> float:
    """Return the worst error of the logits of all sequences."""
    return max(map(nmse, expected.logits, got.logits))


def _differences(trip: Trip, restored: Restored | None) -> Iterator[str]:
    """Yield the differences between source and target, except those of bytes and logits."""
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


def _byte_differences(trip: Trip, again: bytes) -> Iterator[str]:
    """Yield a difference where *again*, saved right after the restore, is not what was saved."""
    saved = trip.state_of(trip.source)
    if not trip.method.whole and trip.method.dest != 0:
        # The bytes contain the id: give it the one that it had.
        put(trip.target, 0, again)
        again = trip.target.seq_snapshot(0)
    if again != saved:
        yield f"bytes: other ones when saved again ({len(saved)} before, {len(again)} now)"
