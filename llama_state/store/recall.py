"""Recall: find the longest stored prefix of a prompt, put it into a sequence, and say why."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from ..errors import Difference, StateError
from . import identity
from .lookup import DamagedError, Found, Hit, Lookup, Needs
from .objects import NO_PARENT, Name
from .pieces import SequenceMemory
from .prompt import Prompt, common
from .reading import Reader, wanted
from .results import Match, Recalled, Why
from .tiers import Tiers
from .troubles import Troubles

_FLOAT: Final = 4
_MEASURED: Final = 16  # tokens that must be decoded at once to tell how long one takes


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call is about: a prompt, and where it belongs."""

    memory: SequenceMemory
    seq_id: int
    prompt: Prompt
    root: bytes
    fields: dict[str, str]
    needs: Needs

    def shortened(self, n_tokens: int) -> Asked:
        """Return the same for the first tokens of the prompt."""
        return replace(self, prompt=Prompt(self.prompt.tokens[:n_tokens]))


@dataclass(slots=True)
class _Met:
    """What a recall has met that made it begin again.

    Attributes:
        last: The last of it.
        too_slow: Whether something is left out as reading it takes too long.
        bad: What cannot be had: it counts as not there.
        again: How often something was tried again.
        sound: What was verified.
    """

    last: DamagedError | None = None
    too_slow: bool = False
    bad: set[Name] = field(default_factory=set)
    again: Counter[Name] = field(default_factory=Counter)
    sound: set[Name] = field(default_factory=set)


