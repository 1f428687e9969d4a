"""Runs of a context: what it holds, and what it answers to one more token."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .._io.arguments import checked
from ..context.context import Context

NEXT_TOKEN = 1
# Of each sequence, after NEXT_TOKEN.
GREEDY_TOKENS = 4
# Cells of each sequence for the tokens that are decoded beyond its text.
SPARE = 8


@dataclass(frozen=True)
class Answers:
    """What a context answers, for each of some sequences.

    Attributes:
        logits: The logits after one more token.
        tokens: The greedy tokens from there on.
    """

    logits: Sequence[memoryview[float]]
    tokens: Sequence[tuple[int, ...]]

    def first(self, count: int) -> Answers:
        """Return those of the first sequences only."""
        return Answers(self.logits[:count], self.tokens[:count])


@dataclass(frozen=True)
class Run:
    """What a context holds, and what it answers without interruption.

    Attributes:
        texts: The tokens of each sequence.
        answers: Of each sequence.
    """

    texts: Sequence[Sequence[int]]
    answers: Answers


@checked
def nmse(expected: memoryview[float], got: memoryview[float]) -> float:
    """Return the squared error of *got* relative to the squares of *expected*, 0.0 if equal."""
    if expected.tobytes() == got.tobytes():
        return 0.0
    squares = math.fsum(value * value for value in expected)
    errors = math.fsum((a - b) ** 2 for a, b in zip(expected, got, strict=True))
    return errors / squares if squares else math.inf


def run(make: Callable[[], Context], texts: Sequence[Sequence[int]]) -> Run:
    """Decode *texts* in a new context without interruption."""
    with make() as context:
        fill(context, texts)
        return Run(texts, answer(context, range(len(texts))))


def fill(context: Context, texts: Sequence[Sequence[int]]) -> None:
    """Decode *texts*, into the sequences from 0 on."""
    for seq_id, text in enumerate(texts):
        context.decode(text, seq_id)


def answer(context: Context, seq_ids: Iterable[int]) -> Answers:
    """Decode one more token in each sequence, then some greedy tokens in each."""
    listed = list(seq_ids)
    logits = [_next_logits(context, seq_id, NEXT_TOKEN) for seq_id in listed]
    tokens = [_greedy(context, seq_id, one) for seq_id, one in zip(listed, logits, strict=True)]
    return Answers(logits, tokens)


def _greedy(context: Context, seq_id: int, logits: memoryview[float]) -> tuple[int, ...]:
    tokens = [_likeliest(logits)]
    while len(tokens) < GREEDY_TOKENS:
        tokens.append(_likeliest(_next_logits(context, seq_id, tokens[-1])))
    return tuple(tokens)


def _next_logits(context: Context, seq_id: int, token: int) -> memoryview[float]:
    context.decode([token], seq_id)
    return context.logits()


def _likeliest(logits: memoryview[float]) -> int:
    values = logits.tolist()
    return values.index(max(values))


def some_tokens(rng: random.Random, n_vocab: int, count: int) -> tuple[int, ...]:
    """Return *count* random tokens of a vocabulary."""
    return tuple(rng.randrange(n_vocab) for _ in range(count))
