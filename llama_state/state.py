"""Save and restore over a context handle: checked before, verified after, undone on failure.

llama.cpp clears the destination first and looks at the state then. So a state is parsed and
compared with the context before llama.cpp sees it; what it consumed and the positions that it
reports are compared after. See ``docs/guarantees.md``.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from . import _files, _memory, _refusals, _transfer, layout
from ._facts import Facts
from ._fitting import Fitting, Held
from ._handles import Call, Handle
from ._transfer import Scope
from ._types import StrPath
from .errors import (
    Difference,
    FormatError,
    MismatchError,
    RestoreError,
    SequenceIdError,
    StaleError,
    StateError,
    UnsupportedError,
    VersionError,
)

if TYPE_CHECKING:
    from ._types import Buffer

# The last session version whose whole restore keeps only the last stream of a split context.
_LOSES_STREAMS = 9

# Asked before anything is touched, with the parsed state (None where it was not validated) and
# the token list of the file (empty for blobs); whoever does not want it raises.
Admit: TypeAlias = "Callable[[layout.Layout | None, tuple[int, ...]], None]"


@dataclass(frozen=True, slots=True)
class Span:
    """The positions of one sequence after a restore.

    Attributes:
        pos_min: Smallest position, as llama.cpp reports it.
        pos_max: Largest position.
        rewind_min: Smallest position to which the sequence can truthfully be cut back and
            decoded on: ``pos_min`` for a plain KV cache, ``n_past`` for recurrent and hybrid
            memory, the start of what the window still needs for sliding-window caches.
    """

    pos_min: int
    pos_max: int
    rewind_min: int

    @property
    def n_past(self) -> int:
        """The position at which decoding goes on."""
        return self.pos_max + 1


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore or load brought back.

    No logits are in a state: decode one token before sampling.

    Attributes:
        nbytes: Bytes of the blob, or of the file.
        tokens: The token list of the file; empty for blobs.
        sequences: The non-empty sequences that were restored, by their id in this context.
    """

    nbytes: int
    tokens: tuple[int, ...]
    sequences: Mapping[int, Span]


@dataclass(frozen=True, slots=True, eq=False)
class OnDevice:
    """A sequence whose tensors llama.cpp keeps on the device.

    Attributes:
        seq_id: The sequence that was saved: llama.cpp keeps the last one of each.
        head: The state without its tensors, as llama.cpp wants it back.
        positions: The sequence's positions.
    """

    seq_id: int
    head: bytes
    positions: _memory.Positions


