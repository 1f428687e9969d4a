"""What was saved comes back: every function, every kind of memory, all the options of a context.

Two facts of llama.cpp shape what "comes back" means here. Attention sums over cells in their order,
and a restore packs them together: where cells lie elsewhere than they did, the next logits are the
same but for rounding (1.2e-6 at most was seen), where they do not they are the same bits. And the
state of one sequence leaves out what a sliding window no longer sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume
from hypothesis import strategies as st

import llama_state as ls
from llama_state.testing import strategies
from llama_state.testing.conformance import nmse, nmse_limit
from llama_state.testing.strategies import Clear, Contents, Decode, SeqCp, SeqRm, Step, replay
from tests.kinds import ALL_WINDOWS, ENDS_ONLY, K_ONLY, OWN_STREAMS, WINDOWS, given

pytestmark = pytest.mark.libllama

# More than the window of 32; three sequences of this length fit the smallest context.
MAX_LENGTH = 80
NEXT_TOKEN = 1
SPARE = b"\xaa" * 5

Options = dict[str, Any]
Way = Callable[[ls.Context, ls.Context, tuple[int, ...], Path], ls.Restored]
SequenceWay = Callable[[ls.Context, int, ls.Context, int, tuple[int, ...], Path], ls.Restored]


# -- contexts and what they hold


def is_refused(model: ls.Model, options: Mapping[str, Any]) -> bool:
    """Whether there is no such context: a cache that keeps no V has one type."""
    return model.arch in K_ONLY and options["type_k"] != options["type_v"]


def is_one_stream(model: ls.Model, options: Mapping[str, Any]) -> bool:
    shared = options["kv_unified"] and model.arch not in OWN_STREAMS
    return shared or options["n_seq_max"] == 1


def make(model: ls.Model, options: Mapping[str, Any]) -> ls.Context:
    return model.context(n_threads=1, **options)


@contextmanager
def opened(model: ls.Model, *options: Mapping[str, Any]) -> Iterator[list[ls.Context]]:
    """A context for each of *options*; options that are refused are no example."""
    with ExitStack() as stack:
        try:
            made = [stack.enter_context(make(model, one)) for one in options]
        except ls.UnsupportedError:
            assert any(is_refused(model, one) for one in options)
            assume(False)
        yield made


def live(ctx: ls.Context, history: Iterable[Step]) -> Contents:
    """Take the steps, and return what *ctx* holds then.

    A cut is refused where a window has lost cells.
    """
    taken: list[Step] = []
    for step in history:
        try:
            match step:
                case Decode(seq_id, tokens):
                    ctx.decode(tokens, seq_id)
                case SeqRm(seq_id, start, end):
                    ctx.seq_rm(seq_id, start, end)
                case SeqCp(src, dst):
                    ctx.seq_cp(src, dst)
                case Clear():
                    ctx.clear()
        except ls.UnsupportedError:
            assert isinstance(step, SeqRm)
            assert ctx.arch in WINDOWS
        else:
            taken.append(step)
    return replay(taken)


def lengths(ctx: ls.Context) -> dict[int, int]:
    past = {seq_id: ctx.n_past(seq_id) for seq_id in range(ctx.n_seq_max)}
    return {seq_id: n for seq_id, n in past.items() if n}


def expected_lengths(cells: Contents) -> dict[int, int]:
    return {seq_id: max(held) + 1 for seq_id, held in cells.items()}


def next_logits(ctx: ls.Context, seq_id: int) -> memoryview:
    ctx.decode([NEXT_TOKEN], seq_id)
    return ctx.logits()


def assert_reported(ctx: ls.Context, restored: ls.Restored, cells: Contents) -> None:
    """``Restored`` tells of *cells*, and nothing else."""
    assert set(restored.sequences) == set(cells)
    for seq_id, span in restored.sequences.items():
        first, last = min(cells[seq_id]), max(cells[seq_id])
        assert span.pos_max == last
        assert span.n_past == last + 1
        if ctx.arch in ENDS_ONLY:
            assert (span.pos_min, span.rewind_min) == (last, last + 1)
        elif ctx.arch in WINDOWS:
            assert first <= span.pos_min <= last
            assert span.pos_min <= span.rewind_min <= last + 1 or span.rewind_min == 0
        else:
            assert (span.pos_min, span.rewind_min) == (first, first)


# -- what is drawn


def drawn_options(data: st.DataObject) -> Options:
    return data.draw(strategies.context_options(max_seqs=3), label="options")


def drawn_history(
    data: st.DataObject, model: ls.Model, n_seqs: int, *, cuts: bool = True
) -> list[Step]:
    history = strategies.histories(
        n_vocab=model.n_vocab,
        n_seqs=n_seqs,
        max_steps=5,
        max_run=MAX_LENGTH // 2,
        max_length=MAX_LENGTH,
        cuts=cuts and model.arch not in ENDS_ONLY,
    )
    return data.draw(history, label="history")


def drawn_filling(data: st.DataObject, n_seqs: int) -> list[Step]:
    """What a target held before: other tokens, few of them, or more than fit a window."""
    sizes = st.lists(st.sampled_from([0, 1, 9, 50]), min_size=n_seqs, max_size=n_seqs)
    runs = (range(100, 100 - size, -1) for size in data.draw(sizes, label="held before"))
    return [Decode(seq_id, tuple(run)) for seq_id, run in enumerate(runs) if run]


def token_lists() -> st.SearchStrategy[tuple[int, ...]]:
    """No tokens, a few or thousands: whatever fits 32 bits, as llama.cpp does not look at them."""
    few = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5).map(tuple)
    many = st.integers(2000, 5000).map(lambda count: tuple(range(-count, count)))
    return st.one_of(st.just(()), few, many)


# -- the ways to save and to restore


def by_snapshot(
    source: ls.Context, target: ls.Context, tokens: tuple[int, ...], path: Path
) -> ls.Restored:
    blob = source.snapshot()
    buffer = too_large(source.state_size())
    assert source.snapshot(out=buffer) == blob
    assert buffer == blob + SPARE
    restored = target.restore(blob)
    assert (restored.nbytes, restored.tokens) == (len(blob), ())
    return restored


def by_file(
    source: ls.Context, target: ls.Context, tokens: tuple[int, ...], path: Path
) -> ls.Restored:
    written = source.save_state(path, tokens, durable=False)
    assert written == path.stat().st_size == 12 + 4 * len(tokens) + source.state_size()
    restored = target.load_state(path)
    assert (restored.nbytes, restored.tokens) == (written, tokens)
    return restored


def seq_by_snapshot(
    source: ls.Context, src: int, target: ls.Context, dest: int, tokens: tuple[int, ...], path: Path
) -> ls.Restored:
    blob = source.seq_snapshot(src)
    buffer = too_large(source.seq_state_size(src))
    view = source.seq_snapshot(src, out=buffer)
    assert view == blob
    assert buffer == blob + SPARE
    restored = target.seq_restore(view, dest)
    assert (restored.nbytes, restored.tokens) == (len(blob), ())
    return restored


def seq_by_file(
    source: ls.Context, src: int, target: ls.Context, dest: int, tokens: tuple[int, ...], path: Path
) -> ls.Restored:
    written = source.seq_save_state(path, src, tokens, durable=False)
    assert written == path.stat().st_size
    restored = target.seq_load_state(path, dest)
    assert (restored.nbytes, restored.tokens) == (written, tokens)
    return restored


WAYS = {"snapshot": by_snapshot, "file": by_file}
SEQUENCE_WAYS = {"snapshot": seq_by_snapshot, "file": seq_by_file}


def too_large(size: int) -> bytearray:
    return bytearray(size) + SPARE


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same path for every save: each replaces the one before."""
    return tmp_path_factory.mktemp("round_trips") / "state"


