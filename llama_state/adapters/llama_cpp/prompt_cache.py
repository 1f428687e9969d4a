"""A prompt cache for ``Llama.set_cache``: whole states in memory, verified, counted, not copied."""

from __future__ import annotations

import hashlib
import logging
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..._io.arguments import checked
from ...errors import CapacityError, ClosedError, StateError, UnsupportedError
from . import prefixes
from .context import LlamaContext
from .llama import LlamaHandle, check_llama, new_llama_state

if TYPE_CHECKING:
    from ..._io import Buffer, StrPath

LOGGER = logging.getLogger("llama_state.prompt_cache")

# A key is a digest of the adapters, then the tokens: the states of others are never found.
_SCOPE = 16
# What an entry costs beside its state and its tokens: objects, and their places in three tables.
OVERHEAD = 1024
_NOT_KEPT = -1


@runtime_checkable
class BlobStore(Protocol):
    """Where a :class:`PromptCache` keeps the states; it decides itself what stays."""

    def get(self, key: bytes) -> Buffer | None:
        """Return the state of *key*; None where it is gone."""

    def put(self, key: bytes, value: bytes) -> None:
        """Keep *value*; a later one of the same key takes its place."""

    def delete(self, key: bytes) -> None:
        """Forget it; nothing happens where it is gone."""


