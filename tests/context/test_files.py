"""Our files are llama.cpp's own: its functions load ours, we load theirs, nobody can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.testing.conformance import NMSE_LIMIT, nmse
from tests.context.c_files import Native, Tokens

pytestmark = pytest.mark.libllama

# The first is longer than the sliding windows; the second is empty.
LENGTHS = {0: 40, 1: 0, 2: 7}
NEXT_TOKEN = 1

Make = Callable[[], ls.Context]


@pytest.fixture(scope="session")
def native(library: ls.Library) -> Native:
    return Native(library)


@pytest.fixture(params=[True, False], ids=["unified", "split"])
def unified(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=[0, 3000], ids=["no tokens", "3000 tokens"])
def tokens(request: pytest.FixtureRequest) -> Tokens:
    return tuple(range(request.param - 2, -2, -1))  # only a packed list starts with -1


@pytest.fixture
def make(model: ls.Model, unified: bool) -> Iterator[Make]:
    """Makes contexts of three sequences, and closes them after the test."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(
            model.context(n_ctx=256, n_seq_max=3, kv_unified=unified, n_threads=1)
        )


@pytest.fixture
def source(make: Make) -> ls.Context:
    ctx = make()
    for seq_id, length in LENGTHS.items():
        ctx.decode([(7 * i + seq_id) % ctx.n_vocab for i in range(length)], seq_id)
    return ctx


@pytest.fixture
def target(make: Make) -> ls.Context:
    """What holds something else, to be replaced."""
    ctx = make()
    for seq_id in LENGTHS:
        ctx.decode(range(20 + seq_id), seq_id)
    return ctx


def lengths(ctx: ls.Context) -> dict[int, int]:
    return {seq_id: ctx.n_past(seq_id) for seq_id in range(ctx.n_seq_max)}


def assert_same_future(a: ls.Context, src: int, b: ls.Context, dest: int) -> None:
    logits = []
    for ctx, seq_id in ((a, src), (b, dest)):
        ctx.decode([NEXT_TOKEN], seq_id)
        logits.append(ctx.logits())
    assert nmse(*logits) < NMSE_LIMIT


# -- the whole context


def test_both_write_the_same_session_file(
    native: Native, source: ls.Context, tokens: Tokens, tmp_path: Path
) -> None:
    """``save_state`` writes the bytes that ``llama_state_save_file`` writes."""
    native.save(source, tmp_path / "theirs", tokens)
    nbytes = source.save_state(tmp_path / "ours", tokens)
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert nbytes == len(ours)


def test_load_state_loads_their_file(
    native: Native, source: ls.Context, target: ls.Context, tokens: Tokens, tmp_path: Path
) -> None:
    """What ``llama_state_save_file`` wrote comes back: sequences, tokens and next logits."""
    native.save(source, tmp_path / "theirs", tokens)
    restored = target.load_state(tmp_path / "theirs")
    assert restored.tokens == tokens
    assert restored.nbytes == (tmp_path / "theirs").stat().st_size
    assert {seq_id: span.n_past for seq_id, span in restored.sequences.items()} == {0: 40, 2: 7}
    assert lengths(target) == LENGTHS
    assert target.snapshot() == source.snapshot()
    for seq_id in LENGTHS:
        assert_same_future(source, seq_id, target, seq_id)


def test_llama_state_load_file_loads_ours(
    native: Native, source: ls.Context, target: ls.Context, tokens: Tokens, tmp_path: Path
) -> None:
    """What ``save_state`` wrote comes back through ``llama_state_load_file``.

    Before session version 10 llama.cpp keeps only the last filled sequence of split memory.
    """
    source.save_state(tmp_path / "ours", tokens)
    assert native.load(target, tmp_path / "ours") == tokens
    if loses_streams(source):
        assert lengths(target) != LENGTHS
        assert lengths(target)[2] == LENGTHS[2]
        assert_same_future(source, 2, target, 2)
        return
    assert lengths(target) == LENGTHS
    assert target.snapshot() == source.snapshot()
    for seq_id in LENGTHS:
        assert_same_future(source, seq_id, target, seq_id)


