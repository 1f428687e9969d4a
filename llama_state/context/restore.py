"""Putting a state into a context: a plan, and its execution.

llama.cpp empties the destination first and looks at the state then. So a state is compared with
the context before, what could be lost is kept meanwhile, and what came back is verified after;
see ``docs/guarantees.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial as bound
from typing import TYPE_CHECKING

from .. import layout
from .._llama import calls
from .._llama.calls import Target
from .._llama.facts import Facts
from .._llama.handles import Call, Handle
from ..errors import (
    Difference,
    FormatError,
    MismatchError,
    RestoreError,
    StateError,
    UnsupportedError,
)
from ..layout.slots import NO_PROMPT
from . import refusals
from .changes import Change, add_note, attempt
from .fit import Fit, Held
from .form import StateForm
from .rewriting import one_sequence

if TYPE_CHECKING:
    from .._io import Buffer


@dataclass(frozen=True, slots=True)
class Incoming:
    """A state on its way into a context.

    Attributes:
        blob: The state as the context's library wants it.
        parsed: What it holds; None where it was not validated.
        nbytes: Bytes of the blob as it was given, or of the file.
        prompt: What the token list of the file says; nothing for blobs.
        partial: It was taken with ``partial=True``.
        form: The form in which the sequences of a whole state are put into the context, one by
            one; None: in the one that it has.
        points: The restore points that follow it in its file.
        follows: Called, where it was not validated, with what llama.cpp left of it: False refuses
            the state, as an error does.
    """

    blob: memoryview
    parsed: layout.Layout | None
    nbytes: int
    prompt: layout.Prompt = NO_PROMPT
    partial: bool = False
    form: layout.Form | None = None
    points: tuple[layout.RestorePoint, ...] = ()
    follows: Callable[[memoryview], bool] | None = None

    @property
    def flags(self) -> int:
        """The flags that it was taken with."""
        return calls.PARTIAL_ONLY if self.partial else 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a restore does, decided before anything is touched.

    Attributes:
        target: What is replaced: a sequence, or None for the whole context.
        before: What the context holds.
        rewinds: A partial state goes over the sequence that is there; nothing is emptied.
        filled: The target holds something.
        keeps: A copy of what would be lost is kept until the state is verified.
        kept: What the copy is of: a sequence, or None for the whole context.
    """

    target: Target
    before: Held
    rewinds: bool
    filled: bool
    keeps: bool
    kept: Target


