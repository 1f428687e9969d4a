"""Parse the states of llama.cpp: whole contexts and single sequences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._io.arguments import checked
from ..errors import FormatError, StateError, UnsupportedError
from .architectures import every_kind, is_known, is_of_table, model_traits
from .blocks import UNKNOWN_ID, Cache, Cells
from .cells import Ownership
from .cursor import U32, Cursor, open_view
from .dsv4 import read_compressed, read_compressor, read_head, refuse_head
from .formats import (
    EXT_WORDS,
    MAX_ARCH_BYTES,
    MAX_SEQUENCES,
    SEQUENCE_FILE_MAGIC,
    SEQUENCE_HEAD,
    SEQUENCE_MAGIC,
    WHOLE_FILE_MAGIC,
    require_version,
)
from .headers import Kind
from .kv import read_kv
from .recurrent import recurrent_readings
from .spans import owners
from .state import Layout
from .traits import SubCache, Traits, can_be_left_out, sub_caches

if TYPE_CHECKING:
    from .._io import Buffer

_ARCH = re.compile(rb"[A-Za-z0-9_.-]+")
_OTHER_KINDS = {
    SEQUENCE_MAGIC: "the state of one sequence, with its head",
    WHOLE_FILE_MAGIC: "a session file, not its payload",
    SEQUENCE_FILE_MAGIC: "a sequence file, not its payload",
}


@checked
def parse_whole(
    data: Buffer,
    *,
    version: int,
    traits: Traits | Sequence[Traits] | None = None,
    others: bool = False,
) -> Layout:
    """Parse the state of a whole context.

    Args:
        data: The output of ``llama_state_get_data``, or the payload of a session file. Its tensor
            bytes are not read or copied, and the result does not refer to it.
        version: Session version of the llama.cpp that wrote it, which *data* does not record.
        traits: What is known of the model (:func:`model_traits`). Ignored if the state names
            another architecture, so that it can still be described.
        others: Whether a state that does not read so is tried as every other kind of memory. One
            that is cut off behind a cache can read as one without the caches that follow.

    Raises:
        FormatError: Not the state of a whole context, or damaged, or of another version.
        TruncatedError: The state ends too early.
        UnsupportedError: The version is unknown, or the architecture is and the state reads as
            no known kind of memory.
    """
    require_version(version)
    cursor = Cursor(open_view(data))
    arch = read_arch(cursor)
    candidates = [one for one in _as_list(traits) if one.arch == arch] or model_traits(arch)
    reader = _Reader(cursor.view, cursor.at, version, Ownership(whole=True), partial=False)
    return reader.layout(candidates, others=others, arch=arch)


@checked
def parse_sequence(
    data: Buffer,
    *,
    version: int,
    headed: bool = True,
    traits: Traits | Sequence[Traits] | None = None,
    partial: bool = False,
    others: bool = False,
    piece: bool = False,
) -> Layout:
    """Parse the state of one sequence.

    Args:
        data: The output of ``llama_state_seq_get_data``; see :func:`parse_whole`.
        version: Session version of the llama.cpp that wrote it.
        headed: Whether it has the 8-byte head. The payload of a sequence file has none, nor do
            blobs of early builds of session version 9.
        traits: What is known of the model. Without it, every known kind of memory is tried.
        partial: Whether it was saved with the flag PARTIAL_ONLY, which it does not record. Of an
            architecture that is given it can be a head alone: newer builds leave out all that can
            be cut back. Then the layout has no caches.
        others: See :func:`parse_whole`.
        piece: Whether it can be a piece of a state: the window without the cache that has all
            positions, no compressors at the end, cells that name no sequence.

    Raises:
        FormatError: Not the state of one sequence, or damaged, or of another version.
        TruncatedError: The state ends too early.
        UnsupportedError: The version is unknown, or *traits* are not given and the state reads as
            no known kind of memory.
    """
    require_version(version)
    cursor = Cursor(open_view(data))
    source = read_source(cursor) if headed else None
    ownership = Ownership(False, source, ownerless=piece)
    reader = _Reader(cursor.view, cursor.at, version, ownership, partial, piece)
    candidates = _as_list(traits) or model_traits()
    try:
        return reader.layout(candidates, others=others)
    except (FormatError, UnsupportedError):
        if not headed:
            _refuse_other_kinds(cursor.view)
        raise


@checked
def parse_state(
    kind: Kind,
    data: Buffer,
    *,
    version: int,
    headed: bool = True,
    traits: Traits | Sequence[Traits] | None = None,
    partial: bool = False,
    others: bool = False,
) -> Layout:
    """Parse a state of either kind.

    Args:
        kind: "whole": as :func:`parse_whole`, without *headed* and *partial*. "sequence": as
            :func:`parse_sequence`.
    """
    if kind == "whole":
        return parse_whole(data, version=version, traits=traits, others=others)
    return parse_sequence(
        data, version=version, headed=headed, traits=traits, partial=partial, others=others
    )


@checked
def has_sequence_head(data: Buffer) -> bool:
    """Return whether *data* starts with the head of a sequence blob."""
    view = open_view(data)
    return len(view) >= U32.size and U32.unpack_from(view)[0] == SEQUENCE_MAGIC


def _as_list(traits: Traits | Sequence[Traits] | None) -> Sequence[Traits]:
    if traits is None:
        return ()
    return (traits,) if isinstance(traits, Traits) else traits


def read_arch(cursor: Cursor) -> str:
    """Read the architecture with which the state of a whole context begins."""
    if other := _other_kind(cursor.view):
        raise FormatError(f"expected the state of a whole context, this is {other}", offset=0)
    length = cursor.u32("architecture name")
    if not 2 <= length <= MAX_ARCH_BYTES:
        raise FormatError(f"an architecture name of {length} bytes", offset=0)
    offset = cursor.skip(length, "architecture name")
    name = bytes(cursor.view[offset : cursor.at])
    if not _ARCH.fullmatch(name):
        raise FormatError("an architecture name with bytes that no name has", offset=offset)
    return name.decode("ascii")


def read_source(cursor: Cursor) -> int:
    """Read the head of a sequence state: the sequence that was saved."""
    magic, source = cursor.read(SEQUENCE_HEAD, "head of a sequence state")
    if magic != SEQUENCE_MAGIC:
        _refuse_other_kinds(cursor.view)
        raise FormatError(f"not the state of a sequence (magic {magic:#010x})", offset=0)
    if not 0 <= source < MAX_SEQUENCES:
        raise FormatError(f"the state of sequence {source}", offset=4)
    return int(source)


def _refuse_other_kinds(view: memoryview) -> None:
    """Raise FormatError if *view* starts with what is not a sequence payload."""
    other = _other_kind(view)
    if other is None:
        with suppress(FormatError):
            arch = read_arch(Cursor(view))
            # A payload can start like a very short name: stream count, then cell count.
            if len(arch) > 3 or is_known(arch):
                other = f"the state of a whole context ({arch})"
    if other is not None:
        raise FormatError(f"expected the state of one sequence, this is {other}", offset=0)


def _other_kind(view: memoryview) -> str | None:
    """Return what *view* is if it starts with a magic number, which no payload does."""
    return _OTHER_KINDS.get(U32.unpack_from(view)[0]) if len(view) >= U32.size else None


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one payload, as each of the given traits says."""

    view: memoryview
    start: int
    version: int
    ownership: Ownership
    partial: bool
    piece: bool = False

    def layout(
        self, candidates: Sequence[Traits], *, others: bool, arch: str | None = None
    ) -> Layout:
        """Return the layout by the first of *candidates* that reads the payload to its end.

        Where none of them does, with *others* by the first of every kind of memory.
        """
        errors: dict[Traits, FormatError] = {}
        expected = self._all_readings(candidates, errors)
        readings = expected
        if not expected and others:
            readings = self._all_readings(every_kind(candidates[0].arch), {})
        if not readings:
            raise self._refusal(candidates, errors)
        traits, *alternatives = readings
        caches = readings[traits]
        return Layout(
            kind="whole" if self.ownership.whole else "sequence",
            version=self.version,
            traits=traits,
            arch=arch,
            source=None if self.ownership.whole else self._ownership_after(caches).source,
            partial=self.partial,
            caches=caches,
            nbytes=len(self.view),
            alternatives=tuple(alternatives),
            unexpected=not expected,
        )

    def _all_readings(
        self, candidates: Sequence[Traits], errors: dict[Traits, FormatError]
    ) -> dict[Traits, tuple[Cache, ...]]:
        """Return the payload as each of *candidates* reads it; errors of the rest in *errors*."""
        readings: dict[Traits, tuple[Cache, ...]] = {}
        for traits in candidates:
            try:
                caches = self.caches(traits)
            except FormatError as error:
                errors[traits] = error.with_traceback(None)
            else:
                # Traits that lead to the same caches are not an alternative.
                if caches not in readings.values():
                    readings[traits] = caches
        return readings

    def caches(self, traits: Traits) -> tuple[Cache, ...]:
        """Read all caches as *traits* say; raise FormatError if the payload does not fit them."""
        cursor = Cursor(self.view, self.start)
        # Of an unknown model a head alone says nothing.
        is_bare = self.partial and traits.arch and 0 < self.start == cursor.end
        if is_bare and can_be_left_out(traits.module):
            return ()
        if traits.module == "dsv4":
            read_head(cursor, partial=self.partial)
        else:
            refuse_head(cursor, traits.module)
        return self._read(cursor, traits, sub_caches(traits.module, partial=self.partial), ())

    def _read(
        self, cursor: Cursor, traits: Traits, wanted: tuple[SubCache, ...], done: tuple[Cache, ...]
    ) -> tuple[Cache, ...]:
        """Read the sub-caches *wanted*, which follow those *done*, to the end of the payload."""
        offset = cursor.at
        if offset == cursor.end and all(map(self._can_be_missing, wanted)):
            return done
        if not wanted:
            raise FormatError(f"{cursor.end - offset} bytes after the last cache", offset=offset)
        errors: list[FormatError] = []
        for cache in self._readings(cursor, traits, wanted[0], done, last=len(wanted) == 1):
            cursor.at = cache.offset + cache.nbytes
            try:
                if not self.piece:
                    _check_cells(cache, wanted[0], done)
                return self._read(cursor, traits, wanted[1:], (*done, cache))
            except FormatError as error:
                errors.append(error.with_traceback(None))
        reason = "no number of layers fills the payload: it is cut off or damaged"
        raise _furthest(errors) or FormatError(reason, offset=offset)

    def _can_be_missing(self, sub_cache: SubCache) -> bool:
        return sub_cache.optional or (self.piece and sub_cache.kind == "compressor")

    def _readings(
        self,
        cursor: Cursor,
        traits: Traits,
        sub_cache: SubCache,
        done: tuple[Cache, ...],
        *,
        last: bool,
    ) -> Iterator[Cache]:
        """Yield each possible reading of *sub_cache* at the cursor: several if it is recurrent."""
        ownership = self._ownership_after(done)
        n_stream = len(done[0].cells) if done and ownership.whole else 1
        if sub_cache.kind == "kv":
            yield read_kv(
                cursor,
                sub_cache.name,
                ownership,
                version=self.version,
                ext_words=EXT_WORDS[self.version] if sub_cache.has_ext(traits) else 0,
                k_only=sub_cache.is_k_only(traits),
            )
        elif sub_cache.kind == "recurrent":
            alone = traits.module == "recurrent"
            yield from recurrent_readings(
                cursor, sub_cache.name, ownership, alone=alone, ngrams=traits.ple, last=last
            )
        elif sub_cache.kind == "compressed":
            yield read_compressed(cursor, sub_cache.name, n_stream)
        else:
            yield read_compressor(cursor, sub_cache.name, n_stream)

    def _ownership_after(self, done: tuple[Cache, ...]) -> Ownership:
        """Return the ownership, with the source that the cells of the caches read so far name."""
        if self.ownership.whole or self.ownership.source is not None:
            return self.ownership
        source = next((i for i in owners(done) if i != UNKNOWN_ID), None)
        return Ownership(False, source, self.ownership.ownerless)

    def _refusal(
        self, candidates: Sequence[Traits], errors: dict[Traits, FormatError]
    ) -> StateError:
        """Return the error to raise: that of the reading that came furthest.

        A guess counts only where the table has no row: it can read the caches of another kind of
        memory, and fail behind them.
        """
        known = [error for traits, error in errors.items() if is_of_table(traits)]
        error = _furthest(known or list(errors.values()))
        errors.clear()
        arch = candidates[0].arch
        if error and (len(candidates) == 1 or is_known(arch)):
            return error
        subject = f"architecture {arch!r} is not known, and its state" if arch else "this state"
        refusal = UnsupportedError(f"{subject} reads as no known kind of memory: {error}")
        refusal.__cause__ = error
        return refusal


