"""What does not depend on how large a state is: the cost of a call, and other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from _bare import Bare
from _states import some_tokens
from _timing import MIB, Timing, Way, alternate, nothing
from _ways import (
    OURS,
    PARSE,
    SEQ_GET,
    SEQ_RESTORE,
    SEQ_SET,
    SEQ_SNAPSHOT,
    SEQ_SNAPSHOT_OUT,
    C,
    Work,
)

import llama_state as ls
from llama_state import layout
from llama_state.testing.models import write_model

TINY_TOKENS = 40
TINY_ROUNDS = 10
_TINY_REPEAT = 20
# A second or so of counting beside 512 MiB: more than one save or load of that.
_COUNT_PER_MIB = 160_000
COUNTING = "counting"
COUNTING_SNAPSHOT = "counting during snapshot(out=buffer)"
COUNTING_SAVE = "counting during save_state()"
COUNTING_LOAD = "counting during load_state()"


def tiny(library: ls.Library, folder: Path, rounds: int) -> list[Timing]:
    """Single calls on the plain tiny model, which holds 40 tokens."""
    path = write_model(folder / "tiny.gguf", text=True)
    with ls.Model(path, library) as model, model.context(n_ctx=256) as ctx:
        ctx.decode(some_tokens(TINY_TOKENS))
        blob = ctx.seq_snapshot(0)
        out = bytearray(len(blob))
        bare = Bare(ctx, TINY_TOKENS)
        parse = partial(
            layout.parse_sequence,
            blob,
            version=ctx.library.session_version,
            headed=ctx.library.sequence_head,
            traits=ctx._facts.traits,
        )
        ways = [
            Way(SEQ_GET, C, lambda: bare.seq_get(out)),
            Way(SEQ_SET, C, lambda: bare.seq_set(blob)),
            Way(SEQ_SNAPSHOT_OUT, OURS, lambda: ctx.seq_snapshot(0, out=out)),
            Way(SEQ_SNAPSHOT, OURS, ctx.seq_snapshot),
            Way(SEQ_RESTORE, OURS, lambda: ctx.seq_restore(blob)),
            Way(PARSE, OURS, parse),
        ]
        return alternate(
            [(len(blob), ways)],
            TINY_ROUNDS * rounds,
            section="tiny",
            configuration=f"{TINY_TOKENS} tokens",
            repeat=_TINY_REPEAT,
        )


def thread_ways(work: Work) -> Iterator[Way]:
    """Time a fixed count in pure Python: alone, and while another thread saves or restores."""
    ctx = work.it.ctx
    saved, loaded = work.folder / "saved", work.folder / "loaded"
    work.save(loaded, durable=True)
    times = _COUNT_PER_MIB * -(-len(work.blob) // MIB)

    def count() -> None:
        left = times
        while left:
            left -= 1

    alone = Way(COUNTING, OURS, count)
    yield alone
    yield _beside(alone, COUNTING_SNAPSHOT, lambda: ctx.snapshot(out=work.out))
    yield _beside(alone, COUNTING_SAVE, lambda: work.save(saved), saved.unlink)
    yield _beside(alone, COUNTING_LOAD, lambda: ctx.load_state(loaded))


def _beside(
    alone: Way, name: str, other: Callable[[], object], clean_up: Callable[[], None] = nothing
) -> Way:
    """Time the same while a thread does *other* again and again."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def again() -> None:
        while not stop.is_set():
            other()

    def begin() -> None:
        stop.clear()
        threads.append(threading.Thread(target=again))
        threads[-1].start()

    def end() -> None:
        stop.set()
        threads.pop().join()
        clean_up()

    return Way(name, OURS, alone.run, before=begin, after=end)