class Restorer:
    """Restores states into one context.

    Args:
        handle: The context.
        facts: Its constants.
        form: How its states are written.
        fit: What is known of its caches.
    """

    def __init__(self, handle: Handle, facts: Facts, form: StateForm, fit: Fit) -> None:
        self._pointer = handle.pointer
        self._facts = facts
        self._form = form
        self._fit = fit

    def plan(self, call: Call, target: Target, incoming: Incoming) -> Plan:
        """Compare a state with the context and decide. Nothing is changed.

        Args:
            target: Where it is to go: a valid sequence id, or None for the whole context.
            incoming: The state.

        Raises:
            MismatchError, CapacityError: It does not fit.
            UnsupportedError: It holds nothing that could be restored.
        """
        parsed = incoming.parsed
        if parsed is not None and parsed.partial and not parsed.caches and parsed.module != "none":
            raise UnsupportedError(
                f"llama.cpp left everything out of this partial state, since {parsed.module} "
                "memory can be cut back: remove the later positions with seq_rm"
            )
        if parsed is None and target is None and self._form.loses_streams:
            self._refuse_to_lose_streams(call)
        before = calls.occupied(call, self._facts.n_seq_max)
        sure = parsed is not None and self._fit.check(call, target, parsed, before, incoming.form)
        rewinds = parsed is not None and incoming.partial and layout.has_partial(parsed.module)
        if rewinds and parsed is not None:
            _check_rewind(parsed, before.get(target or 0))
        filled = bool(before) if target is None else target in before
        return Plan(
            target,
            before,
            rewinds,
            filled,
            # Where anything is left that only llama.cpp can decide, what it would destroy is kept.
            keeps=filled and not sure,
            # A copy of one sequence would lack what is outside a sliding window.
            kept=None if self._facts.n_swa else target,
        )

    def restore(
        self,
        call: Call,
        change: Change,
        plan: Plan,
        incoming: Incoming,
        check: Callable[[], None],
    ) -> Held:
        """Put a state in place of what the target of *change* holds.

        Whatever ends it, the state of *change* says what is there.

        Args:
            change: The change that it is.
            plan: What :meth:`plan` said.
            incoming: The state.
            check: Called when a state that was not validated is there; what it raises undoes it.

        Returns:
            The sequences that were restored, none of them empty.

        Raises:
            RestoreError: llama.cpp refused it; ``rolled_back`` says what is left.
        """
        put = bound(self._rewind if plan.rewinds else self._put, call, plan.target, incoming)
        with calls.lent(call, plan.kept) if plan.keeps else nullcontext() as copy:
            after = attempt(
                change,
                bound(self._attempt, call, change, plan, put, incoming.parsed, copy, check),
                bound(self._settle, call, change, plan, put, copy),
            )
        if incoming.parsed is not None and incoming.form is None:
            self._fit.learn(incoming.parsed)
        return {seq_id: span for seq_id, span in after.items() if plan.target in (None, seq_id)}

    def put_back(self, call: Call, target: Target, copy: Buffer) -> bool:
        """Put a copy of this context's own back; False where the target could only be emptied."""
        view = memoryview(copy)
        self._pointer.last_logits = None
        try:
            parsed = self._form.parse_own(target, view)
        except (FormatError, UnsupportedError):  # a format that was restored without validation
            parsed = None
        if self._put(call, target, Incoming(view, parsed, len(view))):
            return True
        calls.empty(call, target)
        return False

    def give_up(self, call: Call, change: Change, error: BaseException) -> None:
        """Empty what *error* left half changed, and say so in a note of it."""
        calls.empty(call, change.target)
        add_note(error, f"{called(change.target)} was emptied")
        change.state = "emptied"  # last: what is interrupted before is done again

    def _refuse_to_lose_streams(self, call: Call) -> None:
        if not self._fit.one_stream(call):
            raise UnsupportedError(
                "of a split context this llama.cpp restores only the last sequence, unless the "
                "state is parsed first: leave validate=True"
            )

    # -- its execution

    def _attempt(
        self,
        call: Call,
        change: Change,
        plan: Plan,
        put: Callable[[], bool],
        parsed: layout.Layout | None,
        copy: Buffer | None,
        check: Callable[[], None],
    ) -> Held:
        """Do what is planned, and undo it where the outcome is not what it must be."""
        change.state = "touched"
        self._pointer.last_logits = None
        consumed = put()
        after = calls.occupied(call, self._facts.n_seq_max)
        if not consumed or not _agrees(plan, parsed, after):
            log = call.log()
            change.state = "undone" if self._undo(call, plan, copy) else "emptied"
            raise self._refusal(parsed, log, change, consumed=consumed)
        if parsed is None:
            check()
        change.state = "done"
        return after

    def _rewind(self, call: Call, target: Target, incoming: Incoming) -> bool:
        """Give a partial state to llama.cpp; False where it was not consumed whole."""
        if incoming.parsed is None or target is None:
            return False
        # The window, or the recurrent part, goes over the sequence; then the rest is cut off.
        written = calls.write(call, target, incoming.blob, incoming.flags)
        cut = _last(incoming.parsed) + 1
        return written == len(incoming.blob) and calls.remove(call, target, cut)

    def _put(self, call: Call, target: Target, incoming: Incoming) -> bool:
        """Empty the target and give a state to llama.cpp; False where it was refused."""
        blob, parsed = incoming.blob, incoming.parsed
        calls.empty(call, target)
        if parsed is not None and not parsed.sequences:
            return True  # llama.cpp ignores some empty states and reports success
        if parsed is not None and target is None:
            form = incoming.form
            if form is not None or (self._form.loses_streams and _is_split(parsed)):
                order = _cell_order(parsed)
                return all(self._put_sequence(call, blob, parsed, form, i) for i in order)
        written = calls.write(call, target, blob)
        if incoming.follows is not None and 0 < written < len(blob):
            return incoming.follows(blob[written:])
        return written == len(blob)

    def _put_sequence(
        self,
        call: Call,
        blob: memoryview,
        parsed: layout.Layout,
        form: layout.Form | None,
        seq_id: int,
    ) -> bool:
        with one_sequence(self._form, blob, parsed, seq_id, form) as data:
            return calls.write(call, seq_id, data) == len(data)

    # -- where it fails

    def _settle(
        self,
        call: Call,
        change: Change,
        plan: Plan,
        put: Callable[[], bool],
        copy: Buffer | None,
        error: BaseException,
    ) -> None:
        """Bring a restore that *error* interrupted to an end: undone, done, or empty and said."""
        # Where no copy was kept of what was there, the state was sure to fit.
        undoes = copy is not None or not plan.filled
        if self._undo(call, plan, copy) if undoes else put():
            change.state = "undone" if undoes else "done"
        else:
            self.give_up(call, change, error)

    def _undo(self, call: Call, plan: Plan, copy: Buffer | None) -> bool:
        """Bring back what was there before; False where the target could only be emptied."""
        if copy is not None:
            return self.put_back(call, plan.kept, copy)
        calls.empty(call, plan.target)
        return not plan.filled

    def _refusal(
        self,
        parsed: layout.Layout | None,
        log: Sequence[str],
        change: Change,
        *,
        consumed: bool,
    ) -> StateError:
        rolled_back = change.state == "undone"
        if rolled_back and parsed is not None:
            known = refusals.explain(
                log, parsed, types=self._facts.options.types, cells=self._facts.n_ctx_seq
            )
            if known is not None:
                return known
        what = "the positions are not those of the state" if consumed else "llama.cpp refused it"
        return RestoreError(f"the state was not restored: {what}", log=log, rolled_back=rolled_back)


