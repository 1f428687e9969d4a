"""Token sequences in order, to find those that begin as a prompt does. Pure Python and numpy.

A sequence is kept as its 32-bit big-endian words, so that bytes sort as the tokens do. In that
order the sequences that share most with a prompt stand next to it: nothing is scanned.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator

import numpy as np

WORD = 4


def pack(tokens: Iterable[int]) -> bytes:
    """Return the words of *tokens*."""
    return np.fromiter(tokens, ">u4").tobytes()


def unpack(words: bytes) -> tuple[int, ...]:
    """Return the tokens of what :func:`pack` gave."""
    return tuple(np.frombuffer(words, ">u4").tolist())


def common(one: bytes, other: bytes) -> int:
    """Tokens that two begin with alike."""
    n = min(len(one), len(other)) // WORD
    if one[: n * WORD] == other[: n * WORD]:
        return n
    differ = np.frombuffer(one, ">u4", n) != np.frombuffer(other, ">u4", n)
    return int(differ.argmax())


class Prefixes:
    """A set of packed token sequences."""

    def __init__(self) -> None:
        self._sorted: list[bytes] = []

    def __contains__(self, words: bytes) -> bool:
        at = bisect_right(self._sorted, words)
        return at > 0 and self._sorted[at - 1] == words

    def add(self, words: bytes) -> None:
        """Take *words* in."""
        if words not in self:
            insort(self._sorted, words)

    def remove(self, words: bytes) -> None:
        """Take *words* out."""
        if words in self:
            del self._sorted[bisect_right(self._sorted, words) - 1]

    def like(self, prompt: bytes) -> Iterator[tuple[bytes, int]]:
        """Those that share most with *prompt*, and how many tokens; the longest share first.

        First come the neighbours of the prompt, of which one shares as much as any. Then all
        those that are themselves beginnings of it, the longest first.
        """
        at = bisect_right(self._sorted, prompt)
        near = [(words, common(words, prompt)) for words in self._sorted[max(at - 1, 0) : at + 1]]
        near.sort(key=lambda found: -found[1])
        yield from near
        # Whatever sorts between a beginning of the prompt and the prompt begins with it too.
        reach = common(self._sorted[at - 1], prompt) if at else 0
        while reach > 0:
            at = bisect_right(self._sorted, prompt[: reach * WORD])
            if at == 0:
                return
            words = self._sorted[at - 1]
            share = common(words, prompt)
            if share * WORD == len(words):
                yield words, share
                reach = share - 1
            else:
                reach = share
