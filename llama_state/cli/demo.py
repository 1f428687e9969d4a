"""The command ``demo``: what a save and a restore are, on a model that it makes itself."""

from __future__ import annotations

import argparse
import random
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import require_model
from .output import print_json
from .parsers import Commands, add_command
from .problems import CommandError
from .status import Status

if TYPE_CHECKING:
    from ..context.model import Model
    from ..testing.conformance import Report

CONFIGURATIONS = {
    "one sequence": {},
    "three, split": {"n_seq_max": 3},
    "three, unified": {"n_seq_max": 3, "kv_unified": True},
}
MODEL, STATE, PAGE = "demo.gguf", "demo.state", "demo.html"
_TOKENS = 300
# Of a row of the report: how it was saved and restored, and between which contexts.
_AXES = ("function", "configuration")


@dataclass(frozen=True)
class Story:
    """One save and one restore.

    Attributes:
        model: The model's file.
        model_nbytes: Its size.
        made: Whether the demo made it.
        arch: Its architecture.
        state: The state's file.
        n_tokens: Tokens that were decoded before the save.
        nbytes: Size of the state's file.
        decode_seconds: Time to decode them.
        save_seconds: Time to save the state.
        load_seconds: Time to load it.
        n_logits: Logits of the next token.
        error: Normalized mean squared error of these; 0 where they are equal bit for bit.
    """

    model: str
    model_nbytes: int
    made: bool
    arch: str
    state: str
    n_tokens: int
    nbytes: int
    decode_seconds: float
    save_seconds: float
    load_seconds: float
    n_logits: int
    error: float


def add_commands(commands: Commands) -> None:
    """Add the command of this module."""
    parser = add_command(
        commands,
        "demo",
        run_demo,
        summary="show what a save and a restore are, on a tiny model",
        details="Make a tiny model, decode some tokens, save the state to a file, load it into"
        " another context, and compare what both expect next. Then do the same with every"
        " function that saves and restores, in three configurations of the context. It is a"
        " short check, too.",
        example="llama-state demo --keep demo",
        exits={0: "everything is equal", 1: "something is not", 2: "nothing could be checked"},
    )
    parser.add_argument(
        "--keep",
        metavar="FOLDER",
        help="leave the model and the state there, to look at: a new or empty folder, or that of"
        " an earlier demo",
    )
    parser.add_argument(
        "--all", action="store_true", help="print every round trip instead, a line for each"
    )
    parser.add_argument("--model", metavar="M.gguf", help="use this model instead of a tiny one")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def run_demo(options: argparse.Namespace) -> Status:
    """Save and restore once, and tell it; then in every way, and count."""
    from .._llama.discovery import load_library
    from ..context.model import Model
    from ..testing.conformance import check_model
    from ..testing.models import write_model

    if options.model:
        require_model(options.model)
    library = load_library()
    with _folder(options.keep) as folder:
        path = options.model or write_model(folder / MODEL, text=True)
        # Threads that wait for one another take longer than a tiny model.
        threads: dict[str, Any] = {} if options.model else {"n_threads": 1}
        with Model(path, library) as model:
            story = _story(model, folder / STATE, made=not options.model, **threads)
            ways = {name: {**threads, **way} for name, way in CONFIGURATIONS.items()}
            report = check_model(model, configurations=ways)
    ok = report.ok and _is_small(story)
    if options.json:
        print_json({**report.as_dict(), "ok": ok, "story": asdict(story)})
    elif options.all:
        print(report)
        print("every round trip is equal" if report.ok else "A ROUND TRIP IS NOT EQUAL")
    else:
        print("\n".join([*_told(story), *_counted(report), "", *_next(options)]))
    return Status.OK if ok else Status.NO


@contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    """Give the folder to write to: the one to keep, or one that is removed."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="llama_state-demo-") as made:
            yield Path(made)
        return
    folder = Path(keep)
    folder.mkdir(parents=True, exist_ok=True)
    if {path.name for path in folder.iterdir()} - {MODEL, STATE, PAGE}:
        raise CommandError(f"{keep}: there are other files in it; give a new or empty folder")
    yield folder


def _story(model: Model, state: Path, *, made: bool, **threads: Any) -> Story:
    """Decode, save, load into a context that held something else, and compare."""
    from ..testing.runs import NEXT_TOKEN, SPARE, nmse, some_tokens

    rng = random.Random(0)  # noqa: S311 - no secrets
    tokens, others = (some_tokens(rng, model.n_vocab, count) for count in (_TOKENS, _TOKENS // 3))
    n_ctx = _TOKENS + SPARE
    with (
        model.context(n_ctx=n_ctx, **threads) as ctx,
        model.context(n_ctx=n_ctx, **threads) as other,
    ):
        other.decode(others)
        started = time.perf_counter()
        ctx.decode(tokens)
        decoded = time.perf_counter()
        nbytes = ctx.save_state(state, tokens)
        saved = time.perf_counter()
        other.load_state(state)
        loaded = time.perf_counter()
        ctx.decode([NEXT_TOKEN])
        other.decode([NEXT_TOKEN])
        expected, got = ctx.logits(), other.logits()
        return Story(
            model=model.path,
            model_nbytes=Path(model.path).stat().st_size,
            made=made,
            arch=model.arch,
            state=str(state),
            n_tokens=len(tokens),
            nbytes=nbytes,
            decode_seconds=decoded - started,
            save_seconds=saved - decoded,
            load_seconds=loaded - saved,
            n_logits=len(expected),
            error=nmse(expected, got),
        )


def _is_small(story: Story) -> bool:
    """Whether no more than rounding makes the logits differ."""
    from ..testing.conformance import nmse_limit

    return story.error < nmse_limit(story.arch)


def _told(story: Story) -> Iterator[str]:
    from ..inspection.words import size

    about = "A tiny model was made, with random weights" if story.made else f"Model {story.model}"
    yield f"{about}: {story.arch}, {size(story.model_nbytes)}."
    yield f"It decoded {story.n_tokens} tokens in {_ms(story.decode_seconds)}."
    yield f"Its state was saved to a file: {size(story.nbytes)} in {_ms(story.save_seconds)}."
    yield (
        "Another context, which held something else, was given that state: "
        f"{_ms(story.load_seconds)}."
    )
    equal = (
        "equal, bit for bit" if not story.error else f"equal up to an error of {story.error:.1g}"
    )
    if not _is_small(story):
        equal = f"NOT EQUAL: their error is {story.error:.1g}"
    yield f"Both decoded one more token. The {story.n_logits} logits of the next are {equal}."


def _counted(report: Report) -> Iterator[str]:
    made = [row for row in report.rows if row.outcome != "not available"]
    ways, contexts = (len({getattr(row, name) for row in made}) for name in _AXES)
    bad = sum(not row.ok for row in made)
    equal = f"NOT EQUAL in {bad} of them: add --all." if bad else "equal in all of them."
    yield f"The same in {ways} ways and {contexts} kinds of context, {len(made)} round trips:"
    yield f"bytes, positions, tokens, logits and the next tokens are {equal}"


def _next(options: argparse.Namespace) -> Iterator[str]:
    """Say what to type next: each line is a command that runs as it is."""
    rows = [
        ("llama-state demo --keep demo", "keep the model and the state, to look at"),
        ("llama-state demo --all", "every round trip"),
        ("llama-state doctor", "which llama.cpp this was"),
    ]
    if options.keep is not None:
        model, state, page = (
            shlex.quote(str(path))
            for path in (
                options.model or Path(options.keep, MODEL),
                Path(options.keep, STATE),
                Path(options.keep, PAGE),
            )
        )
        rows = [
            (f"llama-state inspect {state} --model {model}", "what is in the state"),
            (f"llama-state inspect {state} --html {page}", "the same for a browser"),
            (f"llama-state check {model} --quick", "more about that model"),
        ]
    width = max(len(command) for command, _ in rows)
    yield "Next:"
    for command, purpose in rows:
        yield f"  {command:<{width}}  # {purpose}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
