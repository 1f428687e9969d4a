"""The options of a benchmark that say where its figures go, or come from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import _chart
from _report import Report, as_json, as_markdown, as_text, from_json


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them to a command."""
    parser.add_argument("--folder", type=Path, help="where to put files (the temporary folder)")
    parser.add_argument("--markdown", action="store_true", help="print the tables for a page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times")
    parser.add_argument(
        "--from", dest="read", type=Path, metavar="FILE", help="measure nothing: show that JSON"
    )
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw them, as .png or .svg")


def report(options: argparse.Namespace, measure: Callable[[argparse.Namespace], Report]) -> None:
    """Measure, or read what was measured, and put it where the options say."""
    if options.read:
        found = from_json(json.loads(options.read.read_text(encoding="utf-8")))
    else:
        found = measure(options)
    print(as_markdown(found) if options.markdown else as_text(found))
    if options.json:
        options.json.write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
    if options.chart:
        _chart.draw(found, options.chart)
