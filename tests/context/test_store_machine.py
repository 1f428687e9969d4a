"""Whatever happens to a prefix store, a prompt that it filled in goes on as one decoded anew.

One context lives with a store in a folder. Between prompts the folder is used by another store,
evicted from, damaged and emptied. A second context, which decodes every prompt from nothing, tells
what the sequence must hold and what the logits must be.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

import llama_state as ls
from llama_state.store import PrefixStore
from llama_state.testing.conformance import nmse
from tests.context.oracle import DEPENDS_ON_CELLS, LIMIT, ROW_LIMIT, differences
from tests.kinds import ALL_WINDOWS, examples

pytestmark = pytest.mark.libllama

CHUNK = 16
N_SEQS = 3

# Prompts that share beginnings: what is common to some, then a branch, then an end.
PROMPTS = st.builds(
    lambda common, branch, n, end: [*range(2, 2 + common), *[100 + branch] * n, *end],
    st.sampled_from([0, 5, 16, 33, 48, 60]),
    st.integers(0, 1),
    st.integers(0, 20),
    st.lists(st.integers(2, 5), min_size=1, max_size=4),
)
SEQUENCES = st.integers(0, N_SEQS - 1)


class Machine(RuleBasedStateMachine):
    """One context, one folder, and what can happen to both."""

    model: ClassVar[ls.Model]

    @initialize(
        kv_unified=st.booleans(),
        swa_full=st.booleans(),
        flash_attn=st.booleans(),
        capacity=st.sampled_from([3 << 20, 1 << 30]),
    )
    def begin(self, *, kv_unified: bool, swa_full: bool, flash_attn: bool, capacity: int) -> None:
        """Make the contexts and the stores."""
        self.ctx, self.fresh = (
            self.model.context(
                n_ctx=256 * N_SEQS,
                n_seq_max=N_SEQS,
                kv_unified=kv_unified,
                swa_full=swa_full,
                flash_attn=flash_attn,
                n_threads=1,
            )
            for _ in range(2)
        )
        self.folder = tempfile.TemporaryDirectory()
        self.states = tempfile.TemporaryDirectory()
        # llama.cpp itself uses again what has left the window of a sequence; and after a restore it
        # writes the last row of some caches anew when another sequence is decoded.
        rewritten = {arch for arch, _ in DEPENDS_ON_CELLS}
        moves = self.model.arch in ALL_WINDOWS
        self.moving = (kv_unified and moves) or self.model.arch in rewritten
        self.stores = [self.store(capacity) for _ in range(2)]

    def store(self, capacity: int) -> PrefixStore:
        """A store in the folder."""
        return PrefixStore(self.folder.name, capacity_bytes=capacity, chunk_tokens=CHUNK)

    def teardown(self) -> None:
        """Let go of all of it."""
        for each in (*self.stores, self.ctx, self.fresh, self.folder, self.states):
            (each.close if hasattr(each, "close") else each.cleanup)()

    @rule(prompt=PROMPTS, seq_id=SEQUENCES, which=st.integers(0, 1))
    def prefill(self, prompt: list[int], seq_id: int, which: int) -> None:
        """A prompt is filled in: its logits are right, and other sequences as they were."""
        others = [i for i in range(N_SEQS) if i != seq_id]
        before = self._bytes(others)
        recalled = self.stores[which].prefill(self.ctx, prompt, seq_id)
        assert recalled.tokens == tuple(prompt[: recalled.n_past])
        assert self.ctx.n_past(seq_id) == len(prompt)
        assert self._bytes(others) == before
        self._check(prompt, seq_id)

    @rule(prompt=PROMPTS, seq_id=SEQUENCES)
    def recall(self, prompt: list[int], seq_id: int) -> None:
        """What is recalled can be gone on from."""
        recalled = self.stores[0].recall(self.ctx, prompt, seq_id)
        assert recalled.n_past < len(prompt)
        assert self.ctx.n_past(seq_id) == recalled.n_past
        self.ctx.decode(prompt[recalled.n_past :], seq_id)
        self._check(prompt, seq_id)

    @rule(more=st.lists(st.integers(2, 5), min_size=1, max_size=20), prompt=PROMPTS)
    def answer(self, more: list[int], prompt: list[int]) -> None:
        """A prompt is answered token by token, and all of it remembered."""
        self.stores[0].prefill(self.ctx, prompt)
        for token in more:
            self.ctx.decode([token])
        self.stores[0].remember(self.ctx, [*prompt, *more])

    @rule(share=st.sampled_from([0.0, 0.5, 0.9]))
    def evict(self, share: float) -> None:
        """Some of it goes."""
        used = self.stores[0].stats().used_bytes
        self.stores[0].evict(int(used * share))
        left = max(used * share, 4096)
        assert all(place.used_bytes <= left for place in self.stores[0].stats().places)

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A file differs in a byte, is cut off, or is gone."""
        files = sorted(path for path in Path(self.folder.name).glob("??/*"))
        if not files:
            return
        path = files[data.draw(st.integers(0, len(files) - 1))]
        content = bytearray(path.read_bytes())
        way = data.draw(st.sampled_from(["differs", "cut off", "gone"]))
        if way == "gone" or not content:
            path.unlink()
            return
        at = data.draw(st.integers(0, len(content) - 1))
        if way == "differs":
            content[at] ^= 0x55
        else:
            del content[at:]
        path.unlink()
        path.write_bytes(content)

    @rule()
    def repair(self) -> None:
        """After a repair all is sound."""
        self.stores[0].verify(repair=True)
        assert self.stores[0].verify().ok

    def _bytes(self, seq_ids: list[int]) -> list[bytes | int]:
        """What sequences hold: their states; where other sequences change these, their lengths."""
        look = self.ctx.n_past if self.moving else self.ctx.seq_snapshot
        return [look(seq_id) for seq_id in seq_ids]

    def _check(self, prompt: list[int], seq_id: int) -> None:
        self.fresh.clear()
        self.fresh.decode(prompt, seq_id)
        assert nmse(self.fresh.logits(), self.ctx.logits()) < LIMIT
        states = Path(self.states.name)
        found = differences(self.fresh, self.ctx, seq_id, self.model, states, ROW_LIMIT)
        assert not found, found


def test_any_order(model: ls.Model) -> None:
    """Whatever the order, and whatever happens to the folder."""
    machine = type("Machine", (Machine,), {"model": model})
    run_state_machine_as_test(machine, settings=examples(model.arch, slowest=True))
