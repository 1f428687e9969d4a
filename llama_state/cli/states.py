"""The commands for state files: ``inspect``, ``verify``, ``diff`` and ``convert``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StateError
from .output import print_json, require_folder, write_file
from .parsers import Commands, add_command, add_key_file, read_key
from .problems import CommandError, naming, sentence
from .progress import shown
from .standard_input import as_file
from .status import Status

if TYPE_CHECKING:
    from ..inspection import StateFile


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    _add_inspect(commands)
    _add_verify(commands)
    _add_diff(commands)
    _add_convert(commands)


def _add_inspect(commands: Commands) -> None:
    parser = add_command(
        commands,
        "inspect",
        run_inspect,
        summary="show what is in state files",
        details="Show what is in state files: kind, tokens, sequences, positions and sizes."
        " A damaged file is shown as far as it can be read.",
        example="llama-state inspect chat.state --model model.gguf",
        exits={0: "shown", 1: "a file is damaged", 2: "one cannot be read, or is not a state"},
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="a session, sequence or slot file, a checkpoint, or a blob saved to a file; - is the"
        " standard input",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the same facts as JSON; of several files a list"
    )
    parser.add_argument(
        "--plot", metavar="OUT", help="also draw cells, positions and values: OUT is .png or .svg"
    )
    parser.add_argument(
        "--html",
        metavar="OUT.html",
        help="also write a web page that needs nothing else: the same text, pictures, digests",
    )
    _add_model(parser)
    _add_reading(parser)


def _add_verify(commands: Commands) -> None:
    parser = add_command(
        commands,
        "verify",
        run_verify,
        summary="check that state files are sound",
        details="Compare the digests of checkpoints, and check the structure of every state."
        " Native files have no digests: a changed value in a tensor is not found.",
        example="llama-state verify kv/*.llst",
        exits={
            0: "all files are sound",
            1: "a file is damaged, unsure, locked, unreadable, or of an unknown version",
            2: "wrong use, or a missing package",
        },
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="a state file of any kind; - is stdin"
    )
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    _add_reading(parser)


def _add_diff(commands: Commands) -> None:
    parser = add_command(
        commands,
        "diff",
        run_diff,
        summary="compare two states",
        details="Compare fields, tokens, positions and, for each layer, the rows of two states.",
        example="llama-state diff monday.state tuesday.state",
        exits={0: "the states are equal", 1: "they differ", 2: "they cannot be compared"},
    )
    parser.add_argument("a", metavar="A", help="the first state file, of any kind; - is stdin")
    parser.add_argument("b", metavar="B", help="the second, which may be of another kind")
    parser.add_argument("--json", action="store_true", help="print the differences as JSON")
    _add_model(parser)
    _add_reading(parser)


def _add_convert(commands: Commands) -> None:
    parser = add_command(
        commands,
        "convert",
        run_convert,
        summary="turn a native file into a checkpoint, or back",
        details="Write a native file as a checkpoint, or a checkpoint as the native file of"
        " llama.cpp. OUT is written as a whole or not at all.",
        example="llama-state convert chat.state chat.llst --model model.gguf --plain",
        exits={0: "OUT is written", 2: "it is not"},
    )
    parser.add_argument("source", metavar="IN", help="the state file to read; - is stdin")
    parser.add_argument("target", metavar="OUT", help="the file to write")
    parser.add_argument(
        "--to",
        choices=("checkpoint", "native"),
        help="the format of OUT (default: the one that IN does not have)",
    )
    parser.add_argument("--compress", action="store_true", help="compress the checkpoint")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--session-version",
        type=int,
        metavar="N",
        help="the session version that OUT is to have (9, 10, 11), so that another llama.cpp"
        " takes it",
    )
    parser.add_argument(
        "--blob-version",
        type=int,
        metavar="N",
        help="the session version of a blob that reads as several",
    )
    parser.add_argument(
        "--model", metavar="M.gguf", help="record that the state belongs to this model"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="record that the model was used without adapters and with its own rope settings;"
        " needs --model",
    )
    _add_reading(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="M.gguf",
        help="the model of the state: a sequence state does not name its own",
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add_key_file(parser, "that authenticates the checkpoint")
    parser.add_argument(
        "--max-size",
        type=int,
        metavar="BYTES",
        help="the most bytes that a compressed checkpoint may decompress to"
        " (default: 1024 times the size of its file)",
    )


def run_inspect(options: argparse.Namespace) -> Status:
    """Show, and draw, what is in files."""
    from ..inspection import summary, text

    _check_outputs(options)
    described, status = [], Status.OK
    for name in options.files:
        try:
            found = _inspected(name, options, progress=True)
        except (StateError, OSError) as error:
            if len(options.files) == 1:
                raise
            print(sentence(error), file=sys.stderr)
            status = Status.TROUBLE
            continue
        if options.json:
            described.append(summary.describe(found))
        else:
            print(*([""] if name is not options.files[0] else []), text.text(found), sep="\n")
        status = max(status, _finish(found, options))
    if options.json:
        print_json(described if len(options.files) > 1 else described[0])
    return status


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise an error where a page or a picture cannot be written, before anything is read."""
    from ..inspection import picture, web

    for option, target, require_suffix in (
        ("--html", options.html, web.require_suffix),
        ("--plot", options.plot, picture.require_suffix),
    ):
        if target is None:
            continue
        if len(options.files) > 1:
            raise CommandError(f"{option} is for one FILE, not for {len(options.files)}")
        with naming(target):
            require_suffix(Path(target).suffix)
        require_folder(target)