class ContextState:
    """The state of one context.

    A *scope* is a sequence id, or None for the whole context.
    """

    def __init__(self, handle: Handle, facts: Facts) -> None:
        self._handle = handle
        self._facts = facts
        self._library = handle.library
        self._fitting = Fitting(facts, self._read_own)

    def check_sequence(self, seq_id: int) -> int:
        """*seq_id*, if it is one of this context.

        Raises:
            SequenceIdError: It is not; llama.cpp would abort the process.
        """
        if not 0 <= seq_id < self._facts.n_seq_max:
            raise SequenceIdError(seq_id, limit=self._facts.n_seq_max)
        return seq_id

    def size(self, scope: Scope, *, partial: bool = False) -> int:
        """Bytes that a snapshot would have now."""
        flags = self._flags(partial)
        with self._handle.use() as call:
            return _transfer.size(call, scope, flags)

    def snapshot(
        self, scope: Scope, out: Buffer | None = None, *, partial: bool = False
    ) -> bytes | memoryview:
        """The state as bytes, or written to the start of *out*."""
        flags = self._flags(partial)
        with self._handle.use() as call:
            if out is None:
                return _transfer.read(call, scope, flags)
            return _transfer.read_into(call, scope, out, flags)

    def save(self, scope: Scope, path: StrPath, tokens: Iterable[int], *, durable: bool) -> int:
        """Write llama.cpp's own session or sequence file."""
        ids = _token_array(tokens)
        with self._handle.use() as call:
            blob = memoryview(_transfer.read(call, scope))
        payload = blob if scope is None else blob[self._head_size :]
        header = layout.pack_file_header(*self._file_kind(scope), ids)
        return _files.write_file(path, [header, payload], durable=durable)

    def load(
        self, scope: Scope, path: StrPath, *, validate: bool, admit: Admit | None = None
    ) -> Restored:
        """Restore from llama.cpp's own session or sequence file."""
        data = _files.read_file(path)
        header = layout.parse_file_header(data, any_version=True)
        kind, version = self._file_kind(scope)
        if header.kind != kind:
            raise FormatError(f"{path} is a {header.kind} state file, not a {kind} one", offset=0)
        if header.version != version:
            raise VersionError(f"{path}", found=header.version, expected=version, offset=4)
        tokens = tuple(layout.unpack_tokens(data, header))
        payload = data[header.payload_offset :]
        try:
            parsed = self._parse(scope, payload, headed=False) if validate else None
        except FormatError as error:
            raise error.moved(header.payload_offset) from None
        if admit is not None:
            admit(parsed, tokens)
        blob = payload
        if scope is not None and self._head_size:
            # The 8 bytes before the payload are read by now and make room for the blob's head.
            blob = data[header.payload_offset - self._head_size :]
            layout.SEQUENCE_HEAD.pack_into(blob, 0, layout.SEQUENCE_MAGIC, scope)
        with self._handle.use() as call:
            sequences = self._restore(call, scope, blob, parsed)
        return Restored(len(data), tokens, sequences)

    def restore(
        self,
        scope: Scope,
        blob: Buffer,
        *,
        validate: bool,
        partial: bool = False,
        admit: Admit | None = None,
    ) -> Restored:
        """Restore from a blob; see the module's docstring for the order of things."""
        flags = self._flags(partial)
        data = memoryview(blob).cast("B")
        headed = self._is_headed(scope, data)
        parsed = self._parse(scope, data, headed=headed, partial=partial) if validate else None
        native = self._native(scope, data, headed)
        if admit is not None:
            admit(parsed, ())
        with self._handle.use() as call:
            sequences = self._restore(call, scope, native, parsed, flags)
        return Restored(len(data), (), sequences)

    # -- snapshots that stay on the device

    def keep_on_device(self, seq_id: int) -> OnDevice:
        """Let llama.cpp keep the tensors of a sequence; it forgets the ones of before."""
        self._library.require("state-flags")
        if self._library.session_version <= _LOSES_STREAMS:
            raise UnsupportedError(
                "before session version 10 llama.cpp aborts when a snapshot can not be restored "
                "from the device: take seq_snapshot()"
            )
        self._fitting.countable()
        with self._handle.use() as call:
            head = _transfer.read(call, seq_id, _transfer.ON_DEVICE)
            kept = OnDevice(seq_id, head, _memory.positions(call, seq_id))
            self._handle.shared.on_device[seq_id] = kept
            return kept

    def is_on_device(self, kept: OnDevice) -> bool:
        """Whether llama.cpp still has the tensors of *kept*."""
        return not self._handle.closed and self._handle.shared.on_device.get(kept.seq_id) is kept

    def restore_from_device(self, dest: int, kept: OnDevice) -> Restored:
        """Replace *dest* by *kept*.

        llama.cpp aborts when it finds no room, so it is asked only where there is some.
        """
        with self._handle.use() as call:
            if not self.is_on_device(kept):
                raise StaleError(f"a later snapshot of sequence {kept.seq_id} replaced this one")
            before = _memory.occupied(call, self._facts.n_seq_max)
            self._fitting.check_room(call, dest, kept.positions.last + 1, before)
            self._handle.shared.has_logits = False
            self._empty(call, dest)
            restored = {}
            if kept.positions.last >= 0:
                consumed = _transfer.write(call, dest, kept.head, _transfer.ON_DEVICE)
                after = _memory.positions(call, dest)
                if consumed != len(kept.head) or after.last != kept.positions.last:
                    log = call.log()
                    self._empty(call, dest)
                    raise RestoreError("the snapshot on the device was refused", log=log)
                restored[dest] = Span(after.first, after.last, self.rewind_min(after))
        return Restored(len(kept.head), (), restored)

    def rewind_min(self, span: _memory.Positions) -> int:
        """Smallest position to which a sequence with *span* can truthfully be cut back."""
        return max(way.rewind_min(span.first, span.last) for way in self._facts.traits)

    def copy(self, call: Call, src: int, dest: int, first: int, last: int, *, part: bool) -> None:
        """Make *dest* a copy of ``first <= position < last`` of *src*: of all, unless *part*.

        llama.cpp copies between streams only at the next decode, and a state saved before that
        holds stale data. So a copy between streams goes through the state functions.
        """
        one_stream = self._fitting.one_stream(call)
        if part and not one_stream:
            raise UnsupportedError(
                "a split context can copy only whole sequences: use kv_unified=True"
            )
        blob = None if one_stream or first >= last else _transfer.read(call, src)
        self._empty(call, dest)
        if first >= last:
            return
        if blob is None:
            _memory.share(call, src, dest, *((first, last) if part else (-1, -1)))
        elif _transfer.write(call, dest, blob) != len(blob):
            self._empty(call, dest)
            raise RestoreError("the copy was refused", log=call.log(), rolled_back=False)

    # -- the shape of files and blobs of this library

    @property
    def _head_size(self) -> int:
        return layout.SEQUENCE_HEAD.size if self._library.sequence_head else 0

    def _file_kind(self, scope: Scope) -> tuple[layout.Kind, int]:
        if scope is None:
            return "whole", self._library.session_version
        return "sequence", self._library.sequence_version

    def _flags(self, partial: bool) -> int:
        if partial:
            self._library.require("state-flags")
        return _transfer.PARTIAL_ONLY if partial else 0

    def _is_headed(self, scope: Scope, data: memoryview) -> bool:
        # Within session version 9 both forms are about: spring builds wrote no head.
        if self._library.session_version == _LOSES_STREAMS:
            return layout.has_sequence_head(data)
        return self._head_size > 0

    def _native(self, scope: Scope, data: memoryview, headed: bool) -> memoryview:
        """A sequence blob with the head that this library wants, or without."""
        if scope is None or headed == (self._head_size > 0):
            return data
        if headed:
            return data[layout.SEQUENCE_HEAD.size :]
        return memoryview(layout.SEQUENCE_HEAD.pack(layout.SEQUENCE_MAGIC, scope) + bytes(data))

    def _parse(
        self, scope: Scope, blob: memoryview, *, headed: bool, partial: bool = False
    ) -> layout.Layout:
        version, traits = self._library.session_version, self._facts.traits
        if scope is None:
            return layout.parse_whole(blob, version=version, traits=traits)
        return layout.parse_sequence(
            blob, version=version, headed=headed, traits=traits, partial=partial
        )

    def _parse_own(self, scope: Scope, blob: Buffer) -> layout.Layout:
        """Parse what this context's library has just written."""
        return self._parse(scope, memoryview(blob), headed=self._head_size > 0)

    def _read_own(self, call: Call, seq_id: int) -> layout.Layout:
        return self._parse_own(seq_id, _transfer.read(call, seq_id))

    # -- restoring

    def _restore(
        self,
        call: Call,
        scope: Scope,
        blob: memoryview,
        parsed: layout.Layout | None,
        flags: int = 0,
    ) -> dict[int, Span]:
        if parsed is None and scope is None and self._library.session_version == _LOSES_STREAMS:
            self._refuse_to_lose_streams(call)
        before = _memory.occupied(call, self._facts.n_seq_max)
        filled = bool(before) if scope is None else scope in before
        sure = parsed is not None and self._fitting.check(call, scope, parsed, before)
        partial = parsed is not None and flags != 0 and layout.has_partial(parsed.module)
        if parsed is not None and partial:
            _check_rewind(parsed, before.get(scope or 0))
        # Where anything is left that only llama.cpp can decide, what it would destroy is kept.
        # That of a sequence would lack what is outside a sliding window: then all is kept.
        kept = None if self._facts.n_swa else scope
        backup = _transfer.read(call, kept) if filled and not sure else None
        self._handle.shared.has_logits = False
        if parsed is not None and scope is not None and partial:
            consumed = self._put_partial(call, scope, blob, parsed, flags)
        else:
            self._empty(call, scope)
            consumed = self._put(call, scope, blob, parsed)
        after = _memory.occupied(call, self._facts.n_seq_max)
        if not consumed or (parsed is not None and not _agrees(scope, parsed, before, after)):
            log = call.log()
            rolled_back = self._put_back(call, kept, backup) if filled else self._empty(call, scope)
            raise self._refusal(parsed, log, consumed=consumed, rolled_back=rolled_back)
        if parsed is not None:
            self._fitting.learn(parsed)
        return {
            seq_id: Span(span.first, span.last, self.rewind_min(span))
            for seq_id, span in after.items()
            if scope in (None, seq_id)
        }

    def _put(
        self, call: Call, scope: Scope, blob: memoryview, parsed: layout.Layout | None
    ) -> bool:
        """Give *blob* to llama.cpp, over an emptied destination; whether all was consumed."""
        if parsed is not None and not parsed.sequences:
            return True  # llama.cpp ignores some empty states and reports success
        if parsed is not None and scope is None and self._loses_streams(parsed):
            return all(self._put_sequence(call, blob, parsed, i) for i in _cell_order(parsed))
        return _transfer.write(call, scope, blob) == len(blob)

    def _put_partial(
        self, call: Call, seq_id: int, blob: memoryview, parsed: layout.Layout, flags: int
    ) -> bool:
        """Put the window or recurrent part over a sequence, and cut off what came after it."""
        consumed = _transfer.write(call, seq_id, blob, flags) == len(blob)
        return consumed and _memory.remove(call, seq_id, _last(parsed) + 1)

    def _loses_streams(self, parsed: layout.Layout) -> bool:
        streams = (n for name, n in parsed.cells_needed.items() if name != "recurrent")
        return self._library.session_version == _LOSES_STREAMS and any(len(n) > 1 for n in streams)

    def _refuse_to_lose_streams(self, call: Call) -> None:
        if not self._fitting.one_stream(call):
            raise UnsupportedError(
                "of a split context this llama.cpp restores only the last sequence, unless the "
                "state is parsed first: leave validate=True"
            )

    def _put_sequence(
        self, call: Call, blob: memoryview, parsed: layout.Layout, seq_id: int
    ) -> bool:
        payload = layout.sequence_from_whole(blob, parsed, seq_id)
        data = self._native(seq_id, memoryview(payload), headed=False)
        return _transfer.write(call, seq_id, data) == len(data)

    def undo(self, scope: Scope, backup: Buffer) -> None:
        """Put back what :meth:`snapshot` gave earlier, over whatever is there now.

        Raises:
            RestoreError: llama.cpp would not have it; the destination was emptied.
        """
        with self._handle.use() as call:
            self._handle.shared.has_logits = False
            if not self._put_back(call, scope, backup):
                raise RestoreError("what was there could not be put back", log=call.log())

    def _put_back(self, call: Call, scope: Scope, backup: Buffer | None) -> bool:
        """Undo a failed restore; False where the destination could only be emptied."""
        self._empty(call, scope)
        if backup is None:
            return False
        try:
            parsed = self._parse_own(scope, backup)
        except UnsupportedError:  # a format that was restored without validation
            parsed = None
        if self._put(call, scope, memoryview(backup), parsed):
            return True
        self._empty(call, scope)
        return False

    def _empty(self, call: Call, scope: Scope) -> bool:
        """Empty the destination; True, as whoever asked for nothing has got it back."""
        if scope is None:
            _memory.clear(call, data=False)
        else:
            _memory.remove(call, scope)
        return True

    def _refusal(
        self,
        parsed: layout.Layout | None,
        log: Sequence[str],
        *,
        consumed: bool,
        rolled_back: bool,
    ) -> StateError:
        """The error for a state that llama.cpp would not have, or did not bring back rightly."""
        if rolled_back and parsed is not None:
            known = _refusals.explain(
                log, parsed, types=self._facts.asked.types, cells=self._facts.n_ctx_seq
            )
            if known is not None:
                return known
        what = "the positions are not those of the state" if consumed else "llama.cpp refused it"
        return RestoreError(f"the state was not restored: {what}", log=log, rolled_back=rolled_back)


