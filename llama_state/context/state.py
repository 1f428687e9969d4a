"""Save and restore over a context handle: checked before, verified after, undone on failure.

llama.cpp clears the destination first and looks at the state then. So a state is parsed and
compared with the context before llama.cpp sees it; what it consumed and the positions that it
reports are compared after. See ``docs/guarantees.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import layout
from .._io import Progress, StrPath, atomic, pages
from .._io.buffers import POOL, flat
from .._io.lease import opened
from .._llama import calls
from .._llama.calls import Scope
from .._llama.facts import Facts
from .._llama.handles import Call, Handle
from ..checkpoint.fingerprint import state_fields
from ..errors import (
    FormatError,
    RestoreError,
    SequenceIdError,
    StaleError,
    UnsupportedError,
    VersionError,
)
from .fit import Held
from .restore import LOSES_STREAMS, Restoring

if TYPE_CHECKING:
    from .._io import Buffer

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
    positions: calls.Positions


class ContextState:
    """The state of one context.

    A *scope* is a sequence id, or None for the whole context.
    """

    def __init__(self, handle: Handle, facts: Facts) -> None:
        self._handle = handle
        self._facts = facts
        self._library = handle.library
        self._restoring = Restoring(handle, facts)

    @property
    def known(self) -> layout.Geometry | None:
        """What has been learned of the caches so far, from states that passed by."""
        return self._restoring.fitting.known

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
            return calls.size(call, scope, flags)

    def snapshot(
        self, scope: Scope, out: Buffer | None = None, *, partial: bool = False
    ) -> bytes | memoryview:
        """The state as bytes, or written to the start of *out*."""
        flags = self._flags(partial)
        with self._handle.use() as call:
            if out is None:
                return calls.read(call, scope, flags)
            return calls.read_into(call, scope, out, flags)

    def recorded(self, scope: Scope, blob: Buffer) -> dict[str, str]:
        """What a state that this context has just given says of it; see :func:`state_fields`."""
        try:
            parsed = self._restoring.parse_own(scope, blob)
        except UnsupportedError:  # an unknown format tells nothing
            return {}
        self._restoring.fitting.learn(parsed)
        return state_fields(parsed)

    def save(
        self,
        scope: Scope,
        path: StrPath,
        tokens: Iterable[int],
        *,
        durable: bool,
        progress: Progress | None = None,
        memory_limit: int | None = None,
    ) -> int:
        """Write llama.cpp's own session or sequence file."""
        ids = layout.token_array(tokens)
        header = layout.pack_file_header(*self._file_kind(scope), ids)
        skip = 0 if scope is None else self._restoring.head_size
        options: dict[str, Any] = {"durable": durable, "progress": progress}
        with POOL.limited(memory_limit), ExitStack() as stack:
            with self._handle.use() as call:
                need = calls.size(call, scope)
                try:
                    buffer = stack.enter_context(POOL.lend(need))
                except MemoryError:
                    buffer = None
                if buffer is None:
                    return self._save_in_place(call, scope, path, header, need, skip, options)
                blob = calls.read_into(call, scope, buffer)
            return atomic.write_file(path, [header, blob[skip:]], **options)

    def _save_in_place(
        self,
        call: Call,
        scope: Scope,
        path: StrPath,
        header: bytes,
        need: int,
        skip: int,
        options: Any,
    ) -> int:
        """Let llama.cpp write its *need* bytes into the pages of the file, all but *skip*."""
        # The head in front of a sequence's blob has no place in a file: the header is written
        # over it, and the payload lies where it belongs.
        start = len(header) - skip

        def fill(pages: memoryview) -> None:
            calls.read_into(call, scope, pages[start:])
            pages[: len(header)] = header

        return atomic.fill_file(path, start + need, fill, **options)

    def load(
        self,
        scope: Scope,
        path: StrPath,
        *,
        validate: bool,
        progress: Progress | None = None,
        memory_limit: int | None = None,
        admit: Admit | None = None,
    ) -> Restored:
        """Restore from llama.cpp's own session or sequence file."""
        with POOL.limited(memory_limit), opened(path, progress=progress) as data:
            header = layout.parse_file_header(data, any_version=True)
            kind, version = self._file_kind(scope)
            if header.kind != kind:
                reason = f"{path} is a {header.kind} state file, not a {kind} one"
                raise FormatError(reason, offset=0)
            if header.version != version:
                raise VersionError(f"{path}", found=header.version, expected=version, offset=4)
            tokens = tuple(layout.unpack_tokens(data, header))
            start = header.payload_offset
            parsed = self._parse_payload(scope, data[start:], start) if validate else None
            if admit is not None:
                admit(parsed, tokens)
            if scope is not None and self._restoring.head_size:
                # The 8 bytes before the payload are read by now and make room for the blob's head.
                start -= self._restoring.head_size
                head = layout.SEQUENCE_HEAD.pack(layout.SEQUENCE_MAGIC, scope)
                pages.overwrite(data, start, head)
            with self._handle.use() as call:
                held = self._restoring.restore(call, scope, data[start:], parsed)
            return Restored(len(data), tokens, self._spans(held))

    def _parse_payload(self, scope: Scope, payload: memoryview, offset: int) -> layout.Layout:
        try:
            return self._restoring.parse(scope, payload, headed=False)
        except FormatError as error:
            raise error.moved(offset) from None

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
        data = flat(blob)
        into = self._restoring
        headed = into.is_headed(data)
        parsed = into.parse(scope, data, headed=headed, partial=partial) if validate else None
        native = into.native(scope, data, headed)
        if admit is not None:
            admit(parsed, ())
        with self._handle.use() as call:
            held = into.restore(call, scope, native, parsed, flags)
        return Restored(len(data), (), self._spans(held))

    # -- snapshots that stay on the device

    def keep_on_device(self, seq_id: int) -> OnDevice:
        """Let llama.cpp keep the tensors of a sequence; it forgets the ones of before."""
        self._library.require("state-flags")
        if self._library.session_version <= LOSES_STREAMS:
            raise UnsupportedError(
                "before session version 10 llama.cpp aborts when a snapshot cannot be restored "
                "from the device: take seq_snapshot()"
            )
        self._restoring.fitting.countable()
        with self._handle.use() as call:
            head = calls.read(call, seq_id, calls.ON_DEVICE)
            kept = OnDevice(seq_id, head, calls.positions(call, seq_id))
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
            before = calls.occupied(call, self._facts.n_seq_max)
            self._restoring.fitting.check_room(call, dest, kept.positions.last + 1, before)
            self._handle.shared.last_logits = None
            self._restoring.empty(call, dest)
            restored: dict[int, calls.Positions] = {}
            if kept.positions.last >= 0:
                consumed = calls.write(call, dest, kept.head, calls.ON_DEVICE)
                after = calls.positions(call, dest)
                if consumed != len(kept.head) or after.last != kept.positions.last:
                    log = call.log()
                    self._restoring.empty(call, dest)
                    raise RestoreError("the snapshot on the device was refused", log=log)
                restored[dest] = after
        return Restored(len(kept.head), (), self._spans(restored))

    def rewind_min(self, span: calls.Positions) -> int:
        """Smallest position to which a sequence with *span* can truthfully be cut back."""
        return max(way.rewind_min(span.first, span.last) for way in self._facts.traits)

    def copy(self, call: Call, src: int, dest: int, first: int, last: int, *, part: bool) -> None:
        """Make *dest* a copy of ``first <= position < last`` of *src*: of all, unless *part*.

        llama.cpp copies between streams only at the next decode, and a state saved before that
        holds stale data. So a copy between streams goes through the state functions.
        """
        one_stream = self._restoring.fitting.one_stream(call)
        if part and not one_stream:
            raise UnsupportedError(
                "a split context can copy only whole sequences: use kv_unified=True"
            )
        logits = self._handle.shared.last_logits
        if logits is not None and logits.seq_id == dest:
            self._handle.shared.last_logits = None
        if one_stream or first >= last:
            self._restoring.empty(call, dest)
            if first < last:
                calls.share(call, src, dest, *((first, last) if part else (-1, -1)))
            return
        with calls.lent(call, src) as blob:
            self._restoring.empty(call, dest)
            if calls.write(call, dest, blob) != len(blob):
                self._restoring.empty(call, dest)
                raise RestoreError("the copy was refused", log=call.log(), rolled_back=False)

    def undo(self, scope: Scope, backup: Buffer) -> None:
        """Put back what :meth:`snapshot` gave earlier, over whatever is there now.

        Raises:
            RestoreError: llama.cpp would not have it; the destination was emptied.
        """
        with self._handle.use() as call:
            self._handle.shared.last_logits = None
            if not self._restoring.put_back(call, scope, backup):
                raise RestoreError("what was there could not be put back", log=call.log())

    # -- shared by the above

    def _spans(self, held: Held) -> dict[int, Span]:
        return {
            seq_id: Span(span.first, span.last, self.rewind_min(span))
            for seq_id, span in held.items()
        }

    def _file_kind(self, scope: Scope) -> tuple[layout.Kind, int]:
        if scope is None:
            return "whole", self._library.session_version
        return "sequence", self._library.sequence_version

    def _flags(self, partial: bool) -> int:
        if partial:
            self._library.require("state-flags")
        return calls.PARTIAL_ONLY if partial else 0
