"""Look after a place: what is in it, whether it is sound, what may go."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .._io import Progress
from .._io.progress import no_progress
from ..errors import StateError
from . import identity
from .backend import Backend, Stored
from .lookup import DamagedError, Lookup
from .objects import KINDS, NO_PARENT, Header, Name, sealer
from .prompt import Keys, ids_of
from .reading import Reader
from .results import Entry, StoredChunk, Verified


@dataclass(slots=True)
class _Node:
    """All objects of one key, and the keys that go on from it."""

    stored: list[Stored] = field(default_factory=list)
    children: set[bytes] = field(default_factory=set)

    @property
    def parent(self) -> bytes:
        return self.stored[0].name.parent

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.stored)

    def is_pinned(self, now: float) -> bool:
        """Tell whether a pin holds it."""
        pin = self.named("P")
        return pin is not None and pin.used > now

    def named(self, kind: str) -> Stored | None:
        return next((each for each in self.stored if each.name.kind == kind), None)


class Tree:
    """All chains of a place, as they are now.

    Args:
        backend: The place.
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
        for key, node in self._nodes.items():
            if parent := self._nodes.get(node.parent):
                parent.children.add(key)
        self._tops = self._found_tops()
        # Names can say what they want: those that go round in a circle are of no chain.
        self._nodes = {key: self._nodes[key] for key in self._tops}

    @classmethod
    def of(cls, backend: Backend, secret: bytes | None) -> Tree:
        """Return the chains of a place whose objects were made with *secret*, or with none.

        Raises:
            UnsupportedError: xxhash is not installed, which a store without a key needs.
            StateError: There are prompts, and none can be read with that key.
        """
        seal = sealer(secret)
        lookup = Lookup(backend, Keys(secret), seal, keyed=secret is not None)
        tree = cls(backend, lookup, Reader(backend, lookup, seal))
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

        What it goes on from stays where it is pinned.
        """
        if key not in self._nodes:
            return 0  # another process was faster
        freed = sum(map(self._drop, reversed(self._below(key))))
        parent = self._nodes[key].parent
        freed += self._drop(key)
        while (node := self._nodes.get(parent)) is not None:
            if node.children or node.parent == NO_PARENT or node.is_pinned(time.time()):
                break
            parent, key = node.parent, parent
            freed += self._drop(key)
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

        Objects of another key look like damaged ones. So an object counts as damaged only where
        something of its chains can be read; all else is foreign, and left alone.
        """
        listed = [stored for node in self._nodes.values() for stored in node.stored]
        total = sum(stored.nbytes for stored in listed)
        unsound: list[Name] = []
        looked_at = 0
        for stored in listed:
            progress(looked_at, total)
            looked_at += stored.nbytes
            if stored.name.kind != "P" and not self._is_sound(stored.name):
                unsound.append(stored.name)
        progress(total, total)
        names = [stored.name for stored in listed]
        own = {self._tops[name.key] for name in names if self._lookup.header(name)}
        damaged = [name for name in unsound if self._tops[name.key] in own]
        gone = {name.key for name in damaged if name.kind == "R"}
        reached = self._reached(gone)
        left = [n for n in names if self._tops[n.key] in own and n.key not in reached]
        orphans = [name for name in left if name not in damaged]
        if orphans:  # what was being written as the place was listed is whole by now
            reached = Tree(self._backend, self._lookup, self.reader)._reached(gone)
            orphans = [name for name in orphans if name.key not in reached]
        if repair:
            for name in damaged:
                self._lookup.forget(name)
                self._backend.set_aside(name)
            for name in orphans:
                self._backend.remove(name)
        return Verified(
            len(listed),
            total,
            tuple(map(object_text, damaged)),
            tuple(map(object_text, orphans)),
            repair,
            len(unsound) - len(damaged),
        )

    def _is_sound(self, name: Name) -> bool:
        try:
            self.reader.read(name)
        except DamagedError as error:
            if error.cause is not None:
                raise error.cause from error
            return error.gone  # it was evicted meanwhile
        return True

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