def _finish(found: StateFile, options: argparse.Namespace) -> Status:
    """Write the page and the picture of a file; say what is wrong with it."""
    from ..inspection import words

    if options.html:
        _write_page(found, options.html)
    if found.problem:
        print(f"{found.path}: {words.problem_text(found.problem)}", file=sys.stderr)
        return Status.NO
    if options.plot:
        _plot(found, options.plot)
    return Status.OK


def _write_page(found: StateFile, target: str) -> None:
    from ..inspection import render_html

    with naming(found.path):
        page = render_html(found)
    write_file(target, page)


def _plot(found: StateFile, target: str) -> None:
    from ..inspection import render

    with naming(found.path):
        image = render(found, Path(target).suffix)
    write_file(target, image)


def run_verify(options: argparse.Namespace) -> Status:
    """Check files."""
    from ..inspection import verification

    key, verdicts = read_key(options), []
    for name in options.files:
        with as_file(name) as path, shown(f"verification {name}") as progress:
            verdict = verification.verify_file(
                path, key=key, max_size=options.max_size, progress=progress
            )
        verdicts.append(replace(verdict, path=name))
    if options.json:
        print_json([verification.as_dict(verdict) for verdict in verdicts])
    else:
        print("\n".join(map(verification.text, verdicts)))
    return Status.OK if all(verdict.sound for verdict in verdicts) else Status.NO


def run_diff(options: argparse.Namespace) -> Status:
    """Compare two files."""
    from ..inspection import compare, report

    result = compare(_sound(options.a, options), _sound(options.b, options))
    if options.json:
        print_json(report.as_dict(result))
    else:
        print(report.text(result))
    return Status.OK if result.equal else Status.NO


def _sound(name: str, options: argparse.Namespace) -> StateFile:
    """Return the state file of that name; raise an error that names it where it is damaged."""
    from ..inspection.statefile import raised

    found = _inspected(name, options)
    if found.problem:
        with naming(name):
            raise raised(found.problem)
    return found


def _inspected(
    name: str, options: argparse.Namespace, *, progress: bool | None = False
) -> StateFile:
    """Return the state file of that name; errors name it."""
    from ..inspection import inspect_file

    told = shown("verification", enabled=None if progress else False)
    with as_file(name) as path, naming(name, path), told as report:
        found = inspect_file(
            path,
            model=options.model,
            key=read_key(options),
            max_size=options.max_size,
            progress=report,
        )
    return replace(found, path=name)


def run_convert(options: argparse.Namespace) -> Status:
    """Write a state in the other format."""
    from ..inspection.conversion import convert_file

    if options.plain and not options.model:
        raise CommandError("--plain says how a model was used: give --model too")
    try:
        with (
            as_file(options.source) as source,
            naming(options.source, source),
            shown("writing") as progress,
        ):
            done = convert_file(
                source,
                options.target,
                to=options.to,
                model=options.model,
                key=read_key(options),
                compress=options.compress,
                session_version=options.session_version,
                blob_version=options.blob_version,
                plain=options.plain,
                force=options.force,
                max_size=options.max_size,
                progress=progress,
            )
    except FileExistsError:
        raise CommandError(f"{options.target}: exists; --force replaces it") from None
    print(f"{done.path}: {done.kind}, {done.nbytes:,} bytes")
    return Status.OK