# -- claims


def test_only_what_is_known_is_refused(model: ls.Model) -> None:
    """Of all options that are drawn here, only those that ``is_refused`` names are refused."""
    names = ("n_seq_max", "kv_unified", "flash_attn", "type_k", "type_v")
    types = ["f16", "q8_0"]
    for values in itertools.product([1, 3], [False, True], [None, False, True], types, types):
        options = {"n_ctx": 256, **dict(zip(names, values, strict=True))}
        if options["type_v"] == "q8_0" and not options["flash_attn"]:
            continue  # never drawn: flash attention must be on to quantize values
        if is_refused(model, options):
            with pytest.raises(ls.UnsupportedError):
                make(model, options)
        else:
            make(model, options).close()


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@given(data=st.data())
def test_a_whole_state_comes_back(
    model: ls.Model, way: Way, file: Path, data: st.DataObject
) -> None:
    """All sequences come back, whatever was there before: bytes, positions and next logits."""
    options = drawn_options(data)
    with opened(model, options, options) as (source, target):
        cells = live(source, drawn_history(data, model, source.n_seq_max))
        live(target, drawn_filling(data, target.n_seq_max))
        tokens = data.draw(token_lists(), label="tokens")

        restored = way(source, target, tokens, file)

        assert_reported(target, restored, cells)
        assert lengths(target) == lengths(source) == expected_lengths(cells)
        assert target.snapshot() == source.snapshot()
        # Empty sequences too: nothing of before may be left to attend to.
        for seq_id in range(source.n_seq_max):
            assert nmse(next_logits(source, seq_id), next_logits(target, seq_id)) < nmse_limit(
                model.arch
            )