class Memory(dict[bytes, bytes]):
    """The store of a cache that was given none."""

    def put(self, key: bytes, value: bytes) -> None:
        """Keep *value*."""
        self[key] = value

    def delete(self, key: bytes) -> None:
        """Forget it."""
        self.pop(key, None)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a state without looking at it.

    Attributes:
        nbytes: What it costs, all in all.
        rewind_min: Tokens to which it can be cut back.
    """

    nbytes: int
    rewind_min: int


class _Made(NamedTuple):
    """What :meth:`PromptCache.__setitem__` must know of a state that the ``Llama`` saved."""

    scope: bytes
    rewind_min: int


class Hit:
    """What a lookup gives to a ``Llama``: the attributes of a ``LlamaState`` that it reads.

    Attributes:
        input_ids: The tokens, an array.
        n_tokens: How many.
        llama_state: The state.
        llama_state_size: Its bytes.
    """

    def __init__(self, key: bytes, blob: Buffer) -> None:
        self.key = key
        self.input_ids = np.frombuffer(key[_SCOPE:], ">u4").astype(np.intc)
        self.n_tokens = len(self.input_ids)
        self.llama_state = blob
        self.llama_state_size = memoryview(blob).nbytes


@checked
class PromptCache:
    """Prompts that were evaluated, in memory: ``llm.set_cache(PromptCache(llm))``.

    ``create_completion`` and ``create_chat_completion`` then look here for the state that spares
    most of a prompt, and leave one behind. Tokens are compared one by one; a state that would
    have to be cut where its memory cannot be cut is no hit, and neither is one that spares no
    more than what the ``Llama`` holds already. A hit stays. One state is kept for each list of
    tokens; the least recently used go first. It implements ``llama_cpp.BaseLlamaCache``.

    A state is found only under the adapters that it was evaluated with. ``lora_path``,
    ``lora_scale`` and the adapter that the ``Llama`` owns are read at each call; adapters that
    are set by llama.cpp's own functions must be told to :meth:`declare`.

    While it is the cache of the ``Llama``, ``llm.save_state()`` takes one copy out of llama.cpp
    and has no ``scores``; :meth:`detach` ends that too. It does not keep the ``Llama`` alive, and
    is for one thread at a time, as a ``Llama`` is.

    Args:
        llm: The ``Llama`` whose cache it becomes; another one needs its own.
        capacity_bytes: The most that is kept: states, tokens and what surrounds them. A state
            that is larger is not kept.
        store: Where the states are kept; None for this process's memory.

    Attributes:
        capacity_bytes: As given.

    Raises:
        ClosedError: The ``Llama`` was closed.
        UnsupportedError: It reads images: tokens do not distinguish them.
    """

    def __init__(
        self, llm: Any, capacity_bytes: int = 2 << 30, *, store: BlobStore | None = None
    ) -> None:
        check_llama(llm)
        if hasattr(getattr(llm, "chat_handler", None), "clip_model_path"):
            raise UnsupportedError("a prompt with images is not known by its tokens: no cache")
        self.capacity_bytes = capacity_bytes
        self._llm: Callable[[], Any] = weakref.ref(llm)
        self._ctx = LlamaContext.of(LlamaHandle(self._llm))
        self._store: BlobStore = Memory() if store is None else store
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._prefixes = prefixes.Prefixes()
        # The adapters that what the Llama holds was evaluated with.
        self._scope = self._scope_now()
        # The states that save_state() made, with what an entry needs to know.
        self._made: weakref.WeakKeyDictionary[Any, _Made] = weakref.WeakKeyDictionary()
        sys.modules["llama_cpp.llama_cache"].BaseLlamaCache.register(type(self))
        _take_over(llm)

    def __repr__(self) -> str:
        return (
            f"<PromptCache of {len(self._entries)} prompts, {self.cache_size} of "
            f"{self.capacity_bytes} bytes>"
        )

    @property
    def cache_size(self) -> int:
        """Bytes that are kept now, everything counted."""
        return sum(entry.nbytes for entry in self._entries.values())

    def prompts(self) -> list[tuple[int, ...]]:
        """Return the token lists that a state is kept for, the least recently used first."""
        return [prefixes.unpack(key[_SCOPE:]) for key in self._entries]

    def declare(self, *, adapters: Sequence[tuple[StrPath, float]]) -> None:
        """Say which adapters the ``Llama`` uses from now on, where that cannot be read.

        Call it after they were set and before anything is evaluated with them: what the ``Llama``
        holds is forgotten if they are others than before. Prompts that were kept under others
        stay, and are found again once these are declared.

        Args:
            adapters: (GGUF file, scale) of every LoRA adapter and control vector in use; none
                at all is ``[]``.

        Raises:
            OSError: An adapter's file cannot be read.
            FormatError: It is no GGUF file, or damaged.
            ClosedError: The ``Llama`` was closed.
        """
        with self._ctx._handle.use():
            self._ctx.declare(adapters=adapters)
            self._follow()

    def detach(self) -> None:
        """Forget everything and leave the ``Llama`` as it was before; it has no cache then."""
        for key in list(self._entries):
            self._drop(key)
        llm = self._llm()
        if llm is None:
            return
        if llm.cache is self:
            llm.set_cache(None)
        if not isinstance(llm.cache, PromptCache):
            for name in ("save_state", "load_state"):
                vars(llm).pop(name, None)

    def remember(self) -> None:
        """Keep the state that the ``Llama`` is in, say after ``llm.eval(system_prompt)``.

        That is how recurrent and hybrid memory, which cannot be cut, shares a prefix.

        Raises:
            CapacityError: The state is larger than ``capacity_bytes``.
            ClosedError: The ``Llama`` was closed.
            StateError: The ``Llama`` and its cache do not agree, or its adapters were changed
                since the last prompt, and not declared.
        """
        with self._ctx._handle.use():
            key = self._scope + prefixes.pack(self._ctx.tokens)
            blob, rewind_min = self._take()
        if not self._put(key, blob, rewind_min):
            raise CapacityError("a prompt, in bytes", need=len(blob), have=self.capacity_bytes)

    # -- what a Llama calls

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._find(self._scope_now() + prefixes.pack(key), 0) is not None

    def __getitem__(self, key: Sequence[int]) -> Hit:
        """Return the state that spares most of the prompt *key*.

        What the ``Llama`` holds but cannot be cut back to where *key* differs is forgotten
        here: a ``Llama`` would begin anew, or cut a sliding window where it may not be cut.

        Raises:
            KeyError: None spares more than what the ``Llama`` holds.
        """
        prompt = prefixes.pack(key)
        least = self._live(prompt)
        found = self._find(self._scope + prompt, least)
        blob = None if found is None else self._store.get(found)
        if found is None:
            raise KeyError("no state begins as this prompt does")
        if blob is None:
            self._drop(found)
            raise KeyError("the state is gone from the store")
        self._entries.move_to_end(found)
        return Hit(found, blob)

    def __setitem__(self, key: Sequence[int], value: Any) -> None:
        """Keep *value*, which ``save_state()`` of the ``Llama`` has just given.

        It is kept for its own tokens: *key* has one more, sampled and not decoded.

        Raises:
            UnsupportedError: It is not of the ``Llama`` that this cache was made for.
        """
        made = self._made.get(value)
        if made is None:
            raise UnsupportedError(
                "this state was not saved by the Llama of this PromptCache: each needs its own"
            )
        if made.rewind_min != _NOT_KEPT and value.n_tokens:
            key = made.scope + prefixes.pack(value.input_ids[: value.n_tokens].tolist())
            self._put(key, value.llama_state, made.rewind_min)

    # -- what a Llama calls in place of its own

    def _serves(self, llm: Any) -> bool:
        return llm is self._llm() and llm.cache is self

    def _save(self, llm: Any) -> Any:
        """Return a ``LlamaState``, which :meth:`__setitem__` will know."""
        try:
            with self._ctx._handle.use():
                tokens, (blob, rewind_min) = self._ctx.tokens, self._take()
                state = new_llama_state(llm, blob, tokens)
        except ClosedError:
            raise
        except StateError:
            LOGGER.warning("this prompt is not cached", exc_info=True)
            state, rewind_min = type(llm).save_state(llm), _NOT_KEPT
        self._made[state] = _Made(self._scope, rewind_min)
        return state

    def _load(self, hit: Hit) -> None:
        """Restore what a lookup gave; where that fails the ``Llama`` begins anew."""
        try:
            self._ctx.restore(hit.llama_state, tokens=hit.input_ids.tolist())
        except ClosedError:
            raise
        except StateError:
            LOGGER.warning("a cached prompt could not be restored", exc_info=True)
            self._drop(hit.key)
            self._ctx.clear()

    # -- keeping

    def _take(self) -> tuple[bytes, int]:
        """Return the state of now, for which room is made first, and how far it can be cut back."""
        if self._scope_now() != self._scope:
            raise StateError("the adapters were changed since the last prompt: declare them first")
        key = self._scope + prefixes.pack(self._ctx.tokens)
        entry = self._entries.get(key)
        kept = self._store.get(key) if entry else None
        if entry and kept is not None:
            return bytes(kept), entry.rewind_min
        self._make_room(self._cost(self._ctx.state_size(), len(key)))
        return self._ctx.snapshot(), self._ctx.rewind_min

    def _put(self, key: bytes, blob: bytes, rewind_min: int) -> bool:
        """Keep a state in place of the one of the same tokens; False where it never fits."""
        self._drop(key)
        nbytes = self._cost(len(blob), len(key))
        if not self._make_room(nbytes):
            LOGGER.warning("a prompt of %d bytes is over capacity_bytes: not cached", nbytes)
            return False
        try:
            self._store.put(key, blob)
            self._entries[key] = Entry(nbytes, rewind_min)
            self._prefixes.add(key)
        except BaseException:
            self._drop(key)
            raise
        return True

    def _cost(self, n_blob: int, n_key: int) -> int:
        return n_blob + n_key + OVERHEAD

    def _make_room(self, nbytes: int) -> bool:
        """Let go of the least recently used until *nbytes* fit; False where they never will."""
        if nbytes > self.capacity_bytes:
            return False
        while self.cache_size + nbytes > self.capacity_bytes:
            self._drop(next(iter(self._entries)))
        return True

    def _drop(self, key: bytes) -> None:
        try:
            self._forget(key)
        except BaseException:
            self._forget(key)  # it was interrupted: one table of three may still have it
            raise

    def _forget(self, key: bytes) -> None:
        self._prefixes.remove(key)
        self._store.delete(key)
        self._entries.pop(key, None)

    # -- which adapters

    def _scope_now(self) -> bytes:
        with self._ctx._handle.use():
            key = self._ctx._identity.adapters_key()
        return hashlib.sha256(key.encode()).digest()[:_SCOPE]

    def _follow(self) -> None:
        """Forget what the ``Llama`` holds if it was evaluated with other adapters."""
        scope = self._scope_now()
        if scope != self._scope:
            self._ctx.clear()
            self._scope = scope

    # -- finding

    def _find(self, prompt: bytes, least: int) -> bytes | None:
        """Return the key that spares most of *prompt*, itself a key, and more than *least*."""
        best = None
        for key, share in self._prefixes.like(prompt):
            shared, tokens = share - _SCOPE // prefixes.WORD, prompt[_SCOPE:]
            spared = _spared(shared, tokens, self._entries[key].rewind_min)
            if spared > least:
                best, least = key, spared
        return best

    def _live(self, prompt: bytes) -> int:
        """Tokens of *prompt* that what the ``Llama`` holds spares; what is no use is forgotten."""
        with self._ctx._handle.use():
            self._follow()
            try:
                held = prefixes.pack(self._ctx.tokens)
            except StateError:  # it does not agree with its cache
                held = b""
            if held == prompt and not getattr(self._llm(), "_requires_eval", True):
                return len(prompt)  # it can sample as it is
            spared = _spared(prefixes.common(held, prompt), prompt, self._ctx.rewind_min)
            if spared == 0:
                self._ctx.clear()
        return spared


def _take_over(llm: Any) -> None:
    """Let the ``PromptCache`` of *llm* save and load in its place, as long as it has one."""
    owner: Callable[[], Any] = weakref.ref(llm)
    kind = type(llm)

    def save_state() -> Any:
        llm = owner()
        if isinstance(llm.cache, PromptCache) and llm.cache._serves(llm):
            return llm.cache._save(llm)
        return kind.save_state(llm)

    def load_state(state: Any) -> None:
        llm = owner()
        if isinstance(state, Hit) and llm.cache._serves(llm):
            llm.cache._load(state)
        else:
            kind.load_state(llm, state)

    llm.save_state, llm.load_state = save_state, load_state


def _spared(share: int, prompt: bytes, rewind_min: int) -> int:
    """Tokens that need not be evaluated; the last one always is, for its logits."""
    spared = min(share, len(prompt) // prefixes.WORD - 1)
    return spared if spared >= rewind_min else 0
