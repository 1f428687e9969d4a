"""The state of one context: out of it, into it, to a file and from one.

A restore has three steps. A blob or file is parsed: it is :class:`Incoming` then. The keeper of the
context's tokens can refuse it. Then the state is put into the context by a plan; see
``restore.py``. While a blob is parsed, the context is free for others; while a file is, it is not.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial as bound
from typing import TYPE_CHECKING, Final, TypeVar

from .. import layout
from .._io import Progress, StrPath, atomic, pages
from .._io.buffers import POOL, flat, write_parts
from .._io.lease import opened
from .._io.records import Doing, logger
from .._llama import calls
from .._llama.calls import Target
from .._llama.facts import Facts
from .._llama.handles import Call, Handle
from ..checkpoint.fingerprint import state_fields
from ..errors import FormatError, MismatchError, StateError, UnsupportedError, VersionError
from ..layout.appended import begin, packed_size, read_points
from ..layout.recognition import expect, naming
from ..layout.restore_points import RestorePoint, copied
from ..layout.slots import NO_PROMPT, pack_listed
from .changes import Change, Keeper
from .conversion import is_form, put_converted, read_otherwise
from .fit import Fit, Held
from .form import StateForm
from .restore import Incoming, Restorer
from .savepoint import Savepoint

if TYPE_CHECKING:
    from .._io import Buffer

# What is taken for a file of llama.cpp: a slot file is a sequence file whose tokens are packed.
_FILE_KINDS: Final[Mapping[layout.Kind, Sequence[str]]] = {
    "whole": ("session file",),
    "sequence": ("sequence file", "slot file"),
}
_SHOWN_TOKENS: Final = 4

LOGGER = logger("context")

Parsed = TypeVar("Parsed")


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
        tokens: The tokens that the file lists; empty for blobs, and where the file also lists
            *media*, since then it is not the tokens alone that give the state.
        sequences: The non-empty sequences that were restored, by their id in this context.
        media: The images and sounds in the prompt of a slot file of llama-server, in order.
        converted: What of its form was made another to fit this context, as in "session version
            9 to 11, flash attention on to off"; None where nothing was.
        restore_points: The partial states of earlier moments, the earliest first: those of a
            checkpoint, and those of a slot file where they were asked for.
    """

    nbytes: int
    tokens: tuple[int, ...]
    sequences: Mapping[int, Span]
    media: tuple[layout.MediaChunk, ...] = ()
    restore_points: tuple[RestorePoint, ...] = ()
    converted: str | None = None

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.tokens[:_SHOWN_TOKENS]))
        more = f", ... {len(self.tokens)} in all" if len(self.tokens) > _SHOWN_TOKENS else ""
        media = f", media=<{len(self.media)}>" if self.media else ""
        converted = f", converted={self.converted!r}" if self.converted else ""
        return (
            f"Restored(nbytes={self.nbytes}, tokens=({first}{more}), "
            f"sequences={self.sequences}{media}{converted})"
        )