def _cell_order(parsed: layout.Layout) -> list[int]:
    """The sequences in the order of their recurrent cells, so that these come back in it."""
    order = list(parsed.sequences)
    for cache in parsed.caches:
        if isinstance(cache, layout.RecurrentCache):
            order.sort(key=lambda seq_id: min(cache.rows.owners.get(seq_id, [len(cache.rows)])))
    return order


def _last(parsed: layout.Layout) -> int:
    """The largest position of a state of one sequence; -1 when it is empty."""
    return max((high for _, high in parsed.spans.values()), default=-1)


def _check_rewind(parsed: layout.Layout, held: _memory.Positions | None) -> None:
    """A partial state goes only over the sequence that it was taken from, or a longer one."""
    last, current = _last(parsed), held.last if held else -1
    if last < 0 or current < last:
        raise MismatchError([Difference("last position of the sequence", last, current)])


def _agrees(
    scope: Scope,
    parsed: layout.Layout,
    before: Held,
    after: Held,
) -> bool:
    """Whether every sequence of the context holds what it must after the restore."""
    spans = {i: _memory.Positions(*span) for i, span in parsed.spans.items()}
    if scope is None:
        return spans == after
    if list(spans.values()) != [span for i, span in after.items() if i == scope]:
        return False
    # In a cache with a sliding window llama.cpp may reuse cells of the other sequences that
    # are outside their windows: their beginnings may move, their ends may not.
    return _ends(before, scope) == _ends(after, scope)


def _ends(spans: Held, scope: Scope) -> dict[int, int]:
    return {i: span.last for i, span in spans.items() if i != scope}


def _token_array(tokens: Iterable[int]) -> array[int]:
    try:
        return array("i", [operator.index(token) for token in tokens])
    except (OverflowError, TypeError) as error:
        raise FormatError(f"tokens must be 32-bit integers: {error}") from error
