"""The prefix store: state of token prefixes in pieces, written once and found by their tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from .._io import Progress
from .._io.arguments import checked
from ..errors import ClosedError, UnsupportedError
from . import identity
from .behind import Target, WriteBehind
from .lookup import Lookup, Needs
from .metrics import Stats
from .objects import KINDS, NO_PARENT, Name
from .pieces import Context
from .places.backend import Backend, Place
from .places.encrypted import encrypted
from .places.guard import one_call
from .places.urls import open_places
from .prompt import Media, Prompt, Token
from .reading import Reader
from .recall import Asked, Recaller
from .results import Entry, Match, Recalled, Remembered, Verified, Why
from .tiers import Tiers
from .troubles import Troubles
from .trust import Trust
from .upkeep import Tree
from .writing import Writer

if TYPE_CHECKING:
    from .._io import StrPath


_FOR_EVER: Final = float(1 << 33)  # seconds since 1970


@checked
class PrefixStore:
    """State of token prefixes, which survives the process and costs only what is new.

    A sequence's state is kept in chunks of tokens. Each is written once and found by the tokens
    from the beginning up to its end, so that prompts share what they have in common. What is found
    is verified before llama.cpp sees it. A context manager.

    After construction, trouble of the store itself (a full disk, no permission, damage) is no
    exception: less is found or written, :meth:`stats` counts it, and the log
    ``llama_state.store`` has one warning of each kind. Errors of the caller are raised.

    It can lie in several places, nearest first: what is remembered is written to all of them, and
    what is found further away is kept nearer too, by a thread, after the sequence has it. A place
    that is full, damaged or fails does not keep the others from it. A place lets go of what it
    used least recently, whatever the others have; the furthest should be the largest.

    Args:
        where: A folder, which is made if it is not there; ``"file:///dir?size=50GiB"``;
            ``"memory:?size=2GiB"``; the URL of a server, ``"redis://host"`` or
            ``"s3://bucket/prefix"``; a :class:`Backend` or :class:`Place`; or a list of these.
        capacity_bytes: The most that all files may take together; needed unless *where* has a
            size. Several places have their own, as ``size=``.
        chunk_tokens: Tokens of a chunk; at most as many as the sliding window of the model has.
        key: 16 bytes or more: names and digests are made with it, so that nobody without it can
            find a prompt or forge an object.
        shared_key: The same for the first *shared_tokens*, which others have too.
        shared_tokens: Tokens that every prompt of this store begins with, and that are for
            everybody, say a system prompt: they are kept under *shared_key*, all else under *key*.
            A prompt that begins otherwise is kept under *shared_key* as far as that, too.
        encrypt: Whether objects are encrypted, with keys that are derived from *key*, which is
            needed, and *shared_key*.
        namespace: Keeps prompts apart from those of other namespaces: a tenant, a prompt version.
        durable: Whether what was written is on the disk (fsync) when a method returns.
        readonly: Nothing is written, but what memory keeps nearer that was found in a folder.
        pending_bytes: The most that waits in memory to be written behind; see :meth:`remember`.
        min_gain: Seconds that reading from a server must be faster than decoding, as far as both
            were measured; else a shorter prefix is recalled. None reads whatever it takes.

    Raises:
        ValueError: *where* is no known place, has no capacity, or has its own and
            *capacity_bytes* is given for several; or a key is too short, or of no use without
            another one.
        OSError: The folder cannot be made or used.
        UnsupportedError: The package of the place is not installed, or cryptography, which
            *encrypt* needs.
    """

    def __init__(
        self,
        where: StrPath | Backend | Place | Sequence[StrPath | Backend | Place],
        *,
        capacity_bytes: int | None = None,
        chunk_tokens: int = 256,
        key: bytes | None = None,
        shared_key: bytes | None = None,
        shared_tokens: int = 0,
        encrypt: bool = False,
        namespace: str = "",
        durable: bool = False,
        readonly: bool = False,
        pending_bytes: int = 256 << 20,
        min_gain: float | None = 0.0,
    ) -> None:
        self._trust = Trust(key, shared_key, shared_tokens, encrypted=encrypt)
        places = open_places(where, capacity_bytes, durable=durable, readonly=readonly)
        if encrypt:
            places = [encrypted(place, self._trust) for place in places]
        self._troubles = Troubles(", ".join(place.backend.location for place in places))
        first = places[0].backend
        nearest = Lookup(first, self._trust)
        self._backend = Tiers(places, self._troubles, Reader(first, nearest), readonly=readonly)
        self._lookup = nearest.at(self._backend)
        self._reader = Reader(self._backend, self._lookup)
        self._behind = WriteBehind(self._backend, self._troubles, pending_bytes)
        # What is copied from place to place waits by itself: nothing waits for a slow one.
        self._between = WriteBehind(self._backend, self._troubles, pending_bytes)
        self._recaller = Recaller(
            self._backend,
            self._lookup,
            self._reader,
            self._troubles,
            self._between.afterwards,
            min_gain,
        )
        self._writer = Writer(self._backend, self._lookup, chunk_tokens)
        self._chunk_tokens = chunk_tokens
        self._namespace = namespace
        self._closed = False

    def __repr__(self) -> str:
        return f"<PrefixStore at {self._backend.location}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits to be written, and use the store no more. Safe to call again."""
        self._closed = True
        self._behind.settle()
        self._between.settle()

    # -- what a generation uses

    def find(self, ctx: Context, tokens: Iterable[Token], seq_id: int = 0) -> Match:
        """Return what :meth:`recall` would find; no state is read.

        Args:
            ctx: The context.
            tokens: The prompt.
            seq_id: A sequence that can be used where a context without any state does not show
                how its caches are laid out: a token is decoded into it and removed, once.

        Raises:
            TypeError, ValueError: *tokens* are no tokens.
            UnsupportedError: It is not known what the context computes with; the error says what
                to declare.
            ClosedError: Context or store was closed.
        """
        with self._asked(ctx, tokens, seq_id) as asked:
            match = Match(0, 0, Why("failed", detail="it could not be read"))
            with self._served(asked), self._troubles.tolerated("find"):
                match = self._recaller.match(asked)
        return match

    def recall(self, ctx: Context, tokens: Iterable[Token], seq_id: int = 0) -> Recalled:
        """Put the longest stored prefix of a prompt into a sequence, in place of what it holds.

        The last token is left to be decoded, for its logits. Decode what is behind
        ``Recalled.tokens``: that gives the same as decoding all of them. What the sequence holds
        already of the prompt, as far as that is known, is not read again.

        Args:
            ctx: The context.
            tokens: The prompt.
            seq_id: The sequence.

        Returns:
            What the sequence holds now; nothing at all where nothing helps.

        Raises:
            TypeError, ValueError: *tokens* are no tokens.
            SequenceIdError: The context has no such sequence.
            UnsupportedError: It is not known what the context computes with; the error says what
                to declare.
            ClosedError: Context or store was closed.
        """
        with self._asked(ctx, tokens, seq_id) as asked, self._served(asked):
            return self._recaller.recall(asked, logits=False)[0]

    def remember(
        self, ctx: Context, tokens: Iterable[Token], seq_id: int = 0, *, wait: bool = True
    ) -> Remembered:
        """Write what is not there yet of a sequence.

        Args:
            ctx: The context.
            tokens: What the sequence begins with. Memory that cannot be cut is found again only
                where they are all that it holds.
            seq_id: The sequence.
            wait: False takes a copy, which a thread writes while the context goes on. It can be
                found once it is written. More than may wait (*pending_bytes* of the store) is
                dropped, and counted.

        Returns:
            What is stored of the prompt, or waits to be written.

        Raises:
            TypeError, ValueError: *tokens* are no tokens, or more than the sequence holds, or
                others, as far as it is known which these are.
            SequenceIdError: The context has no such sequence.
            UnsupportedError: It is not known what the context computes with.
            ClosedError: Context or store was closed.
        """
        with self._asked(ctx, tokens, seq_id) as asked:
            n_past = asked.memory.n_past(seq_id)
            if asked.prompt.n_positions > n_past:
                raise ValueError(
                    f"{asked.prompt.n_positions} positions to remember, and sequence {seq_id} "
                    f"holds {n_past}"
                )
            held = asked.memory.tokens(seq_id)
            if held is not None and len(held) == n_past and not asked.prompt.has_media:
                _check_held(held, asked.prompt.ids, seq_id)
            return self._remember(asked, wait=wait)

    def prefill(
        self,
        ctx: Context,
        tokens: Iterable[Token],
        seq_id: int = 0,
        *,
        progress: Progress | None = None,
    ) -> Recalled:
        """Recall a prompt, decode the rest of it, and remember it.

        The logits of the last token are there then. Memory that cannot be cut gets restore points
        on the way.

        Args:
            ctx: The context.
            tokens: The prompt, of one token or more. Media must be in what is recalled.
            seq_id: The sequence.
            progress: Called with the tokens that are there, and all of them, after each chunk
                that was decoded. What it raises stops the call: the sequence holds what was
                decoded until then.

        Returns:
            What :meth:`recall` returned.

        Raises:
            TypeError, ValueError: *tokens* are no tokens, or none.
            SequenceIdError: The context has no such sequence.
            UnsupportedError: It is not known what the context computes with, or media would have
                to be decoded.
            CapacityError, DecodeError: What decoding raises.
            ClosedError: Context or store was closed.
        """
        with self._asked(ctx, tokens, seq_id) as asked:
            prompt = asked.prompt
            if not len(prompt):
                raise ValueError("no tokens: there is nothing to prefill")
            with self._served(asked):
                recalled, found = self._recaller.recall(asked, logits=True)
                done = len(recalled.tokens)
                stops = [len(prompt)]
                with self._troubles.tolerated("look into"):
                    stops = self._writer.stops(asked, found)
            rest = prompt.tokens[done:]
            if any(isinstance(token, Media) for token in rest):
                raise UnsupportedError(
                    "media have to be evaluated by their binding: recall, evaluate, remember"
                )
            for end in filter(done.__lt__, stops):
                self._decode(asked, done, end, progress)
                done = end
                self._remember(asked.shortened(end))
            return recalled

    def _decode(self, asked: Asked, start: int, end: int, progress: Progress | None) -> None:
        """Decode tokens of a prompt: all at once, or chunk by chunk where that is reported."""
        tokens = asked.prompt.tokens
        step = self._chunk_tokens if progress else max(end - start, 1)
        for first in range(start, end, step):
            last = min(first + step, end)
            began = time.monotonic()
            asked.memory.decode(asked.seq_id, Prompt(tokens[first:last]).ids)
            self._recaller.decoded(asked.root, last - first, time.monotonic() - began)
            if progress:
                progress(last, len(tokens))

    # -- looking after it

    def stats(self) -> Stats:
        """Return what the store holds, in each place and in all, and what this object has done."""
        return Stats.of(
            self._backend.location,
            self._backend.tiers,
            self._troubles,
            pending_bytes=self._behind.pending_bytes,
            dropped=self._behind.dropped + self._between.dropped,
            refused=self._writer.refused + self._behind.refused,
        )

    def evict(self, to_bytes: int) -> int:
        """Let go of what was used least recently until *to_bytes* are left, in each place.

        Returns:
            The bytes that are free now, in all places together.
        """
        freed = 0
        with self._troubles.tolerated("evict"):
            freed = self._backend.evict(to_bytes)
        return freed

    def entries(self) -> list[Entry]:
        """Return the stored prompts, the last used first; of a chain only the whole.

        What lies in several places is counted once.
        """
        entries: list[Entry] = []
        with self._troubles.tolerated("entries"):
            entries = list(self._tree().entries())
        return entries

    def verify(self, *, repair: bool = False) -> Verified:
        """Read everything that is stored, every copy in every place.

        Prompts of which nothing can be read, not even what they were stored with, count as those
        of another key: they are left alone.

        Args:
            repair: Set aside what is damaged, and remove what nothing in any place leads to.

        Raises:
            OSError: A place cannot be read.
        """
        return self._tree().verify(repair=repair)

    def pin(
        self, ctx: Context, tokens: Iterable[Token], seq_id: int = 0, *, ttl: float | None = None
    ) -> int:
        """Keep a stored prompt from being evicted, in each place that has it.

        Args:
            ctx: The context that it was stored from, or one like it.
            tokens: The prompt.
            seq_id: As for :meth:`find`.
            ttl: Seconds that the pin holds; None: until it is set anew; 0: no longer.

        Returns:
            The tokens that are pinned: the longest whole chunks that are stored of the prompt.
        """
        until = _FOR_EVER if ttl is None else time.time() + ttl
        with self._asked(ctx, tokens, seq_id) as asked:
            n_tokens = 0
            self._behind.settle()
            with self._served(asked), self._troubles.tolerated("pin"):
                links = self._lookup.walk(asked.root, asked.prompt).links
                if links:
                    last = links[-1].header
                    pin = replace(last.name, kind="P")
                    self._backend.put(pin, [b"pin"])
                    self._backend.touch([pin], until)
                    n_tokens = asked.prompt.index(last.end)
        return n_tokens

    def forget(self, ctx: Context, tokens: Iterable[Token], seq_id: int = 0) -> int:
        """Remove a stored prompt, and what goes on from it; what others begin with stays.

        It is removed from all places.

        Args:
            ctx: The context that it was stored from, or one like it.
            tokens: The prompt.
            seq_id: As for :meth:`find`.

        Returns:
            The bytes that are free now, in all places together.
        """
        freed = 0
        with self._asked(ctx, tokens, seq_id) as asked:
            self._behind.settle()
            with self._served(asked), self._troubles.tolerated("forget"):
                links = self._lookup.walk(asked.root, asked.prompt).links
                if links:
                    freed = self._tree().remove(links[-1].key)
        return freed

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all is written that :meth:`remember` left to be written behind.

        What :meth:`recall` found further away is kept nearer by then, too.

        Args:
            timeout: Seconds to wait; None for as long as it takes.

        Returns:
            Whether all is written that came since the last call: False where the time was not
            enough, or something was dropped or could not be written.
        """
        began = time.monotonic()
        written = self._behind.flush(timeout)
        left = None if timeout is None else max(timeout - (time.monotonic() - began), 0.0)
        return self._between.flush(left) and written

    def _tree(self) -> Tree:
        return Tree(self._backend, self._lookup, self._reader)

    # -- shared by the above

    @contextmanager
    def _asked(self, ctx: Context, tokens: Iterable[Token], seq_id: int) -> Iterator[Asked]:
        if self._closed:
            raise ClosedError("the store was closed")
        prompt = Prompt.of(tokens)
        memory = ctx._prefixes
        with memory.use():  # the only lock: contexts that share a store do not wait for each other
            memory.check_sequence(seq_id)
            geometry = memory.geometry(seq_id)
            fields = identity.identity_fields(memory.fingerprint(), geometry, self._namespace)
            root = self._trust.root(identity.to_json(fields))
            yield Asked(memory, seq_id, prompt, root, fields, Needs.of(memory.traits()))

    @contextmanager
    def _served(self, asked: Asked) -> Iterator[None]:
        """Let places that are far away get ready for what the block looks for.

        All of it has one deadline: nothing is decoded in it.
        """
        with one_call():
            if self._backend.remote:
                size = asked.needs.chunk(self._chunk_tokens)
                keys = self._trust.along(asked.root, asked.prompt, size)
                self._backend.expect([NO_PARENT, *keys])
            yield

    # -- remembering

    def _remember(self, asked: Asked, *, wait: bool = True) -> Remembered:
        written = Remembered(0, 0, 0)
        if not len(asked.prompt) or self._backend.readonly:
            return written
        if wait:
            self._behind.settle()  # nothing is written before what it goes on from
        root, prompt, needs = asked.root, asked.prompt, asked.needs
        target: Target = self._backend if wait else self._behind
        with self._served(asked), self._troubles.tolerated("remember"):
            self._writer.describe(target, root, identity.to_json(asked.fields), NO_PARENT)
            written, chunks = self._writer.write(
                target, asked.memory, asked.seq_id, root, prompt, needs
            )
            self._troubles.count(tokens_remembered=written.new_tokens, bytes_written=written.nbytes)
            self._troubles.done(
                "remember",
                seq_id=asked.seq_id,
                n_tokens=written.n_tokens,
                new_tokens=written.new_tokens,
                nbytes=written.nbytes,
            )
            tidy = partial(self._writer.tidy, root, prompt, needs, chunks)
            if written.new_tokens:
                tidy() if wait else self._behind.afterwards(tidy)
        if self._backend.passes_on:
            self._behind.afterwards(partial(self._pass_on, root, prompt))
        return written

    def _pass_on(self, root: bytes, prompt: Prompt) -> None:
        """Let what is stored of a prompt be copied to the places that are written to later."""
        self._between.afterwards(lambda: self._backend.pass_on(self._names(root, prompt)))

    def _names(self, root: bytes, prompt: Prompt) -> list[Name]:
        """Return all objects of a prompt: what others go on from comes first."""
        found = self._lookup.walk(root, prompt)
        chains = [found.links, *found.points]
        links = {link.key: link for chain in chains for link in chain}
        names = [link.kinds[k] for link in links.values() for k in KINDS if k in link.kinds]
        return [Name(NO_PARENT, root, 0, "N"), *names]


def _check_held(held: tuple[int, ...], tokens: tuple[int, ...], seq_id: int) -> None:
    """Raise ValueError where *tokens* are not those that a sequence begins with."""
    if held[: len(tokens)] != tokens:
        pairs = enumerate(zip(held, tokens, strict=False))
        n, (there, asked) = next(each for each in pairs if each[1][0] != each[1][1])
        raise ValueError(f"token {n} to remember is {asked}, and sequence {seq_id} has {there}")
