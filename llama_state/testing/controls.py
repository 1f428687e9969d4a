"""What llama.cpp itself makes of the same states, with none of this library's restores.

The logits after a restore are seldom those of a run without interruption to the last bit: the cells
lie elsewhere, sums over them run in another order, and a real model amplifies that. So a restore is
compared with two controls of the same context: llama.cpp's own restore of the same state, whose
cells lie in the same places, and runs without any restore whose cells lie in others, or whose
tokens were decoded in other pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from .._llama import calls
from ..context.context import Context
from ..errors import StateError
from .runs import NEXT_TOKEN, SPARE, Answers, Run, answer, fill
from .trips import Trip

# Tokens of another sequence that come first and move the cells of all others.
_SHIFTS = (1, 37)
# Tokens of each sequence in its first piece, where it is decoded in two.
_PIECE = 7


@dataclass
class Controls:
    """The controls of one configuration, each made once, when it is first asked for.

    Attributes:
        make: Makes a context of the configuration.
        expected: What the source of each trip holds.
    """

    make: partial[Context]
    expected: Run
    _moved: list[Answers] | None = None
    _restored: dict[object, Answers | None] = field(default_factory=dict)

    def restored(self, trip: Trip) -> Answers | None:
        """Return the answers after llama.cpp's own restore, None where it refuses the state.

        Args:
            trip: The trip to do with it: only its source is read, its target is not touched.
        """
        method = trip.method
        key = (method.whole, method.dest, method.in_place)
        if key not in self._restored:
            self._restored[key] = self._restore(trip)
        return self._restored[key]

    def moved(self) -> list[Answers]:
        """Return the answers of runs without interruption in which sums have another order.

        One more sequence comes first, which moves the cells: all share one stream, as cells can be
        moved in no other way. Of quantized caches, where that changes nothing, the same tokens are
        decoded in other pieces.
        """
        if self._moved is None:
            texts = self.expected.texts
            try:
                self._moved = [_after(self.make, texts, [NEXT_TOKEN] * n) for n in _SHIFTS]
            except StateError:  # a context that llama.cpp cannot make so
                self._moved = []
            self._moved.append(_in_pieces(self.make, texts))
        return self._moved

    def _restore(self, trip: Trip) -> Answers | None:
        with self.make() as target:
            fill(target, trip.before)
            if trip.method.in_place:
                target.decode([NEXT_TOKEN] * (SPARE // 2))
            if not _restore_into(target, trip):
                return None
            return answer(target, trip.arriving)


def _after(make: partial[Context], texts: Sequence[Sequence[int]], first: Sequence[int]) -> Answers:
    more = {"n_seq_max": len(texts) + 1, "kv_unified": True}
    with make(**more, n_ctx=make.keywords["n_ctx"] + len(first)) as context:
        context.decode(first, len(texts))
        fill(context, texts)
        return answer(context, range(len(texts)))


def _in_pieces(make: partial[Context], texts: Sequence[Sequence[int]]) -> Answers:
    with make() as context:
        for at in (slice(None, _PIECE), slice(_PIECE, None)):
            fill(context, [text[at] for text in texts])
        return answer(context, range(len(texts)))


def _restore_into(target: Context, trip: Trip) -> bool:
    """Restore the state of a trip as any C program would; False where llama.cpp refuses it."""
    arriving = trip.arriving
    if not trip.method.whole:
        return _copy(trip.source, 0, target, trip.method.dest)
    if _copy(trip.source, None, target, None) and _holds(target, arriving):
        return True
    # Session version 9 loses all but the last sequence of a split context, and says nothing.
    return all(_copy(trip.source, seq_id, target, seq_id) for seq_id in arriving)


def put(context: Context, dest: calls.Target, blob: bytes) -> bool:
    """Restore a state by llama.cpp's own function; False where it refuses it."""
    with context._handle.use() as call:
        calls.empty(call, dest)
        return calls.write(call, dest, blob) == len(blob)


def _copy(source: Context, seq_id: calls.Target, target: Context, dest: calls.Target) -> bool:
    with source._handle.use() as call:
        blob = calls.read(call, seq_id)
        empty = not calls.occupied(call, source.n_seq_max)
    if not empty:
        return put(target, dest, blob)
    with target._handle.use() as call:  # llama.cpp ignores some empty states, and reports success
        calls.empty(call, dest)
    return True


def _holds(context: Context, texts: Mapping[int, Sequence[int]]) -> bool:
    return all(context.n_past(seq_id) == len(text) for seq_id, text in texts.items())