class Recaller:
    """Finds prefixes in one place, and puts them into sequences.

    Args:
        backend: The place, or places.
        lookup: Walks along its chains.
        reader: Reads its objects.
        troubles: Counts.
        afterwards: Calls a function later, in a thread.
        min_gain: Seconds by which reading must be faster than decoding; None: not asked.
    """

    def __init__(
        self,
        backend: Tiers,
        lookup: Lookup,
        reader: Reader,
        troubles: Troubles,
        afterwards: Callable[[Callable[[], object]], None],
        min_gain: float | None,
    ) -> None:
        self._afterwards = afterwards
        self._min_gain = min_gain
        self._rates: dict[bytes, float] = {}
        self._backend = backend
        self._lookup = lookup
        self._reader = reader
        self._troubles = troubles

    def decoded(self, root: bytes, n_tokens: int, seconds: float) -> None:
        """Note how long decoding took, of the model and settings that *root* stands for."""
        if n_tokens >= _MEASURED:
            self._rates[root] = n_tokens / max(seconds, 1e-9)

    def match(self, asked: Asked) -> Match:
        """Return what is stored of a prompt."""
        found, hit = self.search(asked)
        objects = wanted(hit, self._lookup, asked.needs, 0)
        headers = (self._lookup.header(each.name) for each in objects)
        nbytes = sum(header.nbytes for header in headers if header)
        return Match(hit.n_tokens, nbytes, self._why(asked, found, hit))

    def search(
        self, asked: Asked, *, logits: bool = False, met: _Met | None = None
    ) -> tuple[Found, Hit]:
        """Return what is there of a prompt, and the longest hit.

        The last token is no part of it, unless *logits* are wanted and those of it are stored.
        """
        met = met or _Met()
        while True:  # again where another place may have what is damaged in one
            found = self._lookup.walk(asked.root, asked.prompt, met.bad)
            hit = self._longest(asked, found, logits=logits)
            if not any([self._met(error, met) for error in found.damaged.values()]):
                return found, hit

    def _worthwhile(self, asked: Asked, met: _Met, *, logits: bool) -> tuple[Found, Hit]:
        """Return what is there, and the longest hit that is faster to read than to decode."""
        found, hit = self.search(asked, logits=logits, met=met)
        far = self._too_slow(asked, hit)
        while far:
            met.too_slow = True
            met.bad |= far
            found, hit = self.search(asked, logits=logits, met=met)
            far = self._too_slow(asked, hit)
        return found, hit

    def _too_slow(self, asked: Asked, hit: Hit) -> set[Name]:
        """Return the objects of a hit that lie far away, if it takes too long to read them."""
        rate = self._rates.get(asked.root)
        if self._min_gain is None or rate is None or not self._backend.remote:
            return set()
        keep = self._held(asked)
        objects = wanted(hit, self._lookup, asked.needs, keep)
        sizes = [(each.name, self._reader.nbytes(each.name)) for each in objects]
        seconds, far = self._backend.seconds_to_read(sizes)
        # Without the rows of a window, or a restore point, nothing behind what is held is of use.
        starts = [each.start if each.group == "R" else 0 for each in objects if each.name in far]
        near = max(min(starts, default=hit.end), keep)
        gain = (hit.n_tokens - asked.prompt.index(near)) / rate - seconds
        return far if far and gain < self._min_gain else set()

    def _longest(self, asked: Asked, found: Found, *, logits: bool) -> Hit:
        prompt = asked.prompt
        if logits:
            hit = self._lookup.best(found, prompt, asked.needs, prompt.n_positions)
            if hit.has_logits and hit.n_tokens == len(prompt):
                return hit
        most = prompt.position(max(len(prompt) - 1, 0))
        return self._lookup.best(found, prompt, asked.needs, most)

    def _met(self, error: DamagedError, met: _Met) -> bool:
        """Count an object that cannot be had, and set it aside where it is damaged.

        Returns:
            Whether to try again: it was written anew, or there is another copy.
        """
        self._lookup.forget(error.name)
        if error.cause is not None:
            self._troubles.failed("read", error.cause)
        elif error.gone and not error.changed:
            self._troubles.count(holes=1)
        again = error.changed
        if not error.gone:
            self._troubles.count(damaged=1)
            with self._troubles.tolerated("set aside"):
                self._backend.set_aside(error.name)
                again = self._backend.has(error.name)
        met.again[error.name] += again
        return again and met.again[error.name] <= len(self._backend.tiers)

    def recall(self, asked: Asked, *, logits: bool) -> tuple[Recalled, Found]:
        """Put the longest hit into the sequence, and return it, with all that was found.

        Args:
            asked: The prompt.
            logits: Whether all of it can be recalled where the logits of the last token are stored.
        """
        began = time.monotonic()
        recalled, found = self._recall(asked, logits=logits)
        seconds = time.monotonic() - began
        self._troubles.done(
            "recall",
            seq_id=asked.seq_id,
            n_tokens=len(recalled.tokens),
            of=len(asked.prompt),
            nbytes=recalled.nbytes,
            seconds=round(seconds, 6),
            why=recalled.why.reason,
        )
        self._troubles.count(
            recalls=1,
            hits=recalled.n_past > 0,
            tokens_asked=len(asked.prompt),
            tokens_recalled=len(recalled.tokens),
            bytes_read=recalled.nbytes,
            recall_microseconds=round(1e6 * seconds),
        )
        self._troubles.lose(recalled.why.reason, len(asked.prompt) - len(recalled.tokens))
        return recalled, found

    def _recall(self, asked: Asked, *, logits: bool) -> tuple[Recalled, Found]:
        met = _Met()
        failure = ""
        while True:  # each time with one object less, or with another one in its place
            with self._troubles.tolerated("recall"):
                try:
                    found, hit = self._worthwhile(asked, met, logits=logits)
                    return self._load(asked, found, hit, met), found
                except DamagedError as error:
                    met.last = error
                    if not self._met(error, met):
                        met.bad.add(error.name)
                    continue
                except (OSError, StateError) as error:
                    failure = str(error)
                    raise
            break
        asked.memory.cut(asked.seq_id, 0)
        return Recalled(0, 0, (), Why("failed", detail=failure)), Found()

    def _load(self, asked: Asked, found: Found, hit: Hit, met: _Met) -> Recalled:
        memory, seq_id, prompt = asked.memory, asked.seq_id, asked.prompt
        why = self._why(asked, found, hit, met.last)
        if met.too_slow and why.reason != "all":
            why = Why("too little gain", hit.n_tokens)
        keep = self._held(asked)
        if keep and keep >= hit.end:
            memory.cut(seq_id, keep)
            tokens = prompt.tokens[: prompt.index(keep)]
            return Recalled(keep, 0, tokens, Why("held", len(tokens)))
        # Rows of a window that stayed in front of a gap would look as if there were none.
        gap = asked.needs.window and keep < asked.needs.first_of_window(hit.end)
        if gap or not memory.appends(seq_id):
            keep = 0
        if not hit.end:
            memory.cut(seq_id, 0)
            return Recalled(0, 0, (), why)
        tokens = prompt.tokens[: hit.n_tokens]
        ids = None if prompt.has_media else prompt.ids[: hit.n_tokens]
        objects = wanted(hit, self._lookup, asked.needs, keep)
        read = [each.name for each in objects]
        row = None
        if met.last is not None:  # all at once, so that no piece goes in again and again
            self._reader.check(objects[::-1], met.sound)
        if hit.n_tokens == len(prompt):
            read.append(hit.links[-1].kinds["L"])
            row = self._logits(hit)
        nbytes = self._reader.load(memory, seq_id, hit, objects, keep=keep, tokens=ids, logits=row)
        used = (name for link in hit.links for name in link.kinds.values())
        with self._troubles.tolerated("touch"):  # a full server refuses that, too
            self._backend.touch(used)
        self._keep_nearer(asked.root, hit, read)
        return Recalled(hit.end, nbytes, tokens, why)

    def _keep_nearer(self, root: bytes, hit: Hit, read: Sequence[Name]) -> None:
        """Let a hit be kept nearer, once the sequence has it, if any of it was not near.

        All its chunks, since nothing is found without those before it.
        """
        if self._backend.take_far(read):
            rows = [name for link in hit.links if (name := link.kinds.get("R"))]
            names = dict.fromkeys([Name(NO_PARENT, root, 0, "N"), *rows, *read])
            self._afterwards(partial(self._backend.keep_nearer, list(names)))

    def _logits(self, hit: Hit) -> memoryview[float]:
        """Return the logits of the last token of a hit."""
        name = hit.links[-1].kinds["L"]
        data = self._reader.read(name)
        if len(data) % _FLOAT:
            raise DamagedError(name, hit.links[-1].header.start, gone=False)
        return memoryview(data).cast("f")

    def _held(self, asked: Asked) -> int:
        """Return how many positions of the prompt a sequence holds, and can go on from."""
        memory, seq_id, prompt = asked.memory, asked.seq_id, asked.prompt
        held = memory.tokens(seq_id)
        n_past = memory.n_past(seq_id)
        if not held or prompt.has_media or len(held) != n_past:
            return 0
        most = min(len(held), len(prompt) - 1)
        shared = common(Prompt(held[:most]).words(0, most), prompt.words(0, most))
        return shared if shared and memory.can_cut(seq_id, shared) else 0

    def _why(
        self, asked: Asked, found: Found, hit: Hit, damaged: DamagedError | None = None
    ) -> Why:
        prompt, at = asked.prompt, hit.n_tokens
        if at >= len(prompt) - 1:
            return Why("all", at)
        damaged = next(iter(found.damaged.values()), damaged)
        if damaged is not None and damaged.position >= hit.end:
            return Why("missing" if damaged.gone else "damaged", prompt.index(damaged.position))
        links = found.partial[0] if found.partial else tuple(found.links)
        shared = found.partial[1] if found.partial else 0
        if not links and not found.points:
            return self._why_nothing(asked)
        start = prompt.index(links[-1].header.start) if links else 0
        known = start + prompt.tokens_in(start, shared) if found.partial else at
        if known > at:
            return Why("no restore point", at)
        if found.partial and 4 * shared < len(words := found.partial[0][-1].header.words):
            stored = int.from_bytes(words[4 * shared : 4 * shared + 4], "little", signed=True)
            return Why("differs", at, stored if stored >= 0 else None, prompt.tokens[at])
        return Why("missing", at)

    def _why_nothing(self, asked: Asked) -> Why:
        differences: Sequence[Difference] | None = None
        for name in self._backend.children(NO_PARENT):
            if name.key == asked.root:
                if any(self._backend.children(asked.root)):
                    return Why("differs", 0, None, asked.prompt.tokens[0])
                continue
            try:
                fields = identity.from_json(self._reader.read(name))
            except DamagedError:  # or of another key
                continue
            found = identity.compare(fields, asked.fields)
            if differences is None or len(found) < len(differences):
                differences = found
        return Why("empty") if differences is None else Why("another", differences=differences)