def _furthest(errors: list[FormatError]) -> FormatError | None:
    """Return the error with the largest offset, and empty *errors*.

    A raised error refers to the frames that it passes. If one of these frames still had it in a
    list, frame and error, and so the caller's buffer, would live until the next collection.
    """
    error = max(errors, key=lambda error: error.offset or 0, default=None)
    errors.clear()
    return error


def _check_cells(cache: Cache, sub_cache: SubCache, done: tuple[Cache, ...]) -> None:
    """Raise FormatError if the cells of *cache* contradict those of the cache they depend on."""
    names = (sub_cache.mirrors, sub_cache.within)
    main = next((other for other in done if other.name in names), None)
    if main is None:
        return
    if len(main.cells) != len(cache.cells):
        reason = f"{sub_cache.name} has {len(cache.cells)} streams, {main.name} {len(main.cells)}"
        raise FormatError(reason, offset=cache.offset)
    for theirs, ours in zip(main.cells, cache.cells, strict=True):
        if ours.positions == theirs.positions and ours.owners == theirs.owners:
            continue
        if sub_cache.mirrors or not _within(ours, theirs):
            raise FormatError(
                f"{sub_cache.name} has cells that {main.name} lacks", offset=cache.offset
            )


def _within(ours: Cells, theirs: Cells) -> bool:
    return all(
        set(ours.positions_of(seq_id)).issubset(theirs.positions_of(seq_id))
        for seq_id in ours.owners
    )
