"""Hypothesis strategies: tokens, context options, histories of a context, damaged states."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from hypothesis import strategies as st

__all__ = [
    "Clear",
    "Contents",
    "Decode",
    "SeqCp",
    "SeqRm",
    "Step",
    "bit_flips",
    "context_options",
    "damaged",
    "extensions",
    "histories",
    "replay",
    "splices",
    "token_runs",
    "truncations",
    "word_edits",
]


class Decode(NamedTuple):
    """Append *tokens* to the sequence *seq_id*."""

    seq_id: int
    tokens: tuple[int, ...]


class SeqRm(NamedTuple):
    """Remove the positions from *start* up to *end*, or to the last, from a sequence."""

    seq_id: int
    start: int = 0
    end: int | None = None


class SeqCp(NamedTuple):
    """Copy the sequence *src* to the empty sequence *dst*."""

    src: int
    dst: int


class Clear(NamedTuple):
    """Empty the context."""


Step: TypeAlias = "Decode | SeqRm | SeqCp | Clear"
"""One step of a history."""

Contents: TypeAlias = "dict[int, dict[int, int]]"
"""What a context holds: sequence id -> position -> token."""


def replay(history: Iterable[Step]) -> Contents:
    """Return what a context must hold after *history*: sequence id -> position -> token.

    Empty sequences are left out.
    """
    cells: Contents = {}
    for step in history:
        _apply(step, cells)
    return {seq_id: held for seq_id, held in cells.items() if held}


def token_runs(
    n_vocab: int, max_size: int, *, min_size: int = 1
) -> st.SearchStrategy[tuple[int, ...]]:
    """Return runs of *min_size* to *max_size* tokens of a vocabulary of *n_vocab*."""
    tokens = st.integers(0, n_vocab - 1)
    return st.lists(tokens, min_size=min_size, max_size=max_size).map(tuple)


@st.composite
def context_options(
    draw: st.DrawFn, *, max_seqs: int = 4, n_ctx: Sequence[int] = (256, 512, 1024)
) -> dict[str, Any]:
    """Draw arguments for ``Model.context`` that llama.cpp accepts for every kind of memory.

    Quantized values need flash attention, and latent attention needs the same type for K and V.
    """
    flash_attn = draw(st.sampled_from([None, False, True]))
    cache_type = draw(st.sampled_from(["f16", "bf16", "f32", *(["q8_0"] if flash_attn else [])]))
    return {
        "n_ctx": draw(st.sampled_from(n_ctx)),
        "n_seq_max": draw(st.integers(1, max_seqs)),
        "kv_unified": draw(st.booleans()),
        "flash_attn": flash_attn,
        "type_k": cache_type,
        "type_v": cache_type,
    }


@st.composite
def histories(
    draw: st.DrawFn,
    *,
    n_vocab: int,
    n_seqs: int = 3,
    max_steps: int = 10,
    max_run: int = 16,
    max_length: int = 64,
    cuts: bool = True,
) -> list[Step]:
    """Draw steps that a context of *n_seqs* sequences can take one after the other.

    Args:
        draw: Given by hypothesis.
        n_vocab: Size of the model's vocabulary.
        n_seqs: Number of sequences, from id 0.
        max_steps: The most steps.
        max_run: The most tokens of one decode.
        max_length: The most tokens of a sequence; a context needs *n_seqs* times as many cells.
        cuts: Also remove parts of a sequence, which recurrent memory cannot do.
    """
    history: list[Step] = []
    cells: Contents = {}
    for _ in range(draw(st.integers(0, max_steps))):
        step = draw(_steps(cells, n_vocab, n_seqs, max_run, max_length, cuts))
        _apply(step, cells)
        history.append(step)
    return history


def damaged(blob: bytes) -> st.SearchStrategy[bytes]:
    """Return *blob*, which must not be empty, with one kind of damage; never *blob* itself."""
    kinds = [bit_flips(blob), truncations(blob), extensions(blob), splices(blob)]
    if len(blob) >= _WORD.size:
        kinds.append(word_edits(blob))
    return st.one_of(kinds).filter(lambda result: result != blob)


def bit_flips(blob: bytes, *, max_flips: int = 8) -> st.SearchStrategy[bytes]:
    """Return *blob* with one or more bits flipped."""
    flips = st.tuples(_offsets(len(blob)), st.integers(0, 7))

    def flip(places: list[tuple[int, int]]) -> bytes:
        out = bytearray(blob)
        for offset, bit in places:
            out[offset] ^= 1 << bit
        return bytes(out)

    return st.lists(flips, min_size=1, max_size=max_flips, unique=True).map(flip)


def truncations(blob: bytes) -> st.SearchStrategy[bytes]:
    """Return *blob* without its end."""
    return _offsets(len(blob)).map(lambda end: blob[:end])


def extensions(blob: bytes, *, max_size: int = 64) -> st.SearchStrategy[bytes]:
    """Return *blob* with more bytes after its end."""
    return st.binary(min_size=1, max_size=max_size).map(lambda tail: blob + tail)


def splices(blob: bytes) -> st.SearchStrategy[bytes]:
    """Return *blob* with a piece copied over another, inserted elsewhere, or left out."""
    ends = st.integers(0, len(blob))

    def splice(source: tuple[int, int], target: tuple[int, int]) -> bytes:
        (a, b), (c, d) = sorted(source), sorted(target)
        return blob[:c] + blob[a:b] + blob[d:]

    return st.builds(splice, st.tuples(ends, ends), st.tuples(ends, ends))


def word_edits(blob: bytes) -> st.SearchStrategy[bytes]:
    """Return *blob* with a 32-bit word at any byte set to a number that is likely to do harm."""

    def edit(offset: int, change: int, absolute: bool) -> bytes:
        (word,) = _WORD.unpack_from(blob, offset)
        edited = _WORD.pack((change if absolute else word + change) % 2**32)
        return blob[:offset] + edited + blob[offset + _WORD.size :]

    changes = st.sampled_from(_NUMBERS) | st.integers(0, 2**32 - 1)
    return st.builds(edit, _offsets(len(blob) - _WORD.size + 1), changes, st.booleans())


_WORD = struct.Struct("<I")
_NUMBERS = (0, 1, 2, 255, 256, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_HEAD = 64


def _offsets(count: int) -> st.SearchStrategy[int]:
    """Return offsets below *count*: half of them in the head, which is all structure."""
    return st.integers(0, min(count, _HEAD) - 1) | st.integers(0, count - 1)


def _length(cells: Contents, seq_id: int) -> int:
    return max(cells.get(seq_id, {}), default=-1) + 1


def _apply(step: Step, cells: Contents) -> None:
    match step:
        case Decode(seq_id, tokens):
            start = _length(cells, seq_id)
            cells.setdefault(seq_id, {}).update(enumerate(tokens, start))
        case SeqRm(seq_id, start, end):
            stop = _length(cells, seq_id) if end is None else end
            kept = {p: t for p, t in cells.get(seq_id, {}).items() if not start <= p < stop}
            cells[seq_id] = kept
        case SeqCp(src, dst):
            cells[dst] = dict(cells.get(src, {}))
        case Clear():
            cells.clear()


def _steps(
    cells: Contents, n_vocab: int, n_seqs: int, max_run: int, max_length: int, cuts: bool
) -> st.SearchStrategy[Step]:
    """Return the steps that are possible for a context that holds *cells*."""
    every = range(n_seqs)
    held = [seq_id for seq_id in every if cells.get(seq_id)]
    empty = [seq_id for seq_id in every if not cells.get(seq_id)]
    room = {s: min(max_run, max_length - _length(cells, s)) for s in every}
    steps: list[st.SearchStrategy[Step]] = [
        st.builds(Decode, st.just(seq_id), token_runs(n_vocab, space))
        for seq_id, space in room.items()
        if space > 0
    ]
    steps += [_removals(seq_id, _length(cells, seq_id), cuts) for seq_id in held]
    if held and empty:
        steps.append(st.builds(SeqCp, st.sampled_from(held), st.sampled_from(empty)))
    return st.one_of([*steps, st.just(Clear())])


def _removals(seq_id: int, length: int, cuts: bool) -> st.SearchStrategy[SeqRm]:
    """Return removals of a whole sequence and, with *cuts*, of its tail or a piece of it."""
    whole = st.just(SeqRm(seq_id))
    if not cuts:
        return whole
    position = st.integers(0, length)
    tails = position.map(lambda start: SeqRm(seq_id, start))
    pieces = st.tuples(position, position).map(lambda ends: SeqRm(seq_id, min(ends), max(ends)))
    return whole | tails | pieces
