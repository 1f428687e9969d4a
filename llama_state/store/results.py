"""What the methods of a store return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import Difference
from .prompt import Token

Reason: TypeAlias = Literal[
    "all",
    "held",
    "differs",
    "no restore point",
    "missing",
    "damaged",
    "another",
    "empty",
    "too little gain",
    "failed",
]


@dataclass(frozen=True, slots=True)
class Why:
    """Why a hit is as long as it is.

    Attributes:
        reason: "all": nothing more can be stored. "held": the sequence already had as much.
            "differs": at token *n_tokens* the stored prompts have another one. "no restore point":
            memory that cannot be cut has none after *n_tokens*. "missing": behind *n_tokens*
            nothing is stored. "damaged": the next chunk is. "another": only prompts of another
            model, or of other settings, are stored. "empty": nothing is. "failed": the store could
            not be read, or llama.cpp refused what it holds.
        n_tokens: Tokens up to there.
        stored: The stored token at *n_tokens*; None where there is none, or where it is media.
        asked: The token of the prompt at *n_tokens*.
        differences: Fields of the model or of the settings: stored, and of this context.
        detail: What failed, in words.
    """

    reason: Reason
    n_tokens: int = 0
    stored: int | None = None
    asked: Token | None = None
    differences: Sequence[Difference] = ()
    detail: str = ""

    def __str__(self) -> str:
        return _SENTENCES[self.reason].format(
            n=self.n_tokens,
            stored=self.stored,
            asked=self.asked,
            fields="; ".join(
                f"{each.name}: stored {each.saved}, here {each.current}"
                for each in self.differences
            ),
            detail=self.detail,
        )


_SENTENCES: Mapping[Reason, str] = {
    "all": "all of it is stored, but for the last token, which gives the logits",
    "held": "the sequence already held as much as is stored: {n} tokens",
    "differs": "at token {n} the stored prompts have {stored}, this one has {asked}",
    "no restore point": "no restore point after token {n}, and this memory cannot be cut",
    "missing": "nothing is stored behind token {n}",
    "damaged": "the chunk at token {n} is damaged, and was set aside",
    "another": "prompts are stored only of another model, or of other settings: {fields}",
    "empty": "nothing is stored",
    "too little gain": "reading what is behind token {n} would take as long as decoding it",
    "failed": "the store failed: {detail}",
}


@dataclass(frozen=True, slots=True)
class Match:
    """What a store has of a prompt.

    Attributes:
        n_tokens: Tokens of the longest prefix that can be gone on from.
        nbytes: Bytes of its objects.
        why: Why it is not longer.
    """

    n_tokens: int
    nbytes: int
    why: Why


@dataclass(frozen=True, slots=True)
class Recalled:
    """What a sequence holds after a recall.

    Attributes:
        n_past: Its positions: decoding goes on there. 0: it is empty.
        nbytes: Bytes of the objects that were read.
        tokens: Its tokens, the beginning of those that were asked for.
        why: Why they are not more.
    """

    n_past: int
    nbytes: int
    tokens: tuple[Token, ...]
    why: Why

    def __repr__(self) -> str:
        return (
            f"Recalled(n_past={self.n_past}, nbytes={self.nbytes}, "
            f"tokens=<{len(self.tokens)}>, why={str(self.why)!r})"
        )


@dataclass(frozen=True, slots=True)
class Remembered:
    """What was written of a prompt.

    Attributes:
        n_tokens: Tokens from its beginning on that are stored now.
        new_tokens: Those that were not before.
        nbytes: Bytes that were written.
    """

    n_tokens: int
    new_tokens: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored prompt: one that no other goes on from.

    Attributes:
        key: Its key, in hexadecimal digits: names it, and says nothing of it.
        namespace: The caller's namespace.
        model: The model's architecture.
        n_tokens: Tokens, media counted once.
        n_positions: Positions.
        nbytes: Bytes of all its objects, also of those that others share.
        own_bytes: Bytes that would be free without it.
        used: When it was last used, in seconds since 1970.
        pinned_until: When its pin ends; None without one.
        restore_points: Positions at which memory that cannot be cut can go on.
    """

    key: str
    namespace: str
    model: str
    n_tokens: int
    n_positions: int
    nbytes: int
    own_bytes: int
    used: float
    pinned_until: float | None
    restore_points: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk of a stored prompt.

    Attributes:
        key: Key of the prefix that ends with it.
        start: Its first position.
        end: The position behind its last one.
        n_tokens: Tokens, media counted once.
        kinds: What is stored of it -> bytes: R rows, W rows of a window, S the state at its end, L
            the logits there, P a pin.
        n_next: Chunks that go on from it.
    """

    key: str
    start: int
    end: int
    n_tokens: int
    kinds: Mapping[str, int]
    n_next: int


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied from one store to another.

    Attributes:
        n_objects: Objects that were written.
        nbytes: Their bytes.
        present: Objects that were there.
        damaged: Those that are damaged: key and kind. They were not copied.
        left_out: Objects that there was no room for, that were evicted meanwhile, or that go on
            from what was not copied.
    """

    n_objects: int
    nbytes: int
    present: int
    damaged: tuple[str, ...]
    left_out: int

    @property
    def ok(self) -> bool:
        """Whether all of it is in the other store now."""
        return not self.damaged and not self.left_out


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a place, in figures.

    Attributes:
        location: Where it is.
        used_bytes: Bytes that everything takes.
        n_prompts: Stored prompts that no other goes on from.
        n_objects: Objects, all kinds.
        object_bytes: Their bytes; the rest was set aside, or is being written.
        kinds: Kind -> objects and their bytes.
        pinned: Prompts that are pinned.
        namespaces: The callers' namespaces, with the prompts of each.
        models: The models' architectures, with the prompts of each.
    """

    location: str
    used_bytes: int
    n_prompts: int
    n_objects: int
    object_bytes: int
    kinds: Mapping[str, tuple[int, int]]
    pinned: int
    namespaces: Mapping[str, int]
    models: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Verified:
    """What a look at everything in a store found.

    Attributes:
        n_objects: Objects that were read, in each place.
        nbytes: Their bytes.
        damaged: Those that are damaged: key and kind, and where, if there are several places.
        orphans: Those that nothing leads to, since what they go on from is gone.
        repaired: Whether these were taken away.
        foreign: How many belong to prompts of which nothing can be read: those of another key.
            They were left alone.
    """

    n_objects: int
    nbytes: int
    damaged: tuple[str, ...]
    orphans: tuple[str, ...]
    repaired: bool
    foreign: int = 0

    @property
    def ok(self) -> bool:
        """Whether all is sound that can be read."""
        return not self.damaged and not self.orphans
