"""What a saved state spares: a text is evaluated by real models, saved, and loaded.

    python benchmarks/real_models.py MODEL.gguf... [--tokens N,...] [--json FILE] [--markdown]

Each model reads the beginning of a text, in a context as long, with the threads that llama.cpp
takes. Evaluating it, saving its state (on the disk when it returns) and loading it into another
context take turns. Needs the libllama that ``load_library()`` finds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import _machine
from _report import Report, as_json, as_markdown, as_text
from _targets import findings
from _timing import Timing, Way, alternate
from _ways import EVALUATE, LOAD, OURS, SAVE_DURABLE, C

import llama_state as ls

TEXT = Path(__file__).resolve().parents[1] / "docs" / "guide.md"
TOKENS = (500, 1500, 3000)


def measure(
    model: ls.Model, text: str, lengths: Sequence[int], folder: Path, rounds: int
) -> Iterator[Timing]:
    """Yield how long each way takes with the first tokens of *text*, for each of *lengths*."""
    every = model.tokenize(text)
    for n_tokens in lengths:
        tokens, file, new = every[:n_tokens], folder / "state", folder / "new"
        n_ctx = len(tokens) + 64
        with model.context(n_ctx=n_ctx) as source, model.context(n_ctx=n_ctx) as target:
            source.decode(tokens)
            nbytes = source.save_state(file, tokens)
            ways = (
                Way(EVALUATE, C, partial(target.decode, tokens), before=target.clear),
                Way(SAVE_DURABLE, OURS, partial(source.save_state, new, tokens), after=new.unlink),
                Way(LOAD, OURS, partial(target.load_state, file), before=target.clear),
            )
            name = f"{Path(model.path).stem}, {len(tokens)} tokens"
            yield from alternate([(nbytes, ways)], rounds, section="real", configuration=name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="a GGUF file")
    parser.add_argument("--text", type=Path, default=TEXT, help="what they read (docs/guide.md)")
    parser.add_argument(
        "--tokens",
        type=lambda text: tuple(map(int, text.split(","))),
        default=TOKENS,
        metavar="N,...",
        help=f"how much of it, each in turn ({','.join(map(str, TOKENS))})",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs that are measured (3)")
    parser.add_argument("--folder", type=Path, help="where to put files (the temporary folder)")
    parser.add_argument("--markdown", action="store_true", help="print the tables for a page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory(prefix="llama_state-", dir=options.folder) as made:
        text = options.text.read_text(encoding="utf-8")
        facts = _machine.facts(ls.load_library(), None, Path(made))
        for path in options.models:
            with ls.Model(path) as model:
                timings += measure(model, text, options.tokens, Path(made), options.rounds)
    facts["seconds"] = f"{time.perf_counter() - start:.0f}"
    report = Report(facts, options.rounds, timings, findings(timings))
    print(as_markdown(report) if options.markdown else as_text(report))
    if options.json:
        options.json.write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