class ContextState:
    """The state of one context.

    A *target* is a sequence id, or None for the whole context.
    """

    def __init__(
        self,
        handle: Handle,
        facts: Facts,
        form: StateForm,
        fit: Fit,
        restorer: Restorer,
        keeper: Keeper,
    ) -> None:
        self._handle = handle
        self._facts = facts
        self._form = form
        self._fit = fit
        self._restorer = restorer
        self._keeper = keeper

    @property
    def known(self) -> layout.Geometry | None:
        """What has been learned of the caches so far, from states that passed by."""
        return self._fit.known

    def rewind_min(self, span: layout.Span) -> int:
        """Return the smallest position to which a sequence that holds *span* can be cut back."""
        return self._fit.rewind_min(span)

    # -- out of the context

    def size(self, target: Target, *, partial: bool = False) -> int:
        """Return the bytes that a snapshot would have now."""
        with self._handle.use() as call:
            return calls.size(call, target, self._flags(call, target, partial))

    def snapshot(
        self, target: Target, out: Buffer | None = None, *, partial: bool = False
    ) -> bytes | memoryview:
        """Return the state as bytes, or write it to the start of *out*."""
        with Doing(LOGGER, "snapshot", target=target) as doing, self._handle.use() as call:
            flags = self._flags(call, target, partial)
            state: bytes | memoryview
            if out is None:
                state = calls.read(call, target, flags)
            else:
                state = calls.read_into(call, target, out, flags)
            doing.add(nbytes=len(state))
            return state

    def own_points(
        self, target: Target, points: Sequence[RestorePoint], blob: Buffer
    ) -> list[RestorePoint]:
        """Return restore points of a state that this context has just given, checked."""
        return self._form.own_points(target, points, blob)

    def recorded(self, target: Target, blob: Buffer) -> dict[str, str]:
        """Return what a state that this context has just given says of it: `state_fields`."""
        try:
            parsed = self._form.parse_own(target, blob)
        except UnsupportedError:  # an unknown format says nothing
            return {}
        self._fit.learn(parsed)
        return state_fields(parsed)

    def save(
        self,
        target: Target,
        path: StrPath,
        tokens: Iterable[int] | None,
        points: Sequence[RestorePoint] = (),
        *,
        durable: bool,
        progress: Progress | None,
        memory_limit: int | None,
    ) -> int:
        """Write llama.cpp's own session or sequence file, and return its bytes."""
        self._handle.library.warn_of_version(stacklevel=4)
        ids = None if tokens is None else layout.token_array(tokens)
        told = Doing(LOGGER, "save", target=target, path=str(path))
        with told as doing, POOL.limited(memory_limit), ExitStack() as stack:
            with self._handle.use() as call:
                if ids is None:
                    ids = array("i", self._keeper.known_tokens(call, target) or ())
                header = pack_listed(*self._form.file_kind(target), ids)
                place = self._form.file_layout(target, len(header))
                pack = bound(self._form.pack_points, target, points)
                need = calls.size(call, target)
                try:
                    buffer = stack.enter_context(POOL.lend(need, only_kept=True))
                except MemoryError:
                    fill = _filler(call, target, header, place, pack)
                    size = place.file_size(need) + packed_size(points)
                    doing.add(nbytes=size, tokens=len(ids))
                    return atomic.fill_file(path, size, fill, durable=durable, progress=progress)
                blob = calls.read_into(call, target, buffer)
            parts: list[Buffer] = [header, place.payload(blob), *pack(blob)]
            written = atomic.write_file(path, parts, durable=durable, progress=progress)
            doing.add(nbytes=written, tokens=len(ids))
            return written

    # -- into the context

    def load(
        self,
        target: Target,
        path: StrPath,
        tokens: Iterable[int] | None,
        points: bool = False,
        *,
        validate: bool,
        progress: Progress | None,
        memory_limit: int | None,
    ) -> Restored:
        """Restore from llama.cpp's own session or sequence file."""
        given = _listed(tokens)
        with (
            Doing(LOGGER, "load", target=target, path=str(path)) as doing,
            POOL.limited(memory_limit),
            naming(path),
            # First, since a writer of the file waits only so long for the lease on it.
            self._handle.use(),
            opened(path, progress=progress) as file,
        ):
            incoming = self._incoming(target, path, file.view, validate=validate)
            if file.secure():
                incoming = self._incoming(target, path, file.view, validate=validate)
            # Before anything is touched: there may be no memory for them.
            copies = [copied(point) for point in incoming.points] if points else []
            if not validate and target is not None:
                follows = bound(_follows, file.view, copies if points else None)
                incoming = replace(incoming, follows=follows)
            given = given or incoming.prompt.tokens or None
            try:
                restored = self._put(target, incoming, given)
            except MismatchError as error:
                restored = self._put_converted(target, incoming, given, error)
            doing.add(**_told(restored))
            return replace(restored, restore_points=tuple(copies))

    def _incoming(
        self, target: Target, path: StrPath, data: memoryview, *, validate: bool
    ) -> Incoming:
        """Parse the content of a file, and make of it what llama.cpp takes."""
        kind, version = self._form.file_kind(target)
        expect(path, data, *_FILE_KINDS[kind])
        header = layout.parse_file_header(data, any_version=True)
        other = header.version != version
        if other and not (validate and self._form.can_convert(header)):
            raise VersionError("state file", found=header.version, expected=version, offset=4)
        prompt = _prompt(data, header, validate=validate)
        place = self._form.file_layout(target, header.payload_offset)
        parsed, end = None, len(data)
        points: tuple[RestorePoint, ...] = ()
        if validate:
            written = header.session_version if other else None
            parse = bound(self._form.parse_file, data, header, version=written)
            parsed, end, points = self._as_expected(parse)
        if target is not None and place.head_size:
            # The end of the header, which was read, makes room for the head of the blob.
            pages.overwrite(data, place.blob_offset, layout.sequence_head(target))
        blob = data[place.blob_offset : end]
        return Incoming(blob, parsed, len(data), prompt, points=points)

    def _as_expected(self, parse: Callable[..., Parsed]) -> Parsed:
        """Describe a state, as the context's own ones read where it does not read as expected."""
        try:
            return parse()
        except FormatError:
            with self._handle.use() as call:
                traits = self._fit.other_readings(call)
            if traits:
                with suppress(StateError):
                    return parse(traits=traits)
            raise

    def restore(
        self,
        target: Target,
        blob: Buffer,
        tokens: Iterable[int] | None,
        *,
        validate: bool,
        partial: bool = False,
        version: int | None = None,
    ) -> Restored:
        """Restore from a blob that :meth:`snapshot` gave, of session *version* if that is known."""
        if partial:
            self._handle.library.require("state-flags")
        given = _listed(tokens)
        data = flat(blob)
        with Doing(LOGGER, "restore", target=target, nbytes=len(data)) as doing:
            parsed, headed = None, self._form.is_headed(data)
            if validate or partial:
                parsed, headed = self._described(target, data, headed, partial, version)
            native = self._form.native(target, data, headed)
            incoming = Incoming(native, parsed, len(data), partial=partial)
            try:
                restored = self._put(target, incoming, given)
            except MismatchError as error:
                restored = self._put_converted(target, incoming, given, error)
            doing.add(**_told(restored))
            return restored

    def _described(
        self,
        target: Target,
        blob: memoryview,
        headed: bool,
        partial: bool,
        version: int | None,
    ) -> tuple[layout.Layout, bool]:
        """Describe a blob, and say whether it has a head, as *headed* those of this version."""
        parse = bound(self._form.parse, target, blob, partial=partial)
        if version in (None, self._form.version):
            with suppress(FormatError):
                return parse(headed=headed), headed
            if parsed := read_otherwise(self._form, target, blob, partial):
                return parsed, layout.has_sequence_head(blob)
        else:
            headed = layout.has_sequence_head(blob)
            parse = bound(parse, version=version)
        return self._as_expected(bound(parse, headed=headed)), headed

    def savepoint(self, targets: Sequence[Target]) -> Savepoint:
        """Return what puts *targets* back as they were when its block raises."""
        return Savepoint(self._handle, self._restorer, self._keeper, self.snapshot, targets)

    # -- shared by the above

    def _put(self, target: Target, incoming: Incoming, tokens: tuple[int, ...] | None) -> Restored:
        with self._handle.use() as call:
            spans = _spans(target, incoming.parsed)
            if incoming.partial and tokens is None and spans and target is not None:
                # A rewind brings no token that is not there.
                listed = self._keeper.tokens(target)
                tokens = listed and listed[: spans[target].last + 1]
            change = Change("replace", target, spans, tokens)
            check = bound(self._keeper.check, call, change)
            plan = self._restorer.plan(call, target, incoming)
            restore = bound(self._restorer.restore, call, change, plan, incoming, check)
            held = self._keeper.count(call, change, restore)
            sequences = restored_spans(self._fit, held)
            prompt = incoming.prompt
            return Restored(incoming.nbytes, prompt.tokens, sequences, prompt.media)

    def _put_converted(
        self,
        target: Target,
        incoming: Incoming,
        tokens: tuple[int, ...] | None,
        error: MismatchError,
    ) -> Restored:
        """Put a state of another form; *error* is what was said of it as it is."""
        if not is_form(incoming, error.differences):
            raise error
        put = bound(self._put, target, tokens=tokens)
        return put_converted(put, self._form, self._fit, target, incoming, error.differences)

    def _flags(self, call: Call, target: Target, partial: bool) -> int:
        """Return the flags with which llama.cpp gives a state, or the partial one."""
        if not partial:
            return 0
        self._handle.library.require("state-flags")
        # Of what can be cut back newer builds give nothing but a head, which does not say where
        # the sequence was: the full state does.
        is_left_out = calls.size(call, target, calls.PARTIAL_ONLY) == layout.SEQUENCE_HEAD.size
        return 0 if is_left_out else calls.PARTIAL_ONLY


