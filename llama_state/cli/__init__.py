"""The command ``llama-state``: arguments in, text out, exit status back. No logic of its own.

Each command imports what it needs when it runs. Those for state files work without a libllama,
and without the compiled extension.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from .. import __version__
from ..errors import StateError
from . import checks, completion, demo, engines, states, stores
from .parsers import Run, exit_statuses, wrapped
from .problems import sentence
from .status import Status

DESCRIPTION = (
    "Look into saved states of llama.cpp, look after prefix stores, check that states of a model"
    " come back, and show which libllama is used. The commands for state files need no libllama."
)
EXITS: Mapping[int, str] = {
    Status.OK: "done, or yes",
    Status.NO: "no: a file is damaged, states differ, no libllama is usable, ...",
    Status.TROUBLE: "no answer: wrong use, an unreadable file, a missing library or package",
}
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options, rest = _parser().parse_known_args(arguments)
    if rest:  # the usage of the command, and not that of all commands
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    run: Run = options.run
    try:
        status = run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Status.TROUBLE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (StateError, OSError, ValueError) as error:
        print(sentence(error), file=sys.stderr)
        return int(Status.TROUBLE)
    return int(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-state",
        description=wrapped(DESCRIPTION),
        epilog="llama-state COMMAND --help shows its arguments and an example.\n\n"
        + exit_statuses(EXITS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"llama_state {__version__}",
        help="print the version of llama_state and exit",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    states.add_commands(commands)
    stores.add_commands(commands)
    checks.add_commands(commands)
    demo.add_commands(commands)
    engines.add_commands(commands)
    completion.add_commands(commands, parser)
    return parser
