"""The command ``check``: does the state of a model come back?"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, ModelLoadError, StateError
from .output import print_json, require_folder, write_file
from .parsers import Commands, add_command, positive
from .problems import CommandError, sentence
from .progress import shown
from .status import Status

if TYPE_CHECKING:
    from .._llama.library import Library
    from ..testing.conformance import Report

_WRONG = {"differs", "error"}
"""The outcomes after which a check has failed."""


@dataclass(frozen=True)
class Checked:
    """The result for one model.

    Attributes:
        report: Its rows; none where there is a *problem*.
        problem: Why the model could not be checked, or None.
        started: When its check began.
    """

    report: Report
    problem: str | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def outcomes(self) -> set[str]:
        """The different outcomes of its rows."""
        return {row.outcome for row in self.report.rows}


def add_commands(commands: Commands) -> None:
    """Add the command of this module."""
    parser = add_command(
        commands,
        "check",
        run_check,
        summary="check that the state of a model comes back",
        details="Save and restore the state of each model with every function and in 15"
        " configurations of the context. Compare positions, tokens, bytes, the next logits and"
        " greedy tokens; the logits with those after llama.cpp's own restore, too, and with those"
        " of a run whose cells are moved. Without MODEL.gguf, check tiny models of every kind of"
        " memory.",
        example="llama-state check model.gguf --junit state.xml",
        exits={
            0: "something was checked and nothing differs",
            1: "something differs, or a function raised an error",
            2: "a model could not be checked",
        },
    )
    parser.add_argument(
        "models",
        metavar="MODEL.gguf",
        nargs="*",
        help="a model to check (default: tiny ones, which need the extra testing)",
    )
    parser.add_argument(
        "--library",
        metavar="PATH",
        help="check with this libllama (default: the one that doctor shows)",
    )
    parser.add_argument(
        "--n-tokens",
        type=positive,
        default=48,
        metavar="N",
        help="tokens in a sequence; more than the model's attention window (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only three of the configurations: a minute for a model of some hundred million"
        " parameters, where all take several",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--junit", metavar="FILE", help="also write JUnit XML to FILE, a test case for each row"
    )


def run_check(options: argparse.Namespace) -> Status:
    """Check models; print a report on each."""
    from .._llama.discovery import load_library

    if options.junit:
        require_folder(options.junit)
    for path in options.models:
        require_model(path)
    library = load_library(options.library)
    results: list[Checked] = []
    for result in _results(options, library):
        if not options.json:
            between = "\n" if results and options.models else ""
            print(between + _text(result, brief=not options.models), flush=True)
        if result.problem:
            print(result.problem, file=sys.stderr)
        results.append(result)
    if options.json:
        print_json(_as_dict(results))
    if options.junit:
        from .junit import document

        write_file(options.junit, document(results))
    if not set().union(*(result.outcomes for result in results)) - {"not available"}:
        print("nothing was checked: no context could be made", file=sys.stderr)
    return _status(results)


def require_model(path: str) -> None:
    """Raise an error that says what the file at *path* is, unless it is a GGUF file."""
    if Path(path).is_dir():
        raise CommandError(f"{path}: a folder; give the model's .gguf file")
    try:
        with Path(path).open("rb") as file:
            if file.read(4) == b"GGUF":
                return
    except FileNotFoundError:
        raise CommandError(f"{path}: no such file; give the model's .gguf file") from None
    from ..inspection import inspect_file

    with suppress(FormatError):
        kind = inspect_file(path).kind
        raise CommandError(
            f"{path}: a state ({kind}), not a model; give the model's .gguf file, or look into"
            f" the state: llama-state inspect {path}"
        )
    raise CommandError(f"{path}: not a GGUF file; give the model's .gguf file")


def _results(options: argparse.Namespace, library: Library) -> Iterator[Checked]:
    if options.models:
        return (_checked(path, library, options) for path in options.models)
    return _checked_kinds(library, options)


def _checked(path: str, library: Library, options: argparse.Namespace) -> Checked:
    """Check the model at *path*; an error is a result too, and other models follow."""
    from ..testing.conformance import QUICK, Report, check_model

    started = datetime.now(UTC)
    some: dict[str, Any] = {"configurations": QUICK} if options.quick else {}
    try:
        with shown(f"check {Path(path).name}", unit="round trips") as progress:
            report = check_model(
                path, library=library, n_tokens=options.n_tokens, progress=progress, **some
            )
    except (StateError, OSError) as error:
        return Checked(Report(path, str(library.path), ()), sentence(error), started)
    return Checked(report, None, started)


def _checked_kinds(library: Library, options: argparse.Namespace) -> Iterator[Checked]:
    """Check a tiny model of each kind; one that the library cannot load is not available."""
    from ..testing.models import KINDS, write_model

    with tempfile.TemporaryDirectory(prefix="llama_state-check-") as folder:
        for kind in KINDS:
            path = write_model(Path(folder) / f"{kind}.gguf", kind)
            if refusal := _refusal(path, library):
                result = _not_available(refusal, library)
            else:
                result = _checked(str(path), library, options)
            yield replace(result, report=replace(result.report, model=kind))


def _refusal(path: Path, library: Library) -> str | None:
    """Return why *library* cannot load a model, or None where it can."""
    from ..context.model import Model

    try:
        Model(path, library).close()
    except ModelLoadError as error:
        return error.log[-1].strip() if error.log else str(error)
    return None


def _not_available(reason: str, library: Library) -> Checked:
    from ..testing.conformance import Report, Row

    row = Row("all configurations", outcome="not available", detail=reason)
    return Checked(Report("", str(library.path), (row,)))


def _text(result: Checked, *, brief: bool) -> str:
    """Return a result as a table, or as one line where it is *brief* and nothing is wrong."""
    report = result.report
    if result.problem:
        return f"{report.model}\n{report.library}\n\nnot checked"
    if brief and not result.outcomes & _WRONG:
        return f"{report.model:<16} {str(report).splitlines()[-1]}"
    return str(report)


def _as_dict(results: Sequence[Checked]) -> dict[str, Any]:
    """Return results as JSON takes them."""
    reports = [{**result.report.as_dict(), "problem": result.problem} for result in results]
    return {"ok": _status(results) is Status.OK, "reports": reports}


def _status(results: Sequence[Checked]) -> Status:
    outcomes = set().union(*(result.outcomes for result in results))
    if any(result.problem for result in results):
        return Status.TROUBLE
    if outcomes & _WRONG:
        return Status.NO
    return Status.OK if outcomes - {"not available"} else Status.TROUBLE