def loses_streams(ctx: ls.Context) -> bool:
    split = ctx.n_ctx > 256  # 256 cells for each sequence, not for all of them
    return ctx.library.session_version == 9 and split and ctx.arch != "mamba2"


# -- one sequence


@pytest.mark.parametrize("seq_id", LENGTHS)
def test_both_write_the_same_sequence_file(
    native: Native, source: ls.Context, seq_id: int, tokens: Tokens, tmp_path: Path
) -> None:
    """``seq_save_state`` writes the bytes that ``llama_state_seq_save_file`` writes."""
    theirs = native.seq_save(source, tmp_path / "theirs", seq_id, tokens)
    nbytes = source.seq_save_state(tmp_path / "ours", seq_id, tokens)
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert nbytes == theirs == len(ours)


@pytest.mark.parametrize("seq_id", LENGTHS)
def test_seq_load_state_loads_their_file(
    native: Native,
    source: ls.Context,
    target: ls.Context,
    seq_id: int,
    tokens: Tokens,
    tmp_path: Path,
) -> None:
    """What ``llama_state_seq_save_file`` wrote is restored, with a token list and without."""
    dest = 1
    native.seq_save(source, tmp_path / "theirs", seq_id, tokens)
    restored = target.seq_load_state(tmp_path / "theirs", dest)
    assert restored.tokens == tokens
    assert restored.nbytes == (tmp_path / "theirs").stat().st_size
    filled = {dest: LENGTHS[seq_id]} if LENGTHS[seq_id] else {}
    assert {i: span.n_past for i, span in restored.sequences.items()} == filled
    assert lengths(target) == {0: 20, 1: LENGTHS[seq_id], 2: 22}
    assert_same_future(source, seq_id, target, dest)


@pytest.mark.parametrize("seq_id", [seq_id for seq_id, length in LENGTHS.items() if length])
def test_llama_state_seq_load_file_loads_ours(
    native: Native,
    source: ls.Context,
    target: ls.Context,
    seq_id: int,
    tokens: Tokens,
    tmp_path: Path,
) -> None:
    """What ``seq_save_state`` wrote comes back through ``llama_state_seq_load_file``."""
    dest = 1
    nbytes = source.seq_save_state(tmp_path / "ours", seq_id, tokens)
    assert native.seq_load(target, tmp_path / "ours", dest) == (nbytes, tokens)
    assert lengths(target) == {0: 20, 1: LENGTHS[seq_id], 2: 22}
    assert_same_future(source, seq_id, target, dest)


def test_llama_state_seq_load_file_takes_our_empty_sequence(
    native: Native, source: ls.Context, make: Make, tokens: Tokens, tmp_path: Path
) -> None:
    """The file of an empty sequence loads into an empty one.

    Into a filled one llama.cpp loads nothing and says that it did; ``seq_load_state`` empties it.
    """
    fresh = make()
    nbytes = source.seq_save_state(tmp_path / "ours", 1, tokens)
    assert native.seq_load(fresh, tmp_path / "ours", 0) == (nbytes, tokens)
    assert lengths(fresh) == {0: 0, 1: 0, 2: 0}


def test_files_with_and_without_tokens_restore_the_same(
    source: ls.Context, make: Make, tmp_path: Path
) -> None:
    """A token list changes nothing in what a file restores; without one, it restores too."""
    source.seq_save_state(tmp_path / "with", 0, range(40))
    source.seq_save_state(tmp_path / "without", 0)
    for name, kept in (("with", tuple(range(40))), ("without", ())):
        ctx = make()
        restored = ctx.seq_load_state(tmp_path / name)
        assert restored.tokens == kept
        assert restored.sequences[0].n_past == ctx.n_past(0) == 40
        assert ctx.seq_snapshot(0) == source.seq_snapshot(0)
