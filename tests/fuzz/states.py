"""One process that gives damaged states of one kind of model to the public API.

Prints the number of each case before it runs, so that whoever started it knows which one killed
it, and what became of it after, as a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import llama_state as ls
from llama_state import layout

from .damage import KINDS

OPTIONS = (
    {"n_seq_max": 1},
    {"n_seq_max": 2},
    {"n_seq_max": 2, "kv_unified": True},
    {"n_seq_max": 2, "flash_attn": False},
)


class Way(NamedTuple):
    """A public function that takes a state, and a sound state for it.

    Attributes:
        scope: The sequence that it goes to; None: the whole context.
        sound: The state; of a file all of it.
        start: Where in *sound* the payload starts.
        end: Where the state in it ends and restore points begin; None: at its end.
        keep: How much of *sound* is not damaged.
    """

    name: str
    give: Callable[[ls.Context, bytes, Path], ls.Restored]
    scope: int | None
    sound: bytes
    start: int = 0
    end: int | None = None
    keep: int = 0

    @property
    def file(self) -> bool:
        """Whether it takes a file."""
        return self.start > 0


def _load(ctx: ls.Context, content: bytes, path: Path) -> ls.Restored:
    path.write_bytes(content)
    return ctx.load_state(path)


def _seq_load(ctx: ls.Context, content: bytes, path: Path) -> ls.Restored:
    path.write_bytes(content)
    return ctx.seq_load_state(path)


def _seq_load_with_points(ctx: ls.Context, content: bytes, path: Path) -> ls.Restored:
    path.write_bytes(content)
    restored = ctx.seq_load_state(path, restore_points=True)
    for point in restored.restore_points:
        # They are read, not compared with the context: it decides as they are used.
        with suppress(ls.StateError):
            ctx.seq_restore(point.blob, partial=True)
    return restored


def _seq_load_unvalidated(ctx: ls.Context, content: bytes, path: Path) -> ls.Restored:
    path.write_bytes(content)
    return ctx.seq_load_state(path, validate=False, restore_points=True)


def with_points(ctx: ls.Context, path: Path) -> Iterator[Way]:
    """The ways in for a file with restore points, as llama-server writes it."""
    partial = ctx.seq_snapshot(partial=True)
    if not layout.has_sequence_head(partial):
        return  # a build that is older than restore points
    points = [ls.RestorePoint(ctx.n_past(), partial)] * 2
    end = ctx.seq_save_state(path, 0, range(3), durable=False)
    ctx.seq_save_state(path, 0, range(3), durable=False, restore_points=points)
    way = Way("points", _seq_load_with_points, 0, path.read_bytes(), start=24, end=end)
    yield way
    yield way._replace(name="damaged points", keep=end)
    yield way._replace(name="points, not validated", give=_seq_load_unvalidated, keep=end)


def ways(ctx: ls.Context, path: Path) -> Iterator[Way]:
    """Every way in, with a state of *ctx*."""
    yield Way("restore", lambda c, b, _: c.restore(b), None, ctx.snapshot())
    yield Way("seq_restore", lambda c, b, _: c.seq_restore(b), 0, ctx.seq_snapshot())
    ctx.save_state(path, range(3), durable=False)
    yield Way("load_state", _load, None, path.read_bytes(), start=24)
    ctx.seq_save_state(path, 0, range(3), durable=False)
    yield Way("seq_load_state", _seq_load, 0, path.read_bytes(), start=24)
    whole, one = _of_another_form(ctx)
    yield Way("restore of another form", lambda c, b, _: c.restore(b), None, whole)
    yield Way("seq_restore of another form", lambda c, b, _: c.seq_restore(b), 0, one)
    yield Way(
        "partial",
        lambda c, b, _: c.seq_restore(b, partial=True),
        0,
        ctx.seq_snapshot(partial=True),
    )
    yield from with_points(ctx, path)


def _of_another_form(ctx: ls.Context) -> tuple[bytes, bytes]:
    """The state of a context and of its sequence 0, of another version and with V turned."""
    found = []
    for seq_id in (None, 0):
        state = ctx.checkpoint(seq_id)
        own = layout.form_of(state.layout)
        # The n-grams of qwen4exp came with version 10.
        version = next(v for v in (10, 11) if v != ctx.library.session_version)
        form = replace(own, version=version, v_trans=not own.v_trans)
        found.append(bytes(layout.convert(state.payload, state.layout, form)))
    return found[0], found[1]


def fill(ctx: ls.Context, start: int, n: int) -> None:
    for seq_id in range(ctx.n_seq_max):
        ctx.decode([(start + 3 * i + seq_id) % ctx.n_vocab for i in range(n + seq_id)], seq_id)


class Bench:
    """Contexts of one model in one configuration, and sound states of them."""

    def __init__(self, model: ls.Model, options: dict[str, object], folder: Path) -> None:
        self.path = folder / "state"
        self.target = model.context(n_ctx=512, n_threads=1, **options)  # type: ignore[arg-type]
        with model.context(n_ctx=512, n_threads=1, **options) as source:  # type: ignore[arg-type]
            fill(source, 1, 9)
            self.ways = list(ways(source, self.path))
        fill(self.target, 50, 12)
        self.held = self.target.snapshot()

    def run(self, rng: random.Random, others: list[bytes]) -> dict[str, str]:
        """One case: damage a state, give it, and look at what it did."""
        way = rng.choice(self.ways)
        kind = rng.choice(list(KINDS))
        blob = way.sound[: way.keep] + KINDS[kind](rng, way.sound[way.keep :], others)
        try:
            restored = way.give(self.target, blob, self.path)
        except ls.StateError as error:
            same = self.target.snapshot() == self.held
            outcome = "refused" if same else f"CHANGED by {type(error).__name__}: {error}"
        except Exception as error:
            outcome = f"OUTSIDE the tree: {type(error).__name__}: {error}"
        else:
            outcome = self.accepted(way, blob, restored)
        return {"way": way.name, "damage": kind, "outcome": outcome}

    def accepted(self, way: Way, blob: bytes, restored: ls.Restored) -> str:
        """What an accepted state differs in from the sound one; puts back what was there."""
        try:
            if restored.converted or "another form" in way.name:
                return self.converted(restored)
            start = layout.parse_file_header(blob).payload_offset if way.file else 0
            payload, sound = blob[start:], way.sound[way.start :]
            if way.scope is None and self.target.snapshot() != payload:
                return "MISREAD: saved again it is another state"
            for seq_id, span in restored.sequences.items():
                # Hostile positions crash here, if at all.
                if span.n_past < 400:
                    self.target.decode([1], seq_id)
            return self.classify(way, payload, sound)
        finally:
            self.target.restore(self.held)

    def converted(self, restored: ls.Restored) -> str:
        """What was rewritten holds what was said, and can be saved and decoded on."""
        for seq_id, span in restored.sequences.items():
            if self.target.n_past(seq_id) != span.n_past:
                return "MISREAD: it holds something else"
            if span.n_past < 400:
                self.target.decode([1], seq_id)
        self.target.restore(self.target.snapshot())
        return "another sound state"

    def classify(self, way: Way, payload: bytes, sound: bytes) -> str:
        """Where the state that was accepted differs from the sound one."""
        if payload == sound:
            return "equal"
        if len(payload) == len(sound):
            state = sound if way.end is None else way.sound[way.start : way.end]
            blocks = tensor_ranges(self.parse(way, state))
            changed = [i for i, (a, b) in enumerate(zip(payload, sound, strict=True)) if a != b]
            if all(any(i in block for block in blocks) for i in changed):
                return "differs in tensor bytes"
        return "another sound state"

    def parse(self, way: Way, payload: bytes) -> layout.Layout:
        library, traits = self.target.library, self.target._facts.traits
        if way.scope is None:
            return layout.parse_whole(payload, version=library.session_version, traits=traits)
        return layout.parse_sequence(
            payload,
            version=library.session_version,
            headed=library.sequence_head and not way.file,
            traits=traits,
            partial=way.name == "partial",
        )


def tensor_ranges(parsed: layout.Layout) -> list[range]:
    """Where the tensors of a state lie."""
    found = []
    for cache in parsed.caches:
        parts = cache.streams if isinstance(cache, layout.KVCache) else (cache,)
        for part in parts:
            for name in ("k", "v", "r", "p", "s"):
                blocks = getattr(part, name, ())
                found += [range(b.offset, b.offset + b.nbytes) for b in blocks]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind")
    parser.add_argument("models", type=Path)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--cases", type=int, required=True)
    arguments = parser.parse_args()
    library = ls.load_library()
    with tempfile.TemporaryDirectory() as folder:
        model = ls.Model(arguments.models / f"{arguments.kind}.gguf", library)
        benches = [Bench(model, dict(options), Path(folder)) for options in OPTIONS]
        others = [way.sound for bench in benches for way in bench.ways]
        others += [path.read_bytes() for path in sorted(arguments.models.glob("*.state"))]
        for number in range(arguments.first, arguments.first + arguments.cases):
            print(number, flush=True)
            rng = random.Random(f"{arguments.kind} {number}")
            print(json.dumps(rng.choice(benches).run(rng, others)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
