"""What a store holds, looked after without a context: chains, copies, another key."""

from __future__ import annotations

import time

from llama_state.store.contents import contents, copy
from llama_state.store.lookup import Lookup
from llama_state.store.objects import Name
from llama_state.store.places.memory import MemoryBackend
from llama_state.store.prompt import Prompt
from llama_state.store.reading import Reader
from llama_state.store.upkeep import Tree

from .objects import TRUST, chain, described, other, packed

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
    lookup = Lookup(backend, TRUST)
    return Tree(backend, lookup, Reader(backend, lookup))


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


def test_remove_what_is_gone() -> None:
    """What another process removed meanwhile frees nothing, and is no error."""
    backend = filled(BASE)
    looked = tree(backend)
    assert looked.remove(bytes(32)) == 0
    assert looked.remove(keys(BASE)[0])
    assert looked.remove(keys(BASE)[0]) == 0


def test_names_that_go_round() -> None:
    """Names can say what they want: a circle of them is of no chain, and nothing loops."""
    backend = filled(BASE)
    a, b, c = (bytes([n]) * 32 for n in (1, 2, 3))
    for parent, key in ((a, b), (b, a), (b, c), (c, c)):
        backend.put(Name(parent, key, 4, "R"), [b"x"])
    looked = tree(backend)
    assert len(list(looked.entries())) == 1
    assert looked.verify(repair=True).ok


def test_copy() -> None:
    """Parents come before children, what was used last comes last and keeps its time."""
    one, two = Prompt.of([*range(8), 50]), Prompt.of([*range(4), 60, 61, 62, 63, 64])
    source, target = filled(two, one), MemoryBackend(1 << 24)
    names = {prompt: [name for name, _, _ in chain(prompt)] for prompt in (one, two)}
    source.touch(names[one], 2000.0)
    source.touch(names[two][1:], 1000.0)
    state = other(names[one][-1], "S")
    source.put(state, packed(state, one.words(8, 9), 9, b"state"))
    source.touch([state], 2000.0)
    reported: list[tuple[int, int]] = []
    copied = copy(tree(source), target, lambda done, total: reported.append((done, total)))
    assert copied.ok
    assert copied.nbytes == target.used_bytes() == source.used_bytes()
    order = [stored.name.key for stored in target.entries()]
    assert order[1:4] == keys(two)
    assert order[-1] == keys(one)[-1]
    assert {(s.name, s.used) for s in target.entries() if s.name.kind in "RS"} == {
        (s.name, s.used) for s in source.entries() if s.name.kind in "RS"
    }
    assert reported[0][0] == 0
    assert reported[-1] == (source.used_bytes(),) * 2
    again = copy(tree(source), target, lambda *_: None)
    assert (again.n_objects, again.present) == (0, copied.n_objects)


def test_copy_leaves_out_what_is_damaged() -> None:
    """A damaged object is not copied, nor what goes on from it; all else is."""
    source, target = filled(Prompt.of(range(16)), Prompt.of([77])), MemoryBackend(1 << 24)
    name = chain(Prompt.of(range(16)))[1][0]
    source._objects[name] = source._objects[name][:-1] + b"\xff"
    copied = copy(tree(source), target, lambda *_: None)
    assert copied.damaged == (f"{name.key.hex()}.R",)
    assert copied.left_out == 2
    assert not copied.ok
    assert held(target) == held(filled(Prompt.of(range(4)), Prompt.of([77])))
    assert tree(target).verify(repair=False).ok


def test_copy_to_a_small_place() -> None:
    """What there is no room for is told, and no chain is broken."""
    source = filled(*(Prompt.of([n, *range(20)]) for n in range(5)))
    target = MemoryBackend(source.used_bytes() // 3)
    copied = copy(tree(source), target, lambda *_: None)
    assert copied.n_objects
    assert target.used_bytes() <= target.capacity_bytes
    assert tree(target).verify(repair=False).ok


def test_contents() -> None:
    """Figures of what is there."""
    found = contents(backend := filled(BASE, Prompt.of([77])), tree(backend))
    assert (found.n_prompts, found.n_objects, found.pinned) == (2, 5, 0)
    assert found.used_bytes == found.object_bytes == sum(n for _, n in found.kinds.values())
    assert (found.models, found.namespaces) == ({"llama": 2}, {"tests": 2})
