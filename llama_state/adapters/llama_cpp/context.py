"""The whole API on the context of a ``llama_cpp.Llama``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..._io import Progress, StrPath
from ..._llama import calls
from ..._llama.library import Library
from ...checkpoint.checkpoint import Checkpoint
from ...context import engine
from ...context.context import Context
from ...context.device import DeviceSnapshot
from ...context.state import Admit, Restored
from ...errors import Difference, MismatchError, StateError, UnsupportedError
from .device import LlamaDeviceSnapshot
from .llama import Ledger, LlamaHandle, new_llama_state, origin_of

if TYPE_CHECKING:
    from ... import layout
    from ..._io import Buffer


class LlamaContext(Context):
    """The context of a ``llama_cpp.Llama``, with the whole API of :class:`llama_state.Context`.

    Made by :func:`llama_state.attach`. Whatever is changed here in sequence 0, the one that the
    ``Llama`` uses, its ``n_tokens`` and ``input_ids`` say so, and it decodes before it samples.
    What it has cut lazily (``reset()``) is cut here at once. The ``Llama`` is kept alive and its
    context never freed; after ``Llama.close()`` every call is a ClosedError.

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
        """One that keeps the ``Llama`` alive no more than *handle* does."""
        ctx = cls.__new__(cls)
        ctx._bind(handle)
        return ctx

    def _bind(self, handle: LlamaHandle) -> None:
        super().__init__(handle, origin=origin_of(handle.llm))
        self._ledger = Ledger(handle)
        self._llama = handle

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of sequence 0, as the ``Llama`` lists them: those that :meth:`restore` wants.

        Raises:
            StateError: The ``Llama`` and the cache do not agree: somebody else has changed the
                cache, or it holds images.
        """
        with self._handle.use() as call:
            held, tokens = calls.positions(call, 0).last + 1, self._ledger.tokens
        if held != len(tokens):
            raise StateError(
                f"the Llama counts {len(tokens)} tokens and the cache holds {held} positions"
            )
        return tokens

    @property
    def rewind_min(self) -> int:
        """The smallest number of tokens to which the ``Llama`` can truthfully be cut back now.

        0 for a plain KV cache, all of them for recurrent and hybrid memory: a prompt that
        differs before is evaluated anew.
        """
        with self._handle.use() as call:
            return self._state.rewind_min(calls.positions(call, 0))

    # -- decoding and positions

    def decode(self, tokens: Iterable[int], seq_id: int = 0) -> None:
        """As :meth:`llama_state.Context.decode`; the ``Llama`` can go on, and sample, after it.

        Raises:
            CapacityError: Also where the ``Llama`` has no room: its ``n_ctx`` is not rounded up.
        """
        ids = engine.checked_tokens(tokens, self.n_vocab)
        with self._handle.use() as call:
            if seq_id != 0:
                super().decode(ids, seq_id)
                self._ledger.cut(self._llama.llm.n_tokens)
                return
            start = calls.positions(call, 0).last + 1
            self._ledger.check_room(start + len(ids))
            done = False
            try:
                super().decode(ids)
                done = True
            finally:
                if ids:
                    n_past = calls.positions(call, 0).last + 1
                    self._ledger.write(ids[: n_past - start], start=start, logits=done)

    def seq_rm(self, seq_id: int, start: int = 0, end: int | None = None) -> None:
        """As :meth:`llama_state.Context.seq_rm`.

        Raises:
            UnsupportedError: Also for a part of sequence 0 that is not its end: a ``Llama``
                counts its tokens from position 0.
        """
        with self._handle.use() as call:
            n_past = calls.positions(call, 0).last + 1
            if seq_id == 0 and end is not None and max(start, 0) < end < n_past:
                raise UnsupportedError("of the sequence of a Llama only the end can be removed")
            super().seq_rm(seq_id, start, end)
            left = calls.positions(call, 0).last + 1
            if left < n_past:
                self._ledger.cut(left)

    def seq_cp(
        self,
        src: int,
        dest: int,
        start: int = 0,
        end: int | None = None,
        *,
        tokens: Iterable[int] | None = None,
    ) -> None:
        """As :meth:`llama_state.Context.seq_cp`.

        Args:
            src: The sequence to copy.
            dest: The sequence to replace.
            start: First position to copy.
            end: Position after the last one; None for the end of the sequence.
            tokens: Where *dest* is 0: the tokens that are copied.

        Raises:
            MismatchError: Into sequence 0 without its *tokens*, or not as many.
            UnsupportedError: Also for a copy into sequence 0 that does not begin at position 0.
        """
        self._state.check_sequence(src)
        with self._handle.use() as call:
            span = calls.positions(call, src)
            stop = span.last + 1 if end is None else min(end, span.last + 1)
            if dest != 0 or src == 0:
                super().seq_cp(src, dest, start, end)
                return
            if start > 0 and start < stop:
                raise UnsupportedError("a copy into the sequence of a Llama begins at position 0")
            ids = self._known(max(stop, 0), tokens)
            super().seq_cp(src, dest, start, end)
            self._ledger.write(ids)

    def clear(self) -> None:
        """Empty every sequence; the ``Llama`` begins anew."""
        with self._handle.use():
            super().clear()
            self._ledger.cut(0)

    # -- saving

    def save_state(
        self,
        path: StrPath,
        tokens: Iterable[int] | None = None,
        *,
        durable: bool = True,
        progress: Progress | None = None,
        memory_limit: int | None = None,
    ) -> int:
        """As :meth:`llama_state.Context.save_state`; *tokens* not given are those of the ``Llama``.

        Raises:
            StateError: Also where they are not given and not known, see :attr:`tokens`.
        """
        with self._handle.use():
            ids = self.tokens if tokens is None else tokens
            return super().save_state(
                path, ids, durable=durable, progress=progress, memory_limit=memory_limit
            )

    def seq_save_state(
        self,
        path: StrPath,
        seq_id: int = 0,
        tokens: Iterable[int] | None = None,
        *,
        durable: bool = True,
        progress: Progress | None = None,
        memory_limit: int | None = None,
    ) -> int:
        """As :meth:`llama_state.Context.seq_save_state`; *tokens* of sequence 0 that are not
        given are those of the ``Llama``.

        Raises:
            StateError: Also where they are not given and not known, see :attr:`tokens`.
        """
        with self._handle.use():
            own = self.tokens if tokens is None and seq_id == 0 else ()
            ids = own if tokens is None else tokens
            return super().seq_save_state(
                path, seq_id, ids, durable=durable, progress=progress, memory_limit=memory_limit
            )

    def seq_device_snapshot(self, seq_id: int = 0) -> DeviceSnapshot:
        """As :meth:`llama_state.Context.seq_device_snapshot`, with the tokens of the ``Llama``.

        Only the snapshot of sequence 0 can be restored into sequence 0.
        """
        return LlamaDeviceSnapshot(self, self._state.check_sequence(seq_id))

    def checkpoint(
        self,
        seq_id: int | None = None,
        tokens: Iterable[int] | None = None,
        logits: bool = False,
        meta: Mapping[str, Any] | None = None,
        *,
        out: Buffer | None = None,
    ) -> Checkpoint:
        """As :meth:`llama_state.Context.checkpoint`; *tokens* of the whole context and of
        sequence 0 that are not given are those of the ``Llama``.

        Raises:
            StateError: Also where they are not given and not known, see :attr:`tokens`.
        """
        with self._handle.use():
            own = self.tokens if tokens is None and not seq_id else ()
            ids = own if tokens is None else tokens
            return super().checkpoint(seq_id, ids, logits, meta, out=out)

    # -- restoring

    def restore(
        self, blob: Buffer, *, validate: bool = True, tokens: Iterable[int] | None = None
    ) -> Restored:
        """As :meth:`llama_state.Context.restore`.

        Args:
            blob: Any contiguous buffer of bytes; also the ``llama_state`` of a ``LlamaState``.
            validate: See :meth:`llama_state.Context.restore`.
            tokens: The tokens of its sequence 0, as :attr:`tokens` was when it was taken: a blob
                has none. Not needed where that sequence is empty.

        Raises:
            MismatchError: Also for *tokens* not given, or not as many as sequence 0 holds.
                Nothing was changed.
        """

        def run(admit: Admit) -> Restored:
            return self._state.restore(None, blob, validate=validate, admit=admit)

        return self._replace(None, run, tokens, validate=validate)

    def load_state(
        self,
        path: StrPath,
        *,
        validate: bool = True,
        progress: Progress | None = None,
        memory_limit: int | None = None,
        tokens: Iterable[int] | None = None,
    ) -> Restored:
        """As :meth:`llama_state.Context.load_state`; the ``Llama`` gets the tokens of the file.

        Args:
            path: The file.
            validate: See :meth:`llama_state.Context.restore`.
            progress: See :meth:`llama_state.Context.load_state`.
            memory_limit: See :meth:`llama_state.Context.save_state`.
            tokens: The tokens of its sequence 0, where the file does not list them.

        Raises:
            MismatchError: Also for a token list that is not as long as sequence 0. Nothing was
                changed.
        """

        def run(admit: Admit) -> Restored:
            return self._state.load(
                None,
                path,
                validate=validate,
                progress=progress,
                memory_limit=memory_limit,
                admit=admit,
            )

        return self._replace(None, run, tokens, validate=validate)

    def seq_restore(
        self,
        blob: Buffer,
        dest_seq_id: int = 0,
        *,
        validate: bool = True,
        partial: bool = False,
        tokens: Iterable[int] | None = None,
    ) -> Restored:
        """As :meth:`llama_state.Context.seq_restore`.

        Args:
            blob: Any contiguous buffer of bytes.
            dest_seq_id: The sequence to replace.
            validate: See :meth:`llama_state.Context.restore`.
            partial: See :meth:`llama_state.Context.seq_restore`; the tokens are known then.
            tokens: As in :meth:`restore`, where *dest_seq_id* is 0.

        Raises:
            MismatchError: Also for *tokens* not given, or not as many as the state has
                positions. Nothing was changed.
        """
        seq_id = self._state.check_sequence(dest_seq_id)
        sure = validate or partial

        def run(admit: Admit) -> Restored:
            return self._state.restore(seq_id, blob, validate=sure, partial=partial, admit=admit)

        return self._replace(seq_id, run, tokens, validate=sure, rewind=partial)

    def seq_load_state(
        self,
        path: StrPath,
        dest_seq_id: int = 0,
        *,
        validate: bool = True,
        progress: Progress | None = None,
        memory_limit: int | None = None,
        tokens: Iterable[int] | None = None,
    ) -> Restored:
        """As :meth:`llama_state.Context.seq_load_state`; *tokens*, errors as :meth:`load_state`."""
        seq_id = self._state.check_sequence(dest_seq_id)

        def run(admit: Admit) -> Restored:
            return self._state.load(
                seq_id,
                path,
                validate=validate,
                progress=progress,
                memory_limit=memory_limit,
                admit=admit,
            )

        return self._replace(seq_id, run, tokens, validate=validate)

    def restore_llama_state(self, state: Any) -> Restored:
        """Restore what ``Llama.save_state()`` gave, as ``Llama.load_state`` would, verified.

        Args:
            state: A ``llama_cpp.LlamaState``; its ``scores`` are not needed.

        Raises:
            StateError: As :meth:`restore`. Nothing was changed.
        """
        with self._handle.use():
            tokens = state.input_ids[: state.n_tokens].tolist()
            restored = self.restore(state.llama_state, tokens=tokens)
            self._llama.llm.set_seed(state.seed)
        return restored

    def to_llama_state(self, blob: Buffer, tokens: Iterable[int]) -> Any:
        """A ``llama_cpp.LlamaState`` that ``Llama.load_state`` takes.

        Args:
            blob: What :meth:`snapshot` gave.
            tokens: What :attr:`tokens` was then.

        Returns:
            The object, with empty ``scores`` and the seed of this ``Llama``.

        Raises:
            CapacityError: The ``Llama`` has no room for the tokens.
        """
        ids = tuple(tokens)
        self._ledger.check_room(len(ids))
        return new_llama_state(self._llama.llm, bytes(blob), ids)

    # -- shared by the above

    def _put_checkpoint(self, scope: int | None, checkpoint: Checkpoint) -> Restored:
        if scope is None:
            return self.restore(checkpoint.payload, tokens=checkpoint.tokens)
        return self.seq_restore(checkpoint.payload, scope, tokens=checkpoint.tokens)

    def _undoing(self, scopes: Sequence[int | None]) -> Callable[[], None]:
        undo, before = super()._undoing(scopes), self._ledger.tokens
        concerned = None in scopes or 0 in scopes

        def undo_and_tell() -> None:
            try:
                undo()
            finally:
                held = before if concerned else self._ledger.tokens
                with self._handle.use() as call:
                    self._ledger.write(held[: calls.positions(call, 0).last + 1])

        return undo_and_tell

    def _replace(
        self,
        scope: int | None,
        run: Callable[[Admit], Restored],
        tokens: Iterable[int] | None,
        *,
        validate: bool,
        rewind: bool = False,
    ) -> Restored:
        """Restore with *run*, which gets the check of the tokens, and tell the ``Llama``."""
        if scope not in (None, 0):
            return run(lambda parsed, listed: None)
        given = None if tokens is None else tuple(tokens)
        ids: tuple[int, ...] | None = None

        def admit(parsed: layout.Layout | None, listed: tuple[int, ...]) -> None:
            nonlocal ids
            first, n_past = _span(parsed, scope, default=len(given or listed))
            if first > 0 and not (self._facts.n_swa or self._facts.recurrent):
                raise MismatchError([Difference("first position of sequence 0", first, 0)])
            own = self._ledger.tokens[:n_past] if rewind else None
            ids = self._known(n_past, given or listed or own)

        with self._handle.use() as call:
            try:
                if validate:
                    restored = run(admit)
                else:
                    # What only llama.cpp can read is known when it is there.
                    with super().savepoint():
                        restored = run(admit)
                        self._known(calls.positions(call, 0).last + 1, ids)
            except BaseException:
                if ids is not None:
                    self._ledger.cut(calls.positions(call, 0).last + 1)
                raise
            self._ledger.write(ids or ())
            return restored

    def _known(self, n_past: int, tokens: Iterable[int] | None) -> tuple[int, ...]:
        """*tokens*, if they are those of *n_past* positions.

        Raises:
            MismatchError: They are not as many, or None.
            CapacityError: The ``Llama`` has no room for them.
        """
        self._ledger.check_room(n_past)
        ids = tuple(engine.checked_tokens(() if tokens is None else tokens, self.n_vocab))
        if len(ids) != n_past:
            given = "none given: pass tokens=" if tokens is None else f"{len(ids)} given"
            raise MismatchError([Difference("tokens of sequence 0", n_past, given)])
        return ids


def _span(parsed: layout.Layout | None, scope: int | None, default: int) -> tuple[int, int]:
    """First position of what comes into sequence 0, and the one after its last."""
    if parsed is None:
        return 0, default
    spans = parsed.spans
    low, high = spans.get(0, (-1, -1)) if scope is None else next(iter(spans.values()), (-1, -1))
    return max(low, 0), high + 1
