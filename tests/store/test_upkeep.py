"""What a store holds, looked after without a context: chains, copies, another key."""

from __future__ import annotations

import time

from llama_state.store.lookup import Lookup
from llama_state.store.memory import MemoryBackend
from llama_state.store.prompt import Prompt
from llama_state.store.reading import Reader
from llama_state.store.upkeep import Tree

from .objects import KEYS, SEAL, chain, described, other, packed

BASE = Prompt.of(range(10))


def filled(*prompts: Prompt) -> MemoryBackend:
    """A place with prompts, and the description of their namespace."""
    backend = MemoryBackend(1 << 24)
    name, parts = described()
    backend.put(name, parts)
    for prompt in prompts:
        for name, words, end in chain(prompt):
            backend.put(name, packed(name, words, end, bytes(100)))
    return backend


def tree(backend: MemoryBackend) -> Tree:
    """Its chains."""
    lookup = Lookup(backend, KEYS, SEAL, keyed=False)
    return Tree(backend, lookup, Reader(backend, lookup, SEAL))


def held(backend: MemoryBackend) -> set[bytes]:
    """The keys that are there."""
    return {stored.name.key for stored in backend.entries()}


def keys(prompt: Prompt) -> list[bytes]:
    """The keys of the chunks of a prompt."""
    return [name.key for name, _, _ in chain(prompt)]


def test_remove() -> None:
    """What goes on from a prefix goes with it; what others go on from stays, so the namespace."""
    one, two = Prompt.of([*range(8), 50]), Prompt.of([*range(4), 60, 61, 62, 63, 64])
    backend = filled(one, two)
    before = backend.used_bytes()
    freed = tree(backend).remove(keys(one)[2])
    assert freed == before - backend.used_bytes() > 0
    assert held(backend) - held(filled()) == set(keys(two))
    tree(backend).remove(keys(two)[0])
    assert held(backend) == held(filled())


def test_remove_leaves_what_is_pinned() -> None:
    """A pinned beginning stays when what goes on from it is removed; one whose pin ended goes."""
    for until, kept in ((time.time() + 100, 2), (time.time() - 1, 0)):
        backend = filled(Prompt.of(range(16)))
        names = [name for name, _, _ in chain(Prompt.of(range(16)))]
        pin = other(names[1], "P")
        backend.put(pin, [b"pin"])
        backend.touch([pin], until)
        tree(backend).remove(names[3].key)
        assert held(backend) - held(filled()) == {name.key for name in names[:kept]}


def test_remove_a_long_chain() -> None:
    """As long as a chain may be: none is too deep."""
    prompt = Prompt.of(range(8000))
    backend = filled(prompt)
    tree(backend).remove(keys(prompt)[0])
    assert held(backend) == held(filled())
