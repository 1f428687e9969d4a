"""Any order of decoding, cutting, copying, saving and restoring agrees with a dict of tokens.

Two contexts of one model live through the same rules. What each sequence must hold is a tuple of
pieces: of tokens that were decoded at once. What follows from it is told by the oracle.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import llama_state as ls
from tests.context.oracle import (
    NEXT_TOKEN,
    Text,
    beginning,
    check,
    length,
    piece,
    tokens_of,
)
from tests.kinds import ENDS_ONLY, OWN_STREAMS, WINDOWS, examples

pytestmark = pytest.mark.libllama

N_SEQS = 3
# Three sequences of this length fit the 256 cells that they share; more than a window.
MAX_LENGTH = 80
Texts = dict[int, Text]

which = st.integers(0, 1)
seq_ids = st.integers(0, N_SEQS - 1)
sizes = st.sampled_from([40, 3, 1])
several_ids = st.lists(seq_ids, max_size=N_SEQS, unique=True)


class Undo(Exception):
    """What a savepoint takes back."""


class Machine(RuleBasedStateMachine):
    """The rules; a subclass says for which model and which kind of context."""

    model: ClassVar[ls.Model]
    unified: ClassVar[bool]

    wholes = Bundle("wholes")
    sequences = Bundle("sequences")

    @initialize(held=st.lists(sizes, min_size=2 * N_SEQS, max_size=2 * N_SEQS))
    def start(self, held: list[int]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.n_files = 0
        self.contexts = [self.open(), self.open()]
        self.texts: list[Texts] = [dict.fromkeys(range(N_SEQS), ()) for _ in self.contexts]
        for place, size in enumerate(held):
            self.decode(*divmod(place, N_SEQS), place, size)

    def open(self) -> ls.Context:
        return self.model.context(n_ctx=256, n_seq_max=N_SEQS, kv_unified=self.unified, n_threads=1)

    def teardown(self) -> None:
        if not hasattr(self, "contexts"):
            return
        try:
            for context, texts in zip(self.contexts, self.texts, strict=True):
                for seq_id, text in texts.items():
                    self.compare(context, seq_id, text)
        finally:
            for context in self.contexts:
                context.close()
            self.folder.cleanup()

    def compare(self, context: ls.Context, seq_id: int, text: Text) -> None:
        """Compare a sequence with what a context holds to which nothing else has happened."""
        with self.open() as oracle:
            check(oracle, context, seq_id, text, self.model, Path(self.folder.name))

    def new_file(self) -> Path:
        self.n_files += 1
        return Path(self.folder.name) / f"{self.n_files}"

    # -- decoding and cutting

    def decode(self, ctx: int, seq_id: int, first: int, size: int) -> None:
        room = MAX_LENGTH - length(self.texts[ctx][seq_id])
        run = tuple((first + 7 * i) % self.model.n_vocab for i in range(min(size, room)))
        self.contexts[ctx].decode(run, seq_id)
        self.texts[ctx][seq_id] += piece(*run)

    @rule(ctx=which, seq_id=seq_ids, first=st.integers(0, 99), size=sizes)
    def go_on(self, ctx: int, seq_id: int, first: int, size: int) -> None:
        self.decode(ctx, seq_id, first, size)

    @rule(ctx=which, seq_id=seq_ids, back=st.integers(0, 50))
    def cut(self, ctx: int, seq_id: int, back: int) -> None:
        """Remove the last tokens, which is refused where llama.cpp could not go on truthfully."""
        context, text = self.contexts[ctx], self.texts[ctx][seq_id]
        start = max(length(text) - back, 0)
        if self.can_end_at(ctx, seq_id, start):
            context.seq_rm(seq_id, start)
            self.texts[ctx][seq_id] = beginning(text, start)
            return
        before = context.snapshot()
        with pytest.raises(ls.UnsupportedError, match="cannot lose positions"):
            context.seq_rm(seq_id, start)
        assert context.snapshot() == before

    @rule(ctx=which, seq_id=seq_ids, every=st.booleans(), size=st.just(0) | sizes)
    def begin_anew(self, ctx: int, seq_id: int, every: bool, size: int) -> None:
        if every:
            self.contexts[ctx].clear()
            self.texts[ctx] = dict.fromkeys(range(N_SEQS), ())
        else:
            self.contexts[ctx].seq_rm(seq_id)
            self.texts[ctx][seq_id] = ()
        self.decode(ctx, seq_id, 50, size)

    @rule(ctx=which, src=seq_ids, dest=seq_ids)
    def copy(self, ctx: int, src: int, dest: int) -> None:
        self.contexts[ctx].seq_cp(src, dest)
        self.texts[ctx][dest] = self.texts[ctx][src]

    @rule(ctx=which, src=seq_ids, dest=seq_ids, end=st.integers(1, MAX_LENGTH))
    def copy_beginning(self, ctx: int, src: int, dest: int, end: int) -> None:
        context, text = self.contexts[ctx], self.texts[ctx][src]
        whole = end >= length(text)
        possible = whole or (self.has_shared_cells() and self.can_end_at(ctx, src, end))
        if src == dest:
            context.seq_cp(src, dest, end=end)
        elif possible:
            context.seq_cp(src, dest, end=end)
            self.texts[ctx][dest] = beginning(text, end)
        else:
            before = context.snapshot()
            with pytest.raises(ls.UnsupportedError):
                context.seq_cp(src, dest, end=end)
            assert context.snapshot() == before

    def has_shared_cells(self) -> bool:
        if self.model.arch in OWN_STREAMS:
            return False
        return self.unified or self.model.arch == "mamba2"

    def can_end_at(self, ctx: int, seq_id: int, start: int) -> bool:
        """Whether the positions before *start* can be gone on from."""
        if start in (0, length(self.texts[ctx][seq_id])):
            return True
        if self.model.arch in ENDS_ONLY:
            return False
        first = pos_min(self.contexts[ctx], seq_id)
        return first == 0 or start - WINDOWS.get(self.model.arch, 0) + 1 >= first

    # -- saving and restoring

    @rule(target=wholes, ctx=which, file=st.booleans())
    def save(self, ctx: int, file: bool) -> tuple[Texts, bytes | Path]:
        context, texts = self.contexts[ctx], dict(self.texts[ctx])
        if not file:
            return texts, context.snapshot()
        path = self.new_file()
        context.save_state(path, tokens_of(texts[0]), durable=False)
        return texts, path

    @rule(ctx=which, saved=wholes)
    def restore(self, ctx: int, saved: tuple[Texts, bytes | Path]) -> None:
        context, (texts, state) = self.contexts[ctx], saved
        if isinstance(state, Path):
            restored = context.load_state(state)
            assert restored.tokens == tokens_of(texts[0])
        else:
            restored = context.restore(state)
            assert context.snapshot() == state
        self.arrived(ctx, restored, texts)

    @rule(target=sequences, ctx=which, seq_id=seq_ids, file=st.booleans())
    def seq_save(self, ctx: int, seq_id: int, file: bool) -> tuple[Text, bytes | Path]:
        context, text = self.contexts[ctx], self.texts[ctx][seq_id]
        if not file:
            return text, context.seq_snapshot(seq_id)
        path = self.new_file()
        context.seq_save_state(path, seq_id, tokens_of(text), durable=False)
        return text, path

    @rule(ctx=which, dest=seq_ids, saved=sequences)
    def seq_restore(self, ctx: int, dest: int, saved: tuple[Text, bytes | Path]) -> None:
        context, (text, state) = self.contexts[ctx], saved
        if isinstance(state, Path):
            restored = context.seq_load_state(state, dest)
            assert restored.tokens == tokens_of(text)
        else:
            restored = context.seq_restore(state, dest)
        self.arrived(ctx, restored, {dest: text})

    def arrived(self, ctx: int, restored: ls.Restored, texts: Texts) -> None:
        """Take what was restored for the truth, and compare what was said about it."""
        spans = {seq_id: span.n_past for seq_id, span in restored.sequences.items()}
        assert spans == {seq_id: length(text) for seq_id, text in texts.items() if text}
        self.texts[ctx].update(texts)

    # -- undoing

    @rule(ctx=which, kept=several_ids, touched=seq_ids, wipe=st.booleans())
    def undo(self, ctx: int, kept: list[int], touched: int, wipe: bool) -> None:
        """Whatever the block does to the sequences of a savepoint is taken back."""
        context, texts = self.contexts[ctx], self.texts[ctx]
        with pytest.raises(Undo), context.savepoint(*kept):
            if wipe:
                context.clear()
            if wipe or length(texts[touched]) < MAX_LENGTH:
                context.decode([NEXT_TOKEN], touched)
            raise Undo
        for seq_id, text in texts.items():
            if kept and seq_id not in kept:
                text = () if wipe else text
                added = seq_id == touched and length(text) < MAX_LENGTH
                texts[seq_id] = text + piece(NEXT_TOKEN) if added else text

    @invariant()
    def positions_agree(self) -> None:
        for context, texts in zip(self.contexts, self.texts, strict=True):
            found = {seq_id: context.n_past(seq_id) for seq_id in texts}
            assert found == {seq_id: length(text) for seq_id, text in texts.items()}


def pos_min(context: ls.Context, seq_id: int) -> int:
    """The smallest position of a sequence, as llama.cpp itself says it."""
    native = ctypes.CDLL(str(context.library.path))
    native.llama_get_memory.restype = ctypes.c_void_p
    memory = ctypes.c_void_p(native.llama_get_memory(ctypes.c_void_p(context.pointer)))
    return int(native.llama_memory_seq_pos_min(memory, seq_id))


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "split"])
def test_any_order_of_things_agrees_with_the_tokens(model: ls.Model, unified: bool) -> None:
    """Positions always, and in the end the next logits, are those of the tokens that remain."""
    machine = type("Sequences", (Machine,), {"model": model, "unified": unified})
    steps = settings(examples(model.arch), stateful_step_count=40)
    run_state_machine_as_test(machine, settings=steps)