def called(target: Target) -> str:
    """Return what an error calls a target."""
    return "the context" if target is None else f"sequence {target}"


def _is_split(parsed: layout.Layout) -> bool:
    """Tell whether a state has several streams."""
    streams = (n for name, n in parsed.cells_needed.items() if name != "recurrent")
    return any(len(n) > 1 for n in streams)


def _cell_order(parsed: layout.Layout) -> list[int]:
    """Return the sequences in the order of their recurrent cells, so that these come back in it."""
    order = list(parsed.sequences)
    for cache in parsed.caches:
        if isinstance(cache, layout.RecurrentCache):
            order.sort(key=lambda seq_id: min(cache.rows.owners.get(seq_id, [len(cache.rows)])))
    return order


def _last(parsed: layout.Layout) -> int:
    """Return the largest position of a state of one sequence; -1 when it is empty."""
    return max((span.last for span in parsed.spans.values()), default=-1)


def _check_rewind(parsed: layout.Layout, held: layout.Span | None) -> None:
    """Raise MismatchError unless the sequence goes at least as far as a partial state."""
    last, current = _last(parsed), held.last if held else -1
    if last < 0 or current < last:
        raise MismatchError([Difference("last position of the sequence", last, current)])


def _agrees(plan: Plan, parsed: layout.Layout | None, after: Held) -> bool:
    """Tell whether every sequence of the context holds what it must after the restore."""
    if parsed is None:
        return True
    if plan.target is None:
        return parsed.spans == after
    restored = [span for seq_id, span in after.items() if seq_id == plan.target]
    if list(parsed.spans.values()) != restored:
        return False
    # In a cache with a sliding window llama.cpp may reuse cells of the other sequences that
    # are outside their windows: their beginnings may move, their ends may not.
    return _ends(plan.before, plan.target) == _ends(after, plan.target)


def _ends(held: Held, target: Target) -> dict[int, int]:
    return {seq_id: span.last for seq_id, span in held.items() if seq_id != target}
