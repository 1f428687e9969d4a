"""The tokens that a ``Llama`` lists of sequence 0, kept true while its context changes."""

from __future__ import annotations

from collections.abc import Sequence

from ..._llama import calls
from ..._llama.calls import Target
from ..._llama.facts import Facts
from ..._llama.handles import Call
from ...context import engine
from ...context.changes import Change, Keeper
from ...errors import CapacityError, Difference, MismatchError, StateError, UnsupportedError
from .llama import LlamaHandle


class LlamaKeeper(Keeper):
    """Keeps ``n_tokens`` and ``input_ids`` of a ``Llama`` true. Used under the context's lock.

    Args:
        handle: The context of the ``Llama``.
        facts: The constants of the context.
    """

    def __init__(self, handle: LlamaHandle, facts: Facts) -> None:
        self._handle = handle
        self._facts = facts

    def tokens(self, target: Target) -> tuple[int, ...] | None:
        """Return the tokens that the ``Llama`` lists; None of another sequence than its own."""
        if target not in (None, 0):
            return None
        llm = self._handle.llm
        return tuple(llm.input_ids[: llm.n_tokens].tolist())

    def known_tokens(self, call: Call, target: Target) -> tuple[int, ...] | None:
        """Return what :meth:`tokens` does, if that is what the cache holds.

        Raises:
            StateError: The ``Llama`` and the cache do not agree.
        """
        tokens, held = self.tokens(target), calls.positions(call, 0).last + 1
        if tokens is not None and held != len(tokens):
            raise StateError(
                f"the Llama counts {len(tokens)} tokens and the cache holds {held} positions"
            )
        return tokens

    def check_room(self, n_tokens: int) -> None:
        """Raise CapacityError where the ``Llama`` cannot list *n_tokens*.

        llama.cpp rounds ``n_ctx`` up, a ``Llama`` does not.
        """
        have = len(self._handle.llm.input_ids)
        if n_tokens > have:
            raise CapacityError("tokens of a Llama", need=n_tokens, have=have)

    # -- around a change

    def before(self, call: Call, change: Change) -> None:
        """Refuse what a ``Llama`` cannot count.

        Raises:
            UnsupportedError: A part of its sequence that is not its end would go, or a copy
                would not begin at position 0.
            MismatchError: The tokens that come in are not given, or not as many as positions.
            CapacityError: The ``Llama`` has no room for them.
        """
        if change.target not in (None, 0) or change.spans is None or change.kind == "undo":
            return
        first, last = change.spans.get(0, (0, -1))
        if change.kind == "remove":
            if 0 <= last < calls.positions(call, 0).last:
                raise UnsupportedError("of the sequence of a Llama only the end can be removed")
        elif change.kind == "decode":
            self.check_room(last + 1)
        else:
            self._check_beginning(change, first, last)
            self._check_tokens(change.tokens, last + 1)

    def check(self, call: Call, change: Change) -> None:
        """Raise MismatchError unless the tokens are those of the state that is there now."""
        if change.target in (None, 0):
            self._check_tokens(change.tokens, calls.positions(call, 0).last + 1)

    def after(self, call: Call, change: Change) -> None:
        """List the tokens that sequence 0 holds now; logits are there only after a decode."""
        if change.state == "untouched":
            return
        listed = self._handle.llm.n_tokens
        if change.target not in (None, 0):
            self._write((), start=listed)
            return
        n_past = calls.positions(call, 0).last + 1
        tokens = change.tokens or ()
        if change.kind == "decode" and change.spans is not None:
            start = change.spans[0].first
            held = tokens[: n_past - start] if n_past > start else ()
            self._write(held, start=min(start, n_past), logits=change.state == "done")
        elif change.kind != "remove" and change.state == "done":
            self._write(tokens[:n_past])
        else:
            self._write((), start=min(n_past, listed))

    # -- shared by the above

    def _check_beginning(self, change: Change, first: int, last: int) -> None:
        if first <= 0 or first > last:
            return
        if change.kind == "copy":
            raise UnsupportedError("a copy into the sequence of a Llama begins at position 0")
        if not (self._facts.n_swa or self._facts.recurrent):
            raise MismatchError([Difference("first position of sequence 0", first, 0)])

    def _check_tokens(self, tokens: Sequence[int] | None, n_past: int) -> None:
        """Raise an error unless *tokens* are those of *n_past* positions."""
        self.check_room(n_past)
        n_tokens = len(engine.checked_tokens(tokens or (), self._facts.n_vocab))
        if n_tokens != n_past:
            given = "none given: pass tokens=" if tokens is None else f"{n_tokens} given"
            raise MismatchError([Difference("tokens of sequence 0", n_past, given)])

    def _write(self, tokens: Sequence[int], *, start: int = 0, logits: bool = False) -> None:
        """Say that sequence 0 holds what it held before *start*, and then *tokens*.

        Args:
            tokens: The token ids.
            start: Their first position.
            logits: Those of the last one are there, to be sampled from.
        """
        llm = self._handle.llm
        end = start + len(tokens)
        llm.input_ids[start:end] = tokens
        llm.n_tokens = end
        # Versions without the mark always decode the last token of a prompt before they sample;
        # those of all tokens are copied by the Llama's own decoding only.
        if hasattr(llm, "_requires_eval"):
            llm._requires_eval = not logits or llm._logits_all
