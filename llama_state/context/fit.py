"""Whether a parsed state fits a context: compared before llama.cpp sees it.

A context does not say how its caches are laid out. It is learned from its own states: once, from
any that passes by, and if need be from the shortest of its sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias

from .. import layout
from .._llama import calls
from .._llama.calls import Target
from .._llama.facts import Facts
from .._llama.handles import Call
from ..errors import CapacityError, Difference, MismatchError, UnsupportedError
from ..layout.conversion import cells_in_form, in_form
from .form import StateForm

Cells: TypeAlias = "Mapping[str, tuple[int, ...]]"
"""Cache name -> the cells that each of its streams needs."""

Held: TypeAlias = "Mapping[int, layout.Span]"
"""The sequences that a context holds."""

# Kinds of memory whose cell counts we can compute, and those that abort beyond n_ctx_seq.
_SIZES_KNOWN = frozenset({"none", "kv", "iswa", "recurrent", "hybrid", "hybrid-iswa"})
_BOUND_BY_CONTEXT = frozenset({"msa", "dsv4", "hybrid-idx"})


class Fit:
    """What is known of one context's caches, and whether a state fits them.

    Args:
        facts: The context's constants.
        form: How its states are written.
    """

    def __init__(self, facts: Facts, form: StateForm) -> None:
        self._facts = facts
        self._form = form
        self._known: layout.Geometry | None = None

    @property
    def known(self) -> layout.Geometry | None:
        """What has been learned so far."""
        return self._known

    def learn(self, parsed: layout.Layout) -> None:
        """Remember the geometry of a state that this context wrote or took."""
        self._form.settle(parsed)
        new = replace(parsed.geometry, arch=self._facts.arch)
        known = self._known if self._known and self._known.module == new.module else None
        self._known = layout.merge(known, new) if known else new

    def rewind_min(self, span: layout.Span) -> int:
        """Return the smallest position to which a sequence can truthfully be cut back."""
        return max(traits.rewind_min(span.first, span.last) for traits in self._form.traits)

    def other_readings(self, call: Call) -> Sequence[layout.Traits]:
        """Return how a state that does not read as expected can be read: as those of the context.

        Of a context that is empty, or holds little, they read as several kinds of memory.
        """
        before = calls.occupied(call, self._facts.n_seq_max)
        longest = max(before, key=lambda seq_id: before[seq_id].last, default=0)
        return self._form.readings(call, longest)

    def one_stream(self, call: Call) -> bool:
        """Whether all sequences share one stream of cells."""
        if self._known is None:
            try:
                self.learn(self._read_shortest(call))
            except UnsupportedError:  # an unknown format: what is right for several serves one
                return self._facts.n_seq_max == 1
        caches = self._known.caches if self._known else ()
        return all(cache.n_stream in (None, 1) for cache in caches)

    def check(
        self,
        call: Call,
        target: Target,
        parsed: layout.Layout,
        before: Held,
        form: layout.Form | None = None,
    ) -> bool:
        """Compare a state with the context.

        Args:
            target: Where it is to go.
            parsed: The state.
            before: What the context holds.
            form: The form in which its sequences are put there; None: in the one that it has.

        Returns:
            True when llama.cpp has nothing left to refuse.

        Raises:
            MismatchError: It is a state of other settings or of another model.
            CapacityError: It is sure to need more than there is.
        """
        if target is None and parsed.arch != self._facts.arch:
            raise MismatchError([Difference("architecture", parsed.arch, self._facts.arch)])
        filled = bool(before) if target is None else target in before
        if self._known is None or self._known.module != parsed.module:
            with suppress(UnsupportedError):
                self.learn(self._read_shortest(call, parsed))
        if filled and not self._knows(parsed.geometry):
            shortest = min(before, key=lambda seq_id: before[seq_id].last)
            self.learn(self._form.read(call, shortest, parsed))
        saved = parsed.geometry if form is None else in_form(parsed.geometry, form)
        found = list(layout.differences(saved, self._known)) if self._known else []
        version = parsed.version if form is None else form.version
        if version != self._form.version:
            found.insert(0, Difference("session version", version, self._form.version))
        if found:
            raise MismatchError(found)
        self._check_bounds(target, parsed)
        need = parsed.cells_needed if form is None else cells_in_form(parsed, form)
        return self._has_room(target, parsed, before, need) and self._knows(saved)

    def countable(self) -> layout.Traits:
        """Return the traits of a memory whose sequences have a cell for each position at the most.

        Raises:
            UnsupportedError: It is not such a memory.
        """
        traits, *others = self._form.traits
        if others or traits.module not in _SIZES_KNOWN or traits.ext:
            raise UnsupportedError(f"the cells of a {self._facts.arch} model cannot be counted")
        return traits

    def check_room(self, call: Call, dest: int, n_past: int, before: Held) -> None:
        """Raise CapacityError unless *n_past* cells are sure to be free for sequence *dest*."""
        traits = self.countable()
        if traits.module == "recurrent":
            return
        n_stream = 1 if self.one_stream(call) else self._facts.n_seq_max
        others = (span.last + 1 for i, span in before.items() if i != dest)
        need = n_past + (sum(others) if n_stream == 1 else 0)
        have = self._sure_cells("swa" if traits.window else "kv", n_stream=n_stream)
        if need > have:
            raise CapacityError("cells that are sure to be free", need=need, have=have)

    def _read_shortest(self, call: Call, like: layout.Layout | None = None) -> layout.Layout:
        # An empty sequence, if there is one, shows the streams at no cost.
        ids = range(self._facts.n_seq_max)
        shortest = min(ids, key=lambda seq_id: calls.positions(call, seq_id).last)
        return self._form.read(call, shortest, like)

    def _knows(self, geometry: layout.Geometry) -> bool:
        known = self._known
        return known is not None and layout.merge(known, geometry) == known

    def _check_bounds(self, target: Target, parsed: layout.Layout) -> None:
        """Raise CapacityError for sequences and positions that there are not."""
        facts = self._facts
        highest = max(parsed.sequences, default=-1)
        if target is None and highest >= facts.n_seq_max:
            raise CapacityError("sequences", need=highest + 1, have=facts.n_seq_max)
        last = max((high for _, high in parsed.spans.values()), default=-1)
        if parsed.module in _BOUND_BY_CONTEXT and last >= facts.n_ctx_seq:
            raise CapacityError("positions", need=last + 1, have=facts.n_ctx_seq)

    def _has_room(self, target: Target, parsed: layout.Layout, before: Held, cells: Cells) -> bool:
        """Return True when the cells are sure to be there, False when only llama.cpp knows."""
        facts = self._facts
        others = [p for i, p in before.items() if target not in (None, i)]
        # Of one stream the other sequences have at most a cell for each position, but for
        # M-RoPE, where the patches of an image share one.
        taken = sum(span.last + 1 for span in others)
        sure = parsed.module in _SIZES_KNOWN and not (others and parsed.traits.ext)
        for name, streams in cells.items():
            need = max(streams, default=0)
            have = facts.n_seq_max if name == "recurrent" else facts.n_ctx_seq
            if need > have:
                raise CapacityError(f"cells of the {name} cache", need=need, have=have)
            if name != "recurrent":
                shared = taken if len(streams) == 1 else 0
                sure = sure and need + shared <= self._sure_cells(name, n_stream=len(streams))
        return sure

    def _sure_cells(self, cache: str, *, n_stream: int) -> int:
        """Return the cells that each stream of a KV cache has at least.

        The size of a sliding-window cache is llama.cpp's own formula without its rounding up.
        """
        facts = self._facts
        if cache != "swa" or facts.options.swa_full:
            return facts.n_ctx_seq
        sequences = facts.n_seq_max if n_stream == 1 else 1
        return min(facts.n_ctx_seq, facts.n_swa * sequences + facts.n_ubatch)