def _told(restored: Restored) -> dict[str, object]:
    """Return what the log says of a restore: how much it was, not what."""
    positions = {seq_id: span.n_past for seq_id, span in restored.sequences.items()}
    facts = {"nbytes": restored.nbytes, "tokens": len(restored.tokens), "n_past": positions}
    return {**facts, "converted": restored.converted} if restored.converted else facts


def _listed(tokens: Iterable[int] | None) -> tuple[int, ...] | None:
    return None if tokens is None else tuple(layout.token_array(tokens))


def _prompt(data: memoryview, header: layout.FileHeader, *, validate: bool) -> layout.Prompt:
    """Return the prompt of a file; none if it cannot be read and need not be."""
    try:
        return layout.listed_tokens(data, header)
    except FormatError:
        if validate:
            raise
        return NO_PROMPT


def _follows(file: memoryview, copies: list[RestorePoint] | None, rest: memoryview) -> bool:
    """Tell whether what llama.cpp left of a file is restore points.

    Args:
        file: The file, which ends with *rest*.
        copies: Where to put copies of them; None: they are not wanted, and not read.

    Raises:
        FormatError: They are wanted, and damaged.
    """
    if not begin(rest):
        return False
    if copies is not None:
        points = read_points(file, len(file) - len(rest))
        copies[:] = [copied(point) for point in points]
    return True


def restored_spans(fit: Fit, held: Held) -> dict[int, Span]:
    """Return what a restore brought back, as its caller gets it."""
    return {
        seq_id: Span(span.first, span.last, fit.rewind_min(span)) for seq_id, span in held.items()
    }


def _spans(target: Target, parsed: layout.Layout | None) -> Mapping[int, layout.Span] | None:
    """Return the positions of a state by the sequences that they will have in the context."""
    if parsed is None or target is None:
        return None if parsed is None else parsed.spans
    return dict(zip([target], parsed.spans.values(), strict=False))


def _filler(
    call: Call,
    target: Target,
    header: bytes,
    place: layout.FileLayout,
    pack: Callable[[Buffer], Sequence[Buffer]],
) -> Callable[[memoryview], None]:
    """Return what lets llama.cpp write a state into the pages of its file, and all else around."""

    def fill(file: memoryview) -> None:
        blob = calls.read_into(call, target, file[place.blob_offset :])
        write_parts(file[place.file_size(len(blob)) :], pack(blob))
        file[: len(header)] = header

    return fill
