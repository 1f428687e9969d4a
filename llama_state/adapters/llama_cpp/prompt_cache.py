"""A prompt cache for ``Llama.set_cache``, on a prefix store."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..._io.arguments import checked
from ..._io.records import logger
from ...errors import ClosedError, StateError, UnsupportedError
from ...store import PrefixStore, Remembered, Stats
from ...store.counting import counting
from .context import LlamaContext
from .llama import LlamaHandle, check_llama

if TYPE_CHECKING:
    from ..._io import StrPath

LOGGER = logger("prompt_cache")

_CAPACITY: Final = 2 << 30


class Stored:
    """Stands for a ``LlamaState`` whose content is in a store: what a ``Llama`` reads of one.

    Attributes:
        input_ids: The tokens, an array.
        n_tokens: How many.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.input_ids = np.fromiter(tokens, np.intc)
        self.n_tokens: int = len(self.input_ids)

    @property
    def scores(self) -> Any:
        """What the ``Llama`` of another cache reads first, before it has changed anything."""
        raise UnsupportedError("this is of the PromptCache of another Llama: each needs its own")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a :class:`PromptCache` has done for its ``Llama``, and its store for all.

    Attributes:
        store: The figures of the store, which others may use too.
        lookups: Prompts that were looked up.
        hits: Those of which the ``Llama`` holds a part since then: stored, or its own.
        as_it_was: Those that it held as a whole, so that nothing was looked for; they are no hits.
        failed: Those that could not be looked up.
        kept: Prompts and answers that were given to the store.
        not_kept: Those that were not, since the ``Llama`` and its cache did not agree.
        forgotten: How often it was emptied because its adapters had changed.
    """

    store: Stats
    lookups: int = 0
    hits: int = 0
    as_it_was: int = 0
    failed: int = 0
    kept: int = 0
    not_kept: int = 0
    forgotten: int = 0


@checked
class PromptCache:
    """Prompts that were evaluated, in a prefix store: ``llm.set_cache(PromptCache(llm))``.

    ``create_completion`` and ``create_chat_completion`` then look for the longest stored prefix
    of a prompt, and leave behind what is new. A lookup puts that prefix into the ``Llama``, in
    place of what it holds, unless that is of as much use; what could not be cut back truthfully
    is emptied. It implements ``llama_cpp.BaseLlamaCache``.

    A prefix is found only under the model, the settings and the adapters that it was evaluated
    with. ``lora_path``, ``lora_scale`` and the adapter that the ``Llama`` owns are read at each
    call; adapters that are set by llama.cpp's own functions must be told to :meth:`declare`.

    It does not keep the ``Llama`` alive, and is for one thread at a time, as a ``Llama`` is. A
    trouble of the store costs time, never an answer.

    Args:
        llm: The ``Llama`` whose cache it becomes; another one needs its own, and can have the
            same *store*.
        store: A :class:`llama_state.PrefixStore`, which stays open; or where one is opened, a
            folder or URL, or a list of these, as it takes them. None: in this process's memory.
        capacity_bytes: The most that a store takes that is opened here; 2 GiB in memory where
            none is given.
        adapters: What :meth:`declare` is to be told at once; None where the ``Llama`` says it.

    Attributes:
        store: The store: what is in it, and what was done with it.

    Raises:
        ClosedError: The ``Llama`` was closed.
        UnsupportedError: It reads images, which tokens do not distinguish; or it is not known
            what it computes with: the error says what.
        ValueError: A folder has no capacity, or a store is given one.
        OSError: The folder cannot be made or used.
    """

    def __init__(
        self,
        llm: Any,
        store: PrefixStore | StrPath | Sequence[StrPath] | None = None,
        *,
        capacity_bytes: int | None = None,
        adapters: Sequence[tuple[StrPath, float]] | None = None,
    ) -> None:
        check_llama(llm)
        if hasattr(getattr(llm, "chat_handler", None), "clip_model_path"):
            raise UnsupportedError("a prompt with images is not known by its tokens: no cache")
        self._llm: Callable[[], Any] = weakref.ref(llm)
        self._ctx = LlamaContext.of(LlamaHandle(self._llm))
        if adapters is not None:
            self._ctx.declare(adapters=adapters)
        self._counts: Counter[str] = Counter()
        # The adapters that what the Llama holds was evaluated with.
        self._scope = self._scope_now()
        self._owns = not isinstance(store, PrefixStore)
        self.store: PrefixStore = _opened(store, capacity_bytes)
        self.store.find(self._ctx, ())  # raises where the store could not be used with it
        sys.modules["llama_cpp.llama_cache"].BaseLlamaCache.register(type(self))
        _take_over(llm)

    def __repr__(self) -> str:
        return f"<PromptCache on {self.store!r}, {self.cache_size} of {self.capacity_bytes} bytes>"

    @property
    def cache_size(self) -> int:
        """Bytes that the store takes now, everything counted."""
        return self.store.stats().used_bytes

    @property
    def capacity_bytes(self) -> int:
        """The most that it may take."""
        return self.store.stats().capacity_bytes

    def stats(self) -> CacheStats:
        """Return what was done so far, in figures."""
        return CacheStats(self.store.stats(), **self._counts)

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
        self._ctx.declare(adapters=adapters)
        self._follow()

    def detach(self) -> None:
        """Leave the ``Llama`` as it was before, and close the store if it was opened here.

        What is in a folder stays there.
        """
        if self._owns:
            self.store.close()
        llm = self._llm()
        if llm is None:
            return
        if llm.cache is self:
            llm.set_cache(None)
        if not isinstance(llm.cache, PromptCache):
            for name in ("save_state", "load_state"):
                vars(llm).pop(name, None)

    def remember(self) -> Remembered:
        """Keep what the ``Llama`` holds, say after ``llm.eval(system_prompt)``.

        That is how recurrent and hybrid memory, which cannot be cut, shares a prefix.

        Returns:
            What was written of it.

        Raises:
            ClosedError: The ``Llama`` or the store was closed.
            StateError: The ``Llama`` and its cache do not agree, or its adapters were changed
                since the last prompt, and not declared.
        """
        if self._scope_now() != self._scope:
            raise StateError("the adapters were changed since the last prompt: declare them first")
        remembered = self.store.remember(self._ctx, self._ctx.tokens)
        self._count("kept")
        return remembered

    # -- what a Llama calls

    def __contains__(self, key: Sequence[int]) -> bool:
        return self.store.find(self._ctx, key).n_tokens > 0

    def __getitem__(self, key: Sequence[int]) -> Stored:
        """Put the longest stored prefix of the prompt *key* into the ``Llama``.

        Returns:
            What the ``Llama`` holds now of the prompt: it need not load it, but it may.

        Raises:
            KeyError: Nothing; it says why.
        """
        prompt = tuple(key)
        self._count("lookups")
        self._follow()
        if self._listed() == prompt and not getattr(self._llm(), "_requires_eval", True):
            self._count("as_it_was")
            return Stored(prompt)  # it can sample as it is
        try:
            recalled = self.store.recall(self._ctx, prompt)
        except ClosedError:
            raise
        except StateError as error:
            self._count("failed")
            LOGGER.warning("no prompt can be looked up", exc_info=True)
            self._ctx.clear()  # it would be cut back, even where that is not possible
            raise KeyError(str(error)) from error
        if not recalled.n_past:
            raise KeyError(str(recalled.why))
        self._count("hits")
        return Stored(self._listed())

    def __setitem__(self, key: Sequence[int], value: Any) -> None:
        """Keep what the ``Llama`` holds, of which *value* is the state.

        It is kept for its own tokens: *key* has one more, sampled and not decoded.

        Raises:
            UnsupportedError: It is not of the ``Llama`` that this cache was made for.
        """
        if tuple(value.input_ids[: value.n_tokens].tolist()) != self._listed():
            raise UnsupportedError(
                "the Llama of this PromptCache does not hold this state: each needs its own"
            )
        try:
            self.remember()
        except ClosedError:
            raise
        except StateError:
            self._count("not_kept")
            LOGGER.warning("this prompt is not cached", exc_info=True)

    def _load(self, stored: Stored) -> None:
        """Put what a lookup gave into the ``Llama`` again; what is gone is evaluated anew."""
        # Of a prompt the last token would be left to decode.
        self.store.recall(self._ctx, (*stored.input_ids.tolist(), 0))

    def _count(self, what: str) -> None:
        with counting():
            self._counts[what] += 1

    # -- which tokens, which adapters

    def _listed(self) -> tuple[int, ...]:
        llm = self._llm()
        return tuple(llm.input_ids[: llm.n_tokens].tolist()) if llm is not None else ()

    def _scope_now(self) -> str:
        with self._ctx._handle.use():
            return self._ctx._identity.adapters_key()

    def _follow(self) -> None:
        """Forget what the ``Llama`` holds if it was evaluated with other adapters."""
        scope = self._scope_now()
        if scope != self._scope:
            self._count("forgotten")
            self._ctx.clear()
            self._scope = scope


def _opened(
    store: PrefixStore | StrPath | Sequence[StrPath] | None, capacity_bytes: int | None
) -> PrefixStore:
    if isinstance(store, PrefixStore):
        if capacity_bytes is not None:
            raise ValueError("capacity_bytes is that of the store: give it to the store")
        return store
    if isinstance(store, Sequence) and not store:
        raise ValueError("store names no place: give a path, a URL, or nothing for memory")
    if store is None:
        store, capacity_bytes = "memory:", _CAPACITY if capacity_bytes is None else capacity_bytes
    return PrefixStore(store, capacity_bytes=capacity_bytes)


def _take_over(llm: Any) -> None:
    """Let a completion of *llm* save without a copy, and load what its ``PromptCache`` gave."""
    owner: Callable[[], Any] = weakref.ref(llm)
    kind = type(llm)
    completion = sys.modules["llama_cpp"].Llama._create_completion.__code__

    def save_state() -> Any:
        # Whoever else calls it wants the state itself; taking that for a completion costs time.
        by_completion = sys._getframe(1).f_code is completion
        llm = owner()
        cache = _cache_of(llm) if by_completion else None
        return kind.save_state(llm) if cache is None else Stored(cache._listed())

    def load_state(state: Any) -> None:
        llm = owner()
        cache = _cache_of(llm) if isinstance(state, Stored) else None
        if cache is None:
            kind.load_state(llm, state)
        else:
            cache._load(state)

    llm.save_state, llm.load_state = save_state, load_state


def _cache_of(llm: Any) -> PromptCache | None:
    """Return the ``PromptCache`` that *llm* has, if it is its own."""
    cache = llm.cache
    return cache if isinstance(cache, PromptCache) and cache._llm() is llm else None
