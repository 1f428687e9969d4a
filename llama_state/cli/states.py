"""The commands for state files: ``inspect``, ``verify``, ``diff`` and ``convert``."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SaveError, StateError
from .progress import shown

if TYPE_CHECKING:
    from . import Commands

MODEL_HELP = "the model it belongs to: sequence states do not name theirs"
KEY_HELP = "file with the key that the checkpoint is authenticated with (its bytes as they are)"


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    inspect = commands.add_parser("inspect", help="show what is in a state file")
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.add_argument("--plot", metavar="OUT", help="draw it: a .png or .svg file")
    _add_model(inspect)
    _add_key(inspect)
    inspect.set_defaults(run=run_inspect, trouble=1)

    verify = commands.add_parser("verify", help="tell whether state files are sound")
    verify.add_argument("files", metavar="FILE", nargs="+")
    verify.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    _add_key(verify)
    verify.set_defaults(run=run_verify, trouble=1)

    diff = commands.add_parser(
        "diff",
        help="compare two states",
        epilog="The exit status is 0 when they are equal, 1 when they differ, 2 in trouble.",
    )
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")
    diff.add_argument("--json", action="store_true", help="print the differences as JSON")
    _add_model(diff)
    _add_key(diff)
    diff.set_defaults(run=run_diff, trouble=2)

    convert = commands.add_parser("convert", help="between native files and checkpoints")
    convert.add_argument("source", metavar="IN")
    convert.add_argument("target", metavar="OUT")
    convert.add_argument(
        "--to", choices=("checkpoint", "native"), help="what to write (the other kind than IN)"
    )
    convert.add_argument("--compress", action="store_true", help="compress the checkpoint")
    convert.add_argument("--force", action="store_true", help="replace OUT if it is there")
    convert.add_argument(
        "--session-version", type=int, metavar="N", help="of a blob that does not tell its own"
    )
    convert.add_argument("--model", metavar="M.gguf", help="record that it belongs to this model")
    convert.add_argument(
        "--plain",
        action="store_true",
        help="record too that it was used without adapters, with its own rope settings",
    )
    _add_key(convert)
    convert.set_defaults(run=run_convert, trouble=1)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M.gguf", help=MODEL_HELP)


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key-file", metavar="KEY", help=KEY_HELP)


def run_inspect(options: argparse.Namespace) -> int:
    """Show, and draw, what is in a file."""
    from .._io import atomic
    from ..inspection import inspect_file, render, summary, text, words

    with _naming(options.file), shown("verification") as progress:
        found = inspect_file(
            options.file, model=options.model, key=_key(options), progress=progress
        )
    if options.json:
        _print_json(summary.describe(found))
    else:
        print(text.text(found))
    if found.problem:
        print(f"{options.file}: {words.problem_text(found.problem)}", file=sys.stderr)
        return 1
    if options.plot:
        with _naming(options.file):
            image = render(found, Path(options.plot).suffix)
        try:
            atomic.write_file(options.plot, [image], durable=False)
        except SaveError as error:  # its text is for states
            code = error.errno or errno.EIO
            raise OSError(code, os.strerror(code), options.plot) from error
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Check files."""
    from ..inspection import verification

    key, verdicts = _key(options), []
    for path in options.files:
        with shown(f"verification {path}") as progress:
            verdicts.append(verification.verify_file(path, key=key, progress=progress))
    if options.json:
        _print_json([verification.as_dict(verdict) for verdict in verdicts])
    else:
        print("\n".join(map(verification.text, verdicts)))
    return 0 if all(verdict.sound for verdict in verdicts) else 1


def run_diff(options: argparse.Namespace) -> int:
    """Compare two files."""
    from ..inspection import compare, inspect_file, report
    from ..inspection.statefile import raised

    opened = []
    for path in (options.a, options.b):
        with _naming(path):
            opened.append(inspect_file(path, model=options.model, key=_key(options)))
            if problem := opened[-1].problem:
                raise raised(problem)
    result = compare(*opened)
    if options.json:
        _print_json(report.as_dict(result))
    else:
        print(report.text(result))
    return 0 if result.equal else 1


def run_convert(options: argparse.Namespace) -> int:
    """Write a state in the other format."""
    from ..inspection.conversion import convert_file

    if options.plain and not options.model:
        raise _Trouble("--plain is said of a model: give --model too")
    try:
        with _naming(options.source), shown("writing") as progress:
            done = convert_file(
                options.source,
                options.target,
                to=options.to,
                model=options.model,
                key=_key(options),
                compress=options.compress,
                session_version=options.session_version,
                plain=options.plain,
                force=options.force,
                progress=progress,
            )
    except FileExistsError:
        raise _Trouble(f"{options.target}: is there already; --force replaces it") from None
    print(f"{done.path}: {done.kind}, {done.nbytes:,} bytes")
    return 0


class _Trouble(StateError):
    """An error with the name of the file that it is about."""


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Give errors that do not name the file the name of the one at *path*."""
    try:
        yield
    except StateError as error:
        if isinstance(error, OSError):
            raise
        from ..inspection.words import problem_text

        raise _Trouble(f"{path}: {problem_text(error)}") from error


def _key(options: argparse.Namespace) -> bytes | None:
    if options.key_file is None:
        return None
    return Path(options.key_file).read_bytes()


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))