@pytest.mark.parametrize("way", SEQUENCE_WAYS.values(), ids=list(SEQUENCE_WAYS))
@given(data=st.data())
def test_a_sequence_comes_back(
    model: ls.Model, way: SequenceWay, file: Path, data: st.DataObject
) -> None:
    """A sequence comes back, under its id or another, and leaves the other sequences alone.

    Saved again under the old id it has the same bytes.
    """
    options = drawn_options(data)
    with opened(model, *[options] * 4) as (source, target, twin, third):
        ids = st.integers(0, source.n_seq_max - 1)
        src, dest = data.draw(ids, label="src"), data.draw(ids, label="dest")
        held = live(source, drawn_history(data, model, source.n_seq_max)).get(src, {})
        before = drawn_filling(data, target.n_seq_max)
        others = {seq_id: had for seq_id, had in live(target, before).items() if seq_id != dest}
        live(twin, before)
        tokens = data.draw(token_lists(), label="tokens")

        restored = way(source, src, target, dest, tokens, file)

        assert_reported(target, restored, {dest: held} if held else {})
        arrived = {dest: max(held) + 1} if held else {}
        assert lengths(target) == {**expected_lengths(others), **arrived}
        saved, again = source.seq_snapshot(src), target.seq_snapshot(dest)
        assert len(saved) == len(again)
        if is_one_stream(model, options):  # else it also stands at another place
            differing = {(a, b) for a, b in zip(saved, again, strict=True) if a != b}
            assert differing <= {(src, dest)}
        third.seq_restore(again, src)
        assert third.seq_snapshot(src) == saved

        assert nmse(next_logits(source, src), next_logits(target, dest)) < nmse_limit(model.arch)
        for seq_id in range(target.n_seq_max):
            if seq_id != dest:
                error = nmse(next_logits(twin, seq_id), next_logits(target, seq_id))
                assert error < nmse_limit(model.arch)


@given(data=st.data())
def test_a_sequence_with_its_own_cells_continues_bit_for_bit(
    model: ls.Model, data: st.DataObject
) -> None:
    """In split memory, without holes, the next logits after a restore are the same bits.

    Where a window has left cells behind, and flash attention is off, they are only close: sums
    over cells then depend on where the first one is.
    """
    options = {**drawn_options(data), "kv_unified": False}
    with opened(model, options, options) as (source, target):
        cells = live(source, drawn_history(data, model, source.n_seq_max, cuts=False))
        live(target, drawn_filling(data, target.n_seq_max))
        for seq_id in range(source.n_seq_max):
            target.seq_restore(source.seq_snapshot(seq_id), seq_id)
        for seq_id in range(source.n_seq_max):
            error = nmse(next_logits(source, seq_id), next_logits(target, seq_id))
            if options["flash_attn"] is False and len(cells.get(seq_id, ())) > ALL_WINDOWS.get(
                model.arch, MAX_LENGTH
            ):
                assert error < nmse_limit(model.arch)
            else:
                assert error == 0


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
@pytest.mark.parametrize("way", SEQUENCE_WAYS.values(), ids=list(SEQUENCE_WAYS))
def test_an_empty_sequence_empties_its_destination(
    model: ls.Model, way: SequenceWay, unified: bool, file: Path
) -> None:
    """The state of an empty sequence empties the destination, and no other sequence."""
    options = {"n_ctx": 256, "n_seq_max": 3, "kv_unified": unified}
    with opened(model, options, options, options) as (source, target, fresh):
        source.decode(range(5), 1)
        for seq_id in range(3):
            target.decode(range(10, 50 + seq_id), seq_id)
        fresh.decode(range(10, 50), 0)

        restored = way(source, 2, target, 1, (), file)

        assert restored.sequences == {}
        assert lengths(target) == {0: 40, 2: 42}
        for seq_id in (0, 1):  # what goes on in the emptied one begins anew
            assert nmse(next_logits(fresh, seq_id), next_logits(target, seq_id)) < nmse_limit(
                model.arch
            )


