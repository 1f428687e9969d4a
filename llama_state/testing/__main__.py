"""``python -m llama_state.testing MODEL.gguf``: check that the model's states restore correctly."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from .._llama.discovery import load_library
from ..errors import StateError
from .conformance import check_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a model and print the report.

    Returns:
        0 if everything is the same, 1 if something differs, 2 if nothing could be checked.
    """
    options = _parser().parse_args(arguments)
    try:
        library = load_library(options.library)
        report = check_model(options.model, library=library, n_tokens=options.n_tokens)
    except (StateError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(report.as_dict(), indent=2) if options.json else report)
    return 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_state.testing",
        description="Save and restore a model's state by every method and compare the results.",
    )
    parser.add_argument("model", metavar="MODEL.gguf", help="the model to check")
    parser.add_argument("--library", metavar="PATH", help="the libllama to check it with")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument(
        "--n-tokens",
        type=_positive,
        default=48,
        metavar="N",
        help="tokens in a sequence (default: %(default)s)",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
