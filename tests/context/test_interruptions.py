"""Interruptions: wherever a call ends, what is there is as before, as after, or empty and said.

Each call is made once for every place where an exception can end it; ``HYPOTHESIS_PROFILE=soak``
takes all places, the other profiles a part of them, another one for each call and kind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import llama_state as ls
from llama_state import layout
from llama_state.context import device, restore, sequences
from llama_state.context.changes import Change, attempt
from llama_state.context.savepoint import Savepoint
from llama_state.inspection.conversion import convert_file
from llama_state.inspection.verification import verify_file
from tests.interruptions import (
    STRIDE,
    Interruption,
    Place,
    at_places,
    at_signals,
    interrupted,
    is_free,
    left_taken,
    places,
    said_of,
    signalled,
)
from tests.libllama import MODELS

pytestmark = pytest.mark.libllama

LONG = list(range(1, 20))  # three pieces
BLOCK = [2, 2]
PROMPT_B = [9, 8, 7, 6, 5]
KEY = bytes(range(32))
Content = tuple[bytes, ...]


class Bench:
    """A context in state A, and state B in all its forms.

    Args:
        model: Of which kind the context is.
        folder: For files.
        unified: Of one stream.
    """

    def __init__(self, model: ls.Model, folder: Path, *, unified: bool) -> None:
        self.folder = folder
        self.ctx = ctx = model.context(
            n_ctx=128, n_batch=8, n_seq_max=3, kv_unified=unified, n_threads=1
        )
        with suppress(ls.UnsupportedError):
            ctx.declare(adapters=[], rope={})
        ctx.decode([9, 8, 7, 6, 5], 0)
        ctx.decode([3, 2, 1], 1)
        self.b, self.seq_b = ctx.snapshot(), ctx.seq_snapshot(0)
        self.stored = ls.PrefixStore(folder / "stored", capacity_bytes=1 << 24, chunk_tokens=4)
        self.stored.remember(ctx, PROMPT_B, 0)
        self.empty = ls.PrefixStore(folder / "empty", capacity_bytes=1 << 24, chunk_tokens=4)
        self.checkpoint_b = ctx.checkpoint(0, tokens=[9, 8, 7, 6, 5], logits=False)
        ctx.save_state(folder / "b")
        ctx.seq_save_state(folder / "seq_b", 0)
        self.checkpoint_b.save(folder / "b.llst")
        self.checkpoint_b.save(folder / "key.llst", key=KEY)
        self.other, self.seq_other = _of_another_form(ctx)
        ctx.clear()
        ctx.decode([1, 2, 3, 4], 0)
        self.partial_a = _or_none(lambda: ctx.seq_snapshot(0, partial=True))
        ctx.decode([5, 6], 0)
        ctx.decode([7, 7, 7], 1)
        self.a = ctx.snapshot()
        self.fresh()

    def fresh(self) -> None:
        """Bring state A back, and what the calls need."""
        self.ctx.restore(self.a)
        (self.folder / "saved").unlink(missing_ok=True)
        self.empty.evict(0)
        self.on_device = _or_none(lambda: self.ctx.seq_device_snapshot(1))

    def content(self) -> Content:
        """What each sequence holds."""
        return tuple(self.ctx.seq_snapshot(i) for i in range(self.ctx.n_seq_max))


def _of_another_form(ctx: ls.Context) -> tuple[bytes, bytes]:
    """The state of a context and of its sequence 0, in other streams and with V turned."""
    whole, one = ctx.checkpoint(), ctx.checkpoint(0)
    own = layout.form_of(one.layout)
    turned = replace(own, v_trans=not own.v_trans)
    many = replace(turned, n_stream=5)
    other = layout.convert(whole.payload, whole.layout, turned)
    return bytes(other), bytes(layout.convert(one.payload, one.layout, many))


def _or_none(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ls.StateError:
        return None


def _undone(bench: Bench) -> None:
    """A block that changes a sequence and raises: the call is the undoing of it."""
    try:
        with bench.ctx.savepoint(0):
            bench.ctx.decode(BLOCK)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


CALLS: dict[str, Callable[[Bench], object]] = {
    "decode": lambda b: b.ctx.decode(LONG),
    "decode into an empty one": lambda b: b.ctx.decode(LONG, 2),
    "logits": lambda b: _or_none(b.ctx.logits),
    "n_past": lambda b: b.ctx.n_past(1),
    "seq_rm": lambda b: b.ctx.seq_rm(1),
    "seq_cp": lambda b: b.ctx.seq_cp(0, 1),
    "seq_cp into an empty one": lambda b: b.ctx.seq_cp(0, 2),
    "clear": lambda b: b.ctx.clear(),
    "state_size": lambda b: b.ctx.state_size(),
    "snapshot": lambda b: b.ctx.snapshot(),
    "restore": lambda b: b.ctx.restore(b.b),
    "restore unread": lambda b: _or_none(lambda: b.ctx.restore(b.b, validate=False)),
    "restore refused": lambda b: _or_none(lambda: b.ctx.restore(b.b[:-4], validate=False)),
    "save_state": lambda b: b.ctx.save_state(b.folder / "saved"),
    "load_state": lambda b: b.ctx.load_state(b.folder / "b"),
    "seq_save_state": lambda b: b.ctx.seq_save_state(b.folder / "saved", 1),
    "seq_load_state": lambda b: b.ctx.seq_load_state(b.folder / "seq_b", 1),
    "seq_state_size": lambda b: b.ctx.seq_state_size(1),
    "seq_snapshot": lambda b: b.ctx.seq_snapshot(1, out=bytearray(b.ctx.seq_state_size(1))),
    "seq_restore": lambda b: b.ctx.seq_restore(b.seq_b, 1),
    "seq_restore over it": lambda b: b.ctx.seq_restore(b.seq_b, 0),
    "seq_restore into an empty one": lambda b: b.ctx.seq_restore(b.seq_b, 2),
    "seq_restore of another form": lambda b: b.ctx.seq_restore(b.seq_other, 0),
    "restore of another form": lambda b: b.ctx.restore(b.other),
    "seq_restore unread": lambda b: b.ctx.seq_restore(b.seq_b, 0, validate=False),
    "seq_restore partial": lambda b: b.partial_a and b.ctx.seq_restore(b.partial_a, partial=True),
    "seq_device_snapshot": lambda b: _or_none(lambda: b.ctx.seq_device_snapshot(0)),
    "DeviceSnapshot.restore": lambda b: b.on_device and b.on_device.restore(0),
    "checkpoint": lambda b: b.ctx.checkpoint(0),
    "resume": lambda b: b.ctx.resume(b.checkpoint_b),
    "savepoint": _undone,
    "fingerprint": lambda b: b.ctx.fingerprint,
    "declare": lambda b: b.ctx.declare(rope={}),
    "Checkpoint.save": lambda b: b.checkpoint_b.save(b.folder / "saved"),
    "Checkpoint.load": lambda b: ls.Checkpoint.load(b.folder / "b.llst"),
    "Checkpoint.load with a key": lambda b: ls.Checkpoint.load(b.folder / "key.llst", key=KEY),
    "Checkpoint.from_native": lambda b: ls.Checkpoint.from_native(b.folder / "seq_b"),
    "Checkpoint.to_native": lambda b: b.checkpoint_b.to_native(b.folder / "saved"),
    "PrefixStore.recall": lambda b: b.stored.recall(b.ctx, [*PROMPT_B, 1], 0),
    "PrefixStore.recall into an empty one": lambda b: b.stored.recall(b.ctx, [*PROMPT_B, 1], 2),
    "PrefixStore.recall of nothing": lambda b: b.empty.recall(b.ctx, PROMPT_B, 1),
    "PrefixStore.remember": lambda b: b.empty.remember(b.ctx, range(1, 7), 0),
    "PrefixStore.find": lambda b: b.stored.find(b.ctx, PROMPT_B),
    "convert_file": lambda b: convert_file(b.folder / "b.llst", b.folder / "saved", force=True),
    "inspect_file": lambda b: ls.inspect_file(b.folder / "b"),
    "verify_file": lambda b: verify_file(b.folder / "b.llst"),
}
# An attribute, and the end of all.
NOT_HERE = {"close", "pointer"}
# What these replace is not at hand any more. All others leave what was there, or what came in.
MAY_EMPTY = {
    "seq_cp",
    "seq_cp into an empty one",
    "DeviceSnapshot.restore",
    "PrefixStore.recall",
    "PrefixStore.recall into an empty one",
}
# Those that are settled where they are interrupted.
SETTLED = [
    "decode",
    "decode into an empty one",
    "seq_cp",
    "restore",
    "restore unread",
    "load_state",
    "seq_restore over it",
    "seq_restore partial",
    "DeviceSnapshot.restore",
]
# Those that llama.cpp cannot do everywhere in the session version of old builds: refused at once.
NOT_OF_VERSION_9 = {"restore unread", "DeviceSnapshot.restore"}


# After the line of the head.
_FIRST_OF_EXIT = [line for *_, line in Savepoint.__exit__.__code__.co_lines()][1]


class Kind(NamedTuple):
    """A model and a layout of its cells."""

    name: str
    unified: bool


KINDS = [
    Kind("llama-dense", True),
    Kind("llama-dense", False),
    Kind("gemma3-dense", True),
    Kind("jamba-dense", False),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda k: f"{k.name}-{'u' * k.unified or 's'}")
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    name, unified = request.param
    if name not in MODELS:
        pytest.skip("this libllama cannot load it")
    bench = Bench(MODELS[name], tmp_path_factory.mktemp("files"), unified=unified)
    yield bench
    bench.ctx.close()


def test_every_call_is_in_the_table() -> None:
    public = {name for name in vars(ls.Context) if not name.startswith("_")}
    assert public - NOT_HERE <= {name.split(" ")[0] for name in CALLS}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CALLS)
def test_interrupted_anywhere(bench: Bench, name: str) -> None:
    """As before, as after, or emptied and said so; nothing stays locked, open or half made."""
    call = CALLS[name]
    bench.fresh()
    before = bench.content()
    call(bench)
    after = bench.content()
    bench.fresh()
    bench.ctx.decode(BLOCK)
    block = bench.content()
    for place, said in at_places(name, lambda: call(bench), bench.fresh):
        _is_sound(bench, name, place, before, block if _left(place) else after, said)
        bench.fresh()
        call(bench)
        assert bench.content() == after, place


@pytest.mark.filterwarnings("ignore::UserWarning")
# A signal in a callback of ctypes, or in a finalizer, is dropped by Python.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
# (Where a signal meets a savepoint between its block and its undo, only the places can tell.)
@pytest.mark.parametrize("name", [name for name in CALLS if name != "savepoint"])
def test_signals(bench: Bench, name: str) -> None:
    """The same for signals, swept over the call."""
    call = CALLS[name]
    bench.fresh()
    before = bench.content()
    call(bench)
    after = bench.content()
    for place, said in at_signals(lambda: call(bench), bench.fresh):
        _is_sound(bench, name, place, before, after, said)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signals_in_a_close() -> None:
    """Python drops what a signal raises in a finalizer: a context is freed all the same."""

    def opened() -> ls.Context:
        return next(iter(MODELS.values())).context(n_ctx=128, n_batch=8, n_threads=1)

    ctx = opened()
    start = time.perf_counter()
    ctx.close()
    took = time.perf_counter() - start
    for i in range(500):
        ctx = opened()
        pointer = ctx._handle.pointer
        if signalled(ctx.close, took * (i + 1) / 500) is not None:
            ctx.close()
        assert pointer.freed, i
        assert not left_taken(), i


class Settling:
    """Stands in front of ``attempt``, to interrupt what settles an interruption.

    Attributes:
        at: Where to raise; None: nowhere.
        places: The places that it went by.
    """

    def __init__(self, at: Place | None = None) -> None:
        self.at = at
        self.places: list[Place] = []

    def attempt(
        self, change: Change, act: Callable[[], Any], settle: Callable[[BaseException], None]
    ) -> Any:
        return attempt(change, act, lambda error: self._settle(partial(settle, error)))

    def _settle(self, settle: Callable[[], None]) -> None:
        if self.places:  # the second time
            settle()
        elif self.at is None:
            self.places = places(settle)
        else:
            self.places = [self.at]
            if (error := interrupted(settle, self.at)) is not None:
                raise error


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SETTLED)
def test_interrupted_twice(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where an interruption is being settled, and that is interrupted, too."""
    call = partial(CALLS[name], bench)
    bench.fresh()
    before = bench.content()
    found = [place for place in places(call) if "attempt" in dict(place.stack)]
    if not found:
        assert name in NOT_OF_VERSION_9
        assert bench.ctx.library.session_version == 9
        return
    after = bench.content()
    # In the middle of it, where the sequence is neither as before nor as after.
    first = found[len(found) // 2]

    def end(settling: Settling) -> str:
        bench.fresh()
        with monkeypatch.context() as patch:
            for module in (device, restore, sequences):
                patch.setattr(module, "attempt", settling.attempt)
            return said_of(interrupted(call, first))

    settling = Settling()
    end(settling)
    for place in settling.places[sum(map(ord, name)) % STRIDE :: STRIDE]:
        said = end(Settling(place))
        _is_sound(bench, name, place, before, after, said)


def _is_sound(
    bench: Bench, name: str, place: Place, before: Content, after: Content, said: str
) -> None:
    assert is_free(bench.ctx), place
    assert not [path for path in bench.folder.rglob("*") if ".part" in path.name], place
    assert bench.empty.verify().ok, place
    held = bench.content()
    if held not in (before, after):
        for seq_id, content in enumerate(held):
            if content not in (before[seq_id], after[seq_id]):
                assert content == _emptied(bench, seq_id), place
                assert "emptied" in said, (place, said)
                assert name in MAY_EMPTY, (place, said)


def _left(place: Place) -> bool:
    """Whether a savepoint ends before its ``__exit__`` has begun: nothing can be undone there."""
    function, line = place.stack[-1]
    return function == "Savepoint.__exit__" and line == _FIRST_OF_EXIT


def _emptied(bench: Bench, seq_id: int) -> bytes:
    """What a snapshot of a sequence is that holds nothing; the sequence must hold nothing."""
    assert bench.ctx.n_past(seq_id) == 0
    return bench.ctx.seq_snapshot(seq_id)


def test_the_harness_raises(bench: Bench) -> None:
    """An exception comes out, and it comes from the place that was asked for."""
    found = places(bench.ctx.snapshot)
    assert len(found) > 20
    assert isinstance(interrupted(bench.ctx.snapshot, found[len(found) // 2]), Interruption)
