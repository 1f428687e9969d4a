"""Objects with bytes that stand for pieces of states."""

from __future__ import annotations

from collections.abc import Sequence

from llama_state.store import identity
from llama_state.store.lookup import Lookup
from llama_state.store.objects import NO_PARENT, Kind, Name, pack
from llama_state.store.places.backend import Backend, Place
from llama_state.store.prompt import Prompt
from llama_state.store.reading import Reader
from llama_state.store.tiers import Tiers
from llama_state.store.troubles import Troubles
from llama_state.store.trust import Trust

TRUST = Trust(None)
SEAL = TRUST.at(0).seal
FIELDS = identity.to_json({"architecture": "llama", "namespace": "tests"})
ROOT = TRUST.root(FIELDS)


def chain(prompt: Prompt, size: int = 4) -> list[tuple[Name, bytes, int]]:
    """The names of the row objects of a prompt, with their words and ends."""
    found, at = [], ROOT
    for first, last in prompt.chunks(0, size):
        words = prompt.words(first, last)
        n = prompt.position(last) - prompt.position(first)
        key = TRUST.at(0).keys.next(at, n, words)
        found.append((Name(at, key, n, "R"), words, prompt.position(last)))
        at = key
    return found


def packed(name: Name, words: bytes, end: int, payload: bytes) -> list[bytes]:
    """An object as buffers."""
    parts = pack(
        name,
        ROOT,
        words,
        [payload],
        SEAL,
        first=end - name.n_positions,
        end=end,
        session_version=11,
        keyed=False,
    )
    return [bytes(part) for part in parts]


def other(name: Name, kind: Kind) -> Name:
    """The name of another object of the same key."""
    return Name(name.parent, name.key, name.n_positions, kind)


def described() -> tuple[Name, list[bytes]]:
    """The description of the namespace."""
    name = Name(NO_PARENT, ROOT, 0, "N")
    parts = pack(name, ROOT, b"", [FIELDS], SEAL, first=0, end=0, session_version=0, keyed=False)
    return name, [bytes(part) for part in parts]


def as_one(
    places: Sequence[Backend], troubles: Troubles | None = None, *, readonly: bool = False
) -> Tiers:
    """Places as one, nearest first, as a store has them."""
    reader = Reader(places[0], Lookup(places[0], TRUST))
    return Tiers([*map(Place, places)], troubles or Troubles("tests"), reader, readonly=readonly)
