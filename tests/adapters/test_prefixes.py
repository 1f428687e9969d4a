"""The order of token sequences finds what a scan of all of them would find."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from llama_state.adapters.llama_cpp.prefixes import Prefixes, common, pack, unpack

# Few ids, so that sequences share beginnings; some whose bytes are not in the order of the ids.
TOKENS = st.lists(st.sampled_from([0, 1, 2, 255, 256, 2**31 - 1]), max_size=6)


def share(one: list[int], other: list[int]) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


@given(TOKENS)
def test_packing_comes_back(tokens: list[int]) -> None:
    assert unpack(pack(tokens)) == tuple(tokens)


@given(TOKENS, TOKENS)
def test_common_beginnings(one: list[int], other: list[int]) -> None:
    assert common(pack(one), pack(other)) == share(one, other)


@given(st.lists(TOKENS, unique_by=tuple, max_size=12), TOKENS, st.data())
def test_what_shares_most_is_found(
    kept: list[list[int]], prompt: list[int], data: st.DataObject
) -> None:
    """The longest share of all, and every sequence that is a beginning of the prompt."""
    prefixes = Prefixes()
    for tokens in kept:
        prefixes.add(pack(tokens))
    if kept:
        gone = data.draw(st.sampled_from(kept))
        prefixes.remove(pack(gone))
        kept = [tokens for tokens in kept if tokens != gone]
    found = [(list(unpack(words)), n) for words, n in prefixes.like(pack(prompt))]
    assert all(tokens in kept and n == share(tokens, prompt) for tokens, n in found)
    assert max((n for _, n in found), default=0) == max((share(t, prompt) for t in kept), default=0)
    beginnings = [tokens for tokens in kept if tokens and tokens == prompt[: len(tokens)]]
    assert all(any(tokens == other for other, _ in found) for tokens in beginnings)


def test_finding_does_not_look_at_all_of_them() -> None:
    """Among a hundred times as many it takes about as long."""

    def seconds(n: int) -> float:
        prefixes = Prefixes()
        for i in range(n):
            prefixes.add(pack([7] * 200 + [i]))
        prompt = pack([7] * 200 + [n // 2] * 50)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            assert next(iter(prefixes.like(prompt)))[1] == 201
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(10_000) < 20 * seconds(100)