@given(data=st.data())
def test_one_sequence_moves_into_unified_memory(model: ls.Model, data: st.DataObject) -> None:
    """A whole state of a context of one sequence becomes the first of several that share cells."""
    options = {**drawn_options(data), "n_seq_max": 1}
    several = {**options, "n_seq_max": data.draw(st.integers(2, 5)), "kv_unified": True}
    with opened(model, options, several) as (source, target):
        cells = live(source, drawn_history(data, model, 1))
        live(target, drawn_filling(data, min(target.n_seq_max, 3)))
        restored = target.restore(source.snapshot())
        assert_reported(target, restored, cells)
        assert lengths(target) == expected_lengths(cells)
        if model.arch not in OWN_STREAMS:
            assert target.snapshot() == source.snapshot()
        assert nmse(next_logits(source, 0), next_logits(target, 0)) < nmse_limit(model.arch)


@given(data=st.data(), sizes=st.permutations([256, 512, 1024]))
def test_a_state_moves_to_a_context_of_another_size(
    model: ls.Model, data: st.DataObject, sizes: Sequence[int]
) -> None:
    """A context with fewer cells, or more, takes any state whose cells it has."""
    options = drawn_options(data)
    first, second = ({**options, "n_ctx": size} for size in sizes[:2])
    with opened(model, first, second) as (source, target):
        cells = live(source, drawn_history(data, model, source.n_seq_max))
        seq_id = data.draw(st.integers(0, source.n_seq_max - 1), label="seq_id")
        restored = target.seq_restore(source.seq_snapshot(seq_id), seq_id)
        assert_reported(target, restored, {i: held for i, held in cells.items() if i == seq_id})
        assert target.seq_snapshot(seq_id) == source.seq_snapshot(seq_id)
        assert_reported(target, target.restore(source.snapshot()), cells)
        assert target.snapshot() == source.snapshot()
        for seq_id in range(source.n_seq_max):
            assert nmse(next_logits(source, seq_id), next_logits(target, seq_id)) < nmse_limit(
                model.arch
            )


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
@given(data=st.data(), length=st.integers(1, MAX_LENGTH))
def test_rewind_min_is_the_truth(
    model: ls.Model, unified: bool, data: st.DataObject, length: int
) -> None:
    """A restored sequence can be cut back to ``rewind_min`` and decoded on as if nothing had been.

    Before that it cannot: the attempt is refused and changes nothing. It can always be emptied.
    """
    text = range(1, 1 + length)
    cut = data.draw(st.integers(0, length), label="cut")
    options = {"n_ctx": 256, "n_seq_max": 2, "kv_unified": unified}
    with opened(model, options, options) as (source, fresh):
        source.decode(text, 1)
        span = source.seq_restore(source.seq_snapshot(1), 0).sequences[0]
        before = source.snapshot()
        if 0 < cut < span.rewind_min and cut < length:
            with pytest.raises(ls.UnsupportedError, match="cannot lose positions"):
                source.seq_rm(0, cut)
            assert source.snapshot() == before
        else:
            source.seq_rm(0, cut)
            fresh.decode(text[:cut], 0)
            assert source.n_past(0) == cut
            assert nmse(next_logits(fresh, 0), next_logits(source, 0)) < nmse_limit(model.arch)
