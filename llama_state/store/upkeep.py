"""Look after a place: what is in it, whether it is sound, what may go."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .._io import Progress
from .._io.progress import no_progress
from ..errors import StateError
from . import identity
from .lookup import Lookup
from .objects import KINDS, NO_PARENT, Header, Name
from .places.backend import Backend, Stored
from .prompt import ids_of
from .reading import Reader
from .results import Entry, StoredChunk, Verified
from .tiers import Tiers
from .trust import Trust


@dataclass(slots=True)
class _Node:
    """All objects of one key, the one that it goes on from, and those that go on from it."""

    stored: list[Stored] = field(default_factory=list)
    children: set[bytes] = field(default_factory=set)
    parent: bytes = NO_PARENT

    @property
    def leaves_shared(self) -> bool:
        """Whether it goes on from the part that is under the shared key."""
        return self.parent != self.stored[0].name.parent

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.stored)

    def is_pinned(self, now: float) -> bool:
        """Tell whether a pin holds it."""
        pin = self.named("P")
        return pin is not None and pin.used > now

    def named(self, kind: str) -> Stored | None:
        return next((each for each in self.stored if each.name.kind == kind), None)


@dataclass(frozen=True, slots=True)
class _Copy:
    """An object in one place, once it was read; of another key it is not its own."""

    place: Backend
    name: Name
    nbytes: int
    is_sound: bool
    is_own: bool


class Tree:
    """All chains of a place, as they are now.

    Args:
        backend: The place, or several as one.
        lookup: Knows the headers.
        reader: Reads objects.
    """

    def __init__(self, backend: Backend, lookup: Lookup, reader: Reader) -> None:
        self._backend = backend
        self._lookup = lookup
        self.reader = reader
        self._nodes: dict[bytes, _Node] = {}
        for stored in backend.entries():
            self._nodes.setdefault(stored.name.key, _Node()).stored.append(stored)
        left = lookup.trust.left(self._nodes)
        for key, node in self._nodes.items():
            parent_key = node.stored[0].name.parent
            node.parent = left.get(parent_key, parent_key)
            if parent := self._nodes.get(node.parent):
                parent.children.add(key)
        self._tops = self._found_tops()
        # Names can say what they want: those that go round in a circle are of no chain.
        self._nodes = {key: self._nodes[key] for key in self._tops}

    @classmethod
    def of(cls, backend: Backend, trust: Trust) -> Tree:
        """Return the chains of a place whose objects were made with these keys, or with none.

        Raises:
            StateError: There are prompts, and none can be read with them.
        """
        lookup = Lookup(backend, trust)
        tree = cls(backend, lookup, Reader(backend, lookup))
        tree._check_key()
        return tree

    def _check_key(self) -> None:
        described = [node.named("N") for node in self._nodes.values()]
        names = [stored.name for stored in described if stored]
        if names and not any(map(self._lookup.header, names)):
            raise StateError(
                f"nothing in {self._backend.location} can be read: it was made with another key,"
                " or with one where none was given"
            )

    def _found_tops(self) -> dict[bytes, bytes]:
        """Return for each key the one that its chain begins with, as far as it is there."""
        tops = {key: key for key, node in self._nodes.items() if node.parent not in self._nodes}
        waiting = list(tops)
        while waiting:
            key = waiting.pop()
            for child in self._nodes[key].children:
                tops[child] = tops[key]
                waiting.append(child)
        return tops

    def entries(self) -> Iterator[Entry]:
        """Yield the prompts that no other goes on from, the last used first."""
        ends = [
            key
            for key, node in self._nodes.items()
            if not node.children and node.parent != NO_PARENT and self._is_own(key)
        ]
        entries = [entry for key in ends if (entry := self.entry(key)) is not None]
        yield from sorted(entries, key=lambda entry: entry.used, reverse=True)

    def _is_own(self, key: bytes) -> bool:
        """Tell whether anything of a chain can be read: that of another key cannot."""
        chain = self._chain(key)
        return bool(chain) and any(map(self._header, [*chain, self._nodes[chain[0].parent]]))

    def entry(self, key: bytes) -> Entry | None:
        """Return the prefix that ends with *key*; None where what it goes on from is gone."""
        chain = self._chain(key)
        if not chain:
            return None
        fields = self._fields(chain[0].parent)
        own = 0
        for node in reversed(chain):
            if len(node.children) > 1:
                break
            own += node.nbytes
        ends, position = [], 0
        for node in chain:
            position += node.stored[0].name.n_positions
            if node.named("S"):
                ends.append(position)
        pin = chain[-1].named("P")
        return Entry(
            key=key.hex(),
            namespace=identity.namespace_of(fields),
            model=fields.get("architecture", ""),
            n_tokens=len(self.tokens(key)),
            n_positions=position,
            nbytes=sum(node.nbytes for node in chain),
            own_bytes=own,
            used=max(
                (each.used for each in chain[-1].stored if each.name.kind != "P"), default=0.0
            ),
            pinned_until=pin.used if pin else None,
            restore_points=tuple(ends),
        )

    def keys(self, begin: str) -> list[bytes]:
        """Return the keys whose hexadecimal digits begin so."""
        return [key for key in self._nodes if key.hex().startswith(begin)]

    def tokens(self, key: bytes) -> list[int | None]:
        """Return the tokens of the prefix that ends with *key*; None for media."""
        return [token for node in self._chain(key) for token in self._tokens_of(node)]

    def chunks(self, key: bytes) -> Iterator[StoredChunk]:
        """Yield the chunks of the prefix that ends with *key*, from the first on."""
        end = 0
        for node in self._chain(key):
            name = node.stored[0].name
            start, end = end, end + name.n_positions
            kinds: dict[str, int] = {each.name.kind: each.nbytes for each in node.stored}
            n_tokens = len(self._tokens_of(node))
            yield StoredChunk(name.key.hex(), start, end, n_tokens, kinds, len(node.children))

    def identity(self, key: bytes) -> Mapping[str, str]:
        """Return what the prefix that ends with *key* was computed with, field by field."""
        chain = self._chain(key)
        return self._fields(chain[0].parent) if chain else {}

    def objects(self) -> Iterator[Stored]:
        """Yield all that prompts are made of, without pins: parents before their children.

        The prompt that was used last comes last.
        """
        done: set[bytes] = set()
        for entry in reversed(list(self.entries())):
            chain = self._chain(bytes.fromhex(entry.key))
            for node in [self._nodes[chain[0].parent], *chain]:
                key = node.stored[0].name.key
                if key not in done:
                    done.add(key)
                    kept = [each for each in node.stored if each.name.kind != "P"]
                    yield from sorted(kept, key=lambda each: KINDS.index(each.name.kind))

    def _tokens_of(self, node: _Node) -> list[int | None]:
        header = self._header(node)
        return ids_of(header.words) if header else []

    def _header(self, node: _Node) -> Header | None:
        """Return the header of any of the objects of a key; None where none can be read."""
        names = (each.name for each in node.stored if each.name.kind != "P")
        return next(filter(None, map(self._lookup.header, names)), None)

    def remove(self, key: bytes) -> int:
        """Remove a prefix, what goes on from it, and what nothing else goes on from.

        What it goes on from stays where it is pinned, or of others too.
        """
        if key not in self._nodes:
            return 0  # another process was faster
        freed = sum(map(self._drop, reversed(self._below(key))))
        gone = self._nodes[key]
        freed += self._drop(key)
        while not gone.leaves_shared and (node := self._nodes.get(gone.parent)) is not None:
            if node.children or node.parent == NO_PARENT or node.is_pinned(time.time()):
                break
            freed += self._drop(gone.parent)
            gone = node
        return freed

    def _below(self, key: bytes) -> list[bytes]:
        """Return the keys of all that goes on from a prefix, each behind what it goes on from."""
        found: list[bytes] = []
        waiting = [key]
        while waiting:
            children = self._nodes[waiting.pop()].children
            found += children
            waiting += children
        return found

    def _drop(self, key: bytes) -> int:
        """Remove all objects of a key."""
        node = self._nodes.pop(key)
        if parent := self._nodes.get(node.parent):
            parent.children.discard(key)
        return sum(self._backend.remove(each.name) for each in node.stored)

    def verify(self, *, repair: bool, progress: Progress = no_progress) -> Verified:
        """Read everything; with *repair*, take away what is of no use.

        Of several places every copy is read. What goes on from a sound copy is of use, wherever
        that is.

        Objects of another key look like damaged ones. So an object counts as damaged only where
        something of its chains can be read; all else is foreign, and left alone.
        """
        names = [stored.name for node in self._nodes.values() for stored in node.stored]
        copies = self._read_all(progress)
        sound = {copy.name for copy in copies if copy.is_sound}
        own = {self._tops.get(copy.name.key) for copy in copies if copy.is_own} - {None}
        damaged = [c for c in copies if not c.is_sound and self._tops.get(c.name.key) in own]
        lost = {copy.name for copy in damaged} - sound
        gone = {name.key for name in lost if name.kind == "R"}
        reached = self._reached(gone)
        left = [n for n in names if self._tops[n.key] in own and n.key not in reached]
        orphans = [name for name in left if name not in lost]
        if orphans:  # what was being written as the place was listed is whole by now
            reached = Tree(self._backend, self._lookup, self.reader)._reached(gone)
            orphans = [name for name in orphans if name.key not in reached]
        if repair:
            for copy in damaged:
                self._lookup.forget(copy.name)
                copy.place.set_aside(copy.name)
            for name in orphans:
                self._backend.remove(name)
        return Verified(
            len(copies),
            sum(copy.nbytes for copy in copies),
            tuple(map(self._copy_text, damaged)),
            tuple(map(object_text, orphans)),
            repair,
            sum(not copy.is_sound for copy in copies) - len(damaged),
        )

    def _read_all(self, progress: Progress) -> list[_Copy]:
        """Read every copy in every place."""
        listed = [(place, [*place.entries()]) for place in self._places()]
        total = sum(each.nbytes for _, stored in listed for each in stored)
        copies: list[_Copy] = []
        looked_at = 0
        for place, stored in listed:
            reader = self.reader.at(place)
            for each in stored:
                progress(looked_at, total)
                looked_at += each.nbytes
                sound = each.name.kind == "P" or reader.is_sound(each.name)
                own = reader.can_parse(each.name)
                copies.append(_Copy(place, each.name, each.nbytes, sound, own))
        progress(total, total)
        return copies

    def _copy_text(self, copy: _Copy) -> str:
        text = object_text(copy.name)
        return f"{text} in {copy.place.location}" if len(self._places()) > 1 else text

    def _places(self) -> Sequence[Backend]:
        if isinstance(self._backend, Tiers):
            return [tier.backend for tier in self._backend.tiers]
        return [self._backend]

    def _reached(self, gone: set[bytes]) -> set[bytes]:
        """Return the keys whose rows are there, with those of all that they go on from.

        Args:
            gone: Keys whose rows are damaged.
        """
        reached: set[bytes] = set()
        waiting = [key for key, top in self._tops.items() if key == top and self._begins(key)]
        while waiting:
            key = waiting.pop()
            node = self._nodes[key]
            if node.parent == NO_PARENT or (node.named("R") and key not in gone):
                reached.add(key)
                waiting += node.children
        return reached

    def _begins(self, key: bytes) -> bool:
        """Tell whether a key is that of a namespace, or of a first chunk.

        A namespace can lack its description: it is found without, and described when something
        is remembered in it.
        """
        node = self._nodes[key]
        header = self._header(node)
        return node.parent == NO_PARENT or (header is not None and header.root == node.parent)

    def _chain(self, key: bytes) -> list[_Node]:
        """Return the nodes from the first chunk to *key*; empty where one is missing."""
        chain: list[_Node] = []
        while (node := self._nodes.get(key)) is not None:
            if node.parent == NO_PARENT:
                return chain[::-1]
            chain.append(node)
            key = node.parent
        return []

    def _fields(self, root: bytes) -> Mapping[str, str]:
        node = self._nodes.get(root)
        described = node.named("N") if node else None
        if described is None:
            return {}
        try:
            return identity.from_json(self.reader.read(described.name))
        except StateError:
            return {}


def object_text(name: Name) -> str:
    """Return the name of an object as people see it: key and kind."""
    return f"{name.key.hex()}.{name.kind}"
