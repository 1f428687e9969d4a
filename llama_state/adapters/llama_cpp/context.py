"""The whole API on the context of a ``llama_cpp.Llama``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..._io.arguments import checked
from ..._llama import calls
from ..._llama.facts import context_facts
from ..._llama.library import Library
from ...context.context import NO_OPTIONS, Context
from ...context.state import Restored
from ...layout import token_array
from .keeper import LlamaKeeper
from .llama import LlamaHandle, new_llama_state, origin_of

if TYPE_CHECKING:
    from ..._io import Buffer


@checked
class LlamaContext(Context):
    """The context of a ``llama_cpp.Llama``, with the whole API of :class:`llama_state.Context`.

    Made by :func:`llama_state.attach`. Whatever is changed here in sequence 0, the one that the
    ``Llama`` uses, its ``n_tokens`` and ``input_ids`` say so, and it decodes before it samples.
    What it has cut lazily (``reset()``) is cut here at once. The ``Llama`` is kept alive and its
    context never freed; after ``Llama.close()`` every call is a ClosedError.

    What comes into sequence 0 comes with its *tokens*: those that are given, or those of the
    file or checkpoint. Not given, or not as many as there are positions, they are a
    MismatchError. A state that does not begin at position 0, a part that is not the end of the
    sequence, and more tokens than the ``Llama`` has room for are refused too. Nothing was
    changed then.

    Args:
        llm: The ``Llama``.
        library: The library that it must be of; None for whichever it is.

    Raises:
        ClosedError: The ``Llama`` was closed.
        StateError: It is of another *library*.
    """

    def __init__(self, llm: Any, library: Library | None = None) -> None:
        self._bind(LlamaHandle(lambda: llm, library))

    @classmethod
    def of(cls, handle: LlamaHandle) -> LlamaContext:
        """Return one that keeps the ``Llama`` alive no more than *handle* does."""
        ctx = cls.__new__(cls)
        ctx._bind(handle)
        return ctx

    def _bind(self, handle: LlamaHandle) -> None:
        with handle.use() as call:
            facts = context_facts(call, NO_OPTIONS)
        self._keeper = LlamaKeeper(handle, facts)
        super().__init__(handle, origin=origin_of(handle), keeper=self._keeper)
        self._llama = handle

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of sequence 0, as the ``Llama`` lists them: those that :meth:`restore` wants.

        Raises:
            StateError: The ``Llama`` and the cache do not agree: the cache was changed by other
                means, or it holds images.
        """
        with self._handle.use() as call:
            return self._keeper.known_tokens(call, 0) or ()

    @property
    def rewind_min(self) -> int:
        """The smallest number of tokens to which the ``Llama`` can truthfully be cut back now.

        0 for a plain KV cache, all of them for recurrent and hybrid memory: a prompt that
        differs before is evaluated anew.
        """
        with self._handle.use() as call:
            return self._state.rewind_min(calls.positions(call, 0))

    def restore_llama_state(self, state: Any) -> Restored:
        """Restore what ``Llama.save_state()`` gave, as ``Llama.load_state`` would, verified.

        Args:
            state: A ``llama_cpp.LlamaState``; its ``scores`` are not needed.

        Raises:
            StateError: As :meth:`restore`. Nothing was changed.
        """
        if not hasattr(state, "llama_state"):
            raise TypeError(f"state must be a llama_cpp.LlamaState, not {type(state).__name__}")
        with self._handle.use():
            tokens = state.input_ids[: state.n_tokens].tolist()
            restored = self.restore(state.llama_state, tokens=tokens)
            self._llama.llm.set_seed(state.seed)
        return restored

    def to_llama_state(self, blob: Buffer, tokens: Iterable[int]) -> Any:
        """Return a ``llama_cpp.LlamaState`` that ``Llama.load_state`` takes.

        Args:
            blob: What :meth:`snapshot` gave.
            tokens: What :attr:`tokens` was then.

        Returns:
            The object, with empty ``scores`` and the seed of this ``Llama``.

        Raises:
            CapacityError: The ``Llama`` has no room for the tokens.
            FormatError: A token has more than 32 bits.
        """
        ids = tuple(token_array(tokens))
        self._keeper.check_room(len(ids))
        return new_llama_state(self._llama.llm, bytes(blob), ids)
