"""The checkpoint: a state with all that is needed to trust it later, on another machine."""

from __future__ import annotations

import json
import pickle
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final

from .. import layout
from .._io import Progress, StrPath, atomic, reading
from .._io.arguments import checked
from .._io.buffers import flat
from .._io.platform.files import OPEN_FILES_STAY
from ..errors import ChecksumError
from ..layout.appended import pack_points, parse_payload
from ..layout.recognition import expect, naming
from ..layout.restore_points import first_known, listed
from ..layout.slots import given_prompt, pack_listed
from . import container, display
from .fingerprint import Fingerprint
from .metadata import (
    POINTS,
    checked_logits,
    decode,
    encode,
    point_fields,
    points_of,
    split_payload,
)

if TYPE_CHECKING:
    from .._io import Buffer

_PIECE: Final = 4 << 20
NOTHING_KNOWN: Final = Fingerprint()


@checked
class Checkpoint:
    """The state of a context or of one sequence, and what it belongs to.

    Created by :meth:`llama_state.Context.checkpoint`, restored by
    :meth:`llama_state.Context.resume`. It is a value: it never changes, and ``==`` compares all of
    it. ``len()`` and ``memoryview(checkpoint)`` (Python 3.12) are those of its payload. It can be
    pickled, with protocol 5 out of band.

    Args:
        payload: The state as llama.cpp wrote it; not copied.
        kind: "whole" or "sequence".
        session_version: The session version of the llama.cpp that wrote it.
        source: The sequence that was saved; None for a whole context.
        tokens: The tokens that were decoded to get this state.
        logits: float32 logits of the last token of a sequence, one for each vocabulary entry.
        logits_of: The sequence that *logits* belong to.
        fingerprint: The model and the settings that it belongs to.
        meta: Any JSON object of the caller, kept with it.
        packed_tokens: int32 words of a token list that llama-server packed, for files of one
            sequence. Its tokens need not be given again.
        restore_points: Partial snapshots of earlier moments of the sequence, the earliest first.

    Attributes:
        kind: "whole" or "sequence".
        session_version: The session version of the llama.cpp that wrote it.
        source: The sequence that was saved; None for a whole context.
        tokens: The tokens that were decoded to get this state; empty where there are *media*, since
            then it is not the tokens alone that give it.
        media: The images and sounds in the prompt of a slot file, in order.
        slot: The prompt of a slot file, with its images and sounds; None of other states.
        packed_tokens: int32 words of a token list that llama-server packed, or empty.
        logits: A read-only view of float32, or None.
        logits_of: The sequence that the logits belong to, or None.
        fingerprint: The model and the settings that it belongs to.
        payload: A read-only view of the state.
        restore_points: The partial states of earlier moments, the earliest first: those of a slot
            file, or those that were given.

    Raises:
        FormatError: What :meth:`load` would refuse: a sequence without *source*, a whole context
            with one, *meta* that is not a JSON object, a token that is not a 32-bit integer,
            *packed_tokens* that are no such list, or not one of *tokens*, *logits* of no float32,
            texts of a fingerprint that are too long.
        VersionError: The session version is not known.
    """

    def __init__(
        self,
        payload: Buffer,
        *,
        kind: layout.Kind,
        session_version: int,
        source: int | None = None,
        tokens: Iterable[int] = (),
        logits: Buffer | None = None,
        logits_of: int | None = None,
        fingerprint: Fingerprint = NOTHING_KNOWN,
        meta: Mapping[str, Any] | None = None,
        packed_tokens: Iterable[int] = (),
        restore_points: Iterable[layout.RestorePoint] = (),
    ) -> None:
        self.kind: layout.Kind = kind
        self.session_version = session_version
        self.source = source
        self.packed_tokens: tuple[int, ...] = tuple(layout.token_array(packed_tokens))
        prompt = given_prompt(layout.token_array(tokens), layout.token_array(self.packed_tokens))
        self.tokens: tuple[int, ...] = prompt.tokens
        self.media: tuple[layout.MediaChunk, ...] = prompt.media
        self.slot: layout.SlotTokens | None = prompt.slot
        self.fingerprint = fingerprint
        self.payload: memoryview = flat(payload).toreadonly()
        self.logits: memoryview[float] | None = checked_logits(logits)
        self.logits_of = logits_of
        self.restore_points: tuple[layout.RestorePoint, ...] = tuple(
            replace(point, blob=flat(point.blob).toreadonly()) for point in listed(restore_points)
        )
        self._metadata = encode(
            {
                "kind": kind,
                "source": source,
                "session version": session_version,
                "fingerprint": fingerprint.to_json(),
                "logits of": logits_of,
                "packed tokens": bool(self.packed_tokens),
                POINTS: point_fields(self.restore_points),
                "meta": dict(meta or {}),
            }
        )
        self._file: reading.WatchedFile | None = None

    # -- as a value

    @property
    def meta(self) -> dict[str, Any]:
        """The JSON object of the caller: a copy."""
        meta: dict[str, Any] = json.loads(self._metadata)["meta"]
        return meta

    @property
    def sequence_version(self) -> int:
        """The sequence version that belongs to :attr:`session_version`."""
        return layout.SEQUENCE_VERSION[self.session_version]

    @cached_property
    def layout(self) -> layout.Layout:
        """What the payload holds, and where.

        Raises:
            FormatError: The payload is damaged.
            UnsupportedError: Its format is not known.
        """
        return layout.parse_state(
            self.kind,
            self.payload,
            version=self.session_version,
            headed=layout.has_sequence_head(self.payload),
            traits=_traits(self.fingerprint),
            others=True,
        )

    def __len__(self) -> int:
        return len(self.payload)

    def __bool__(self) -> bool:
        return True

    def __buffer__(self, flags: int) -> memoryview:
        return self.payload

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Checkpoint):
            return NotImplemented
        return (
            self._metadata == other._metadata
            and self._token_bytes() == other._token_bytes()
            and self._logit_bytes() == other._logit_bytes()
            and all(map(_equal, self._states(), other._states()))
        )

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return display.line(self)

    def _repr_html_(self) -> str:
        """Return what it holds as a table, for notebooks."""
        return display.as_table(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        states = map(pickle.PickleBuffer if protocol >= 5 else bytes, self._states())
        heads = (self._metadata, self._token_bytes(), self._logit_bytes())
        return from_parts, (next(states), *heads, *states)

    def _states(self) -> Iterator[memoryview]:
        """Yield the state, and the blobs of the restore points."""
        yield self.payload
        for point in self.restore_points:
            yield flat(point.blob)

    def _token_bytes(self) -> bytes:
        """Return the token list, packed or not, as files store it."""
        return array("i", self.packed_tokens or self.tokens).tobytes()

    def _logit_bytes(self) -> bytes:
        return b"" if self.logits is None else self.logits.tobytes()

    # -- containers

    def save(
        self,
        path: StrPath,
        *,
        key: bytes | None = None,
        compress: bool = False,
        durable: bool = True,
        replace: bool = True,
        progress: Progress | None = None,
    ) -> int:
        """Write the checkpoint to a file.

        Args:
            path: The file. An existing one is replaced only by a complete new one.
            key: Authenticate the file with this secret of 16 bytes or more.
            compress: Compress with zstd the byte planes of the chunks that get at least 2 %
                smaller. Slower than a local disk: use it for networks.
            durable: Wait until the file is on the disk.
            replace: False: never replace an existing file.
            progress: Called with the bytes written and the bytes in total. An exception in it
                stops the save; the old file is unchanged.

        Returns:
            Bytes written.

        Raises:
            SaveError: It could not be written; the old file is unchanged.
            FileExistsError: There is a file, with ``replace=False``.
            UnsupportedError: *compress* needs zstandard, which is not installed.
        """
        parts = self._parts(key, compress)
        size = container.at_most(
            len(self._metadata),
            sum(map(len, self._states())),
            n_tokens=len(self.packed_tokens or self.tokens),
            n_logits=len(self.logits or ()),
        )
        return atomic.write_file(
            path, parts, durable=durable, at_most=size, replace=replace, progress=progress
        )

    def to_bytes(self, *, key: bytes | None = None, compress: bool = False) -> bytes:
        """Return what :meth:`save` would write."""
        return b"".join(self._parts(key, compress))

    def _parts(self, key: bytes | None, compress: bool) -> Iterator[Buffer]:
        state, *more = self._states()
        return container.pack(
            self._metadata,
            state,
            more=more,
            tokens=self._token_bytes(),
            logits=self._logit_bytes(),
            key=key,
            compress=compress,
        )

    @classmethod
    def load(
        cls,
        path: StrPath,
        *,
        key: bytes | None = None,
        mapped: bool | None = None,
        max_size: int | None = None,
        progress: Progress | None = None,
    ) -> Checkpoint:
        """Read and verify a file that :meth:`save` wrote.

        Args:
            path: The file.
            key: The key that the file must be authenticated with. Without it, the file must not be
                authenticated.
            mapped: Map the file for as long as the checkpoint lives, instead of reading it into
                memory. Map only files that are replaced, as :meth:`save` does, not rewritten: if
                the file is truncated while it is mapped, the process is killed. None: unless there
                is a *key*, and not on Windows, where a mapped file cannot be replaced. With a key,
                it must not be True: who can write to a mapped file could change it after it was
                verified.
            max_size: The most bytes that the state may have when it is decompressed. None: 1024
                times the size of the file.
            progress: Called with the bytes verified and the bytes in total.

        Raises:
            OSError: It cannot be read.
            FormatError: Not a checkpoint, or damaged: also as ChecksumError, TruncatedError or
                VersionError. Or it has more than *max_size* bytes.
            UnsupportedError: It is compressed, and zstandard is not installed.
            ValueError: Both *key* and *mapped* are given.
        """
        if mapped and key is not None:
            raise ValueError("with a key, the file is read: mapped=True is not possible")
        with naming(path):
            if mapped or (mapped is None and key is None and not OPEN_FILES_STAY):
                file = reading.WatchedFile(path)
                expect(path, file.view, "checkpoint")
                checkpoint = cls.from_bytes(file.view, max_size=max_size, progress=progress)
                checkpoint._file = file
                return checkpoint
            data = reading.read_file(path)
            expect(path, data, "checkpoint")
            return cls.from_bytes(data, key=key, max_size=max_size, progress=progress)

    @classmethod
    def from_bytes(
        cls,
        data: Buffer,
        *,
        key: bytes | None = None,
        max_size: int | None = None,
        progress: Progress | None = None,
    ) -> Checkpoint:
        """Verify and read the result of :meth:`to_bytes`; the payload is a view of *data*.

        The other arguments and the errors are those of :meth:`load`.
        """
        opened = container.open_container(data, key=key, max_size=max_size)
        opened.verify(progress)
        return from_parts(opened.payload(), bytes(opened.metadata), opened.tokens, opened.logits)

    def check_unchanged(self) -> None:
        """Check that the mapped file, if there is one, was not written to since it was opened.

        By its size and its time: this finds a mistake, not a forgery, which only a key does.

        Raises:
            ChecksumError: It was.
        """
        if self._file is not None and not self._file.unchanged():
            raise ChecksumError("the file was written to after it was loaded: load it again")

    # -- native files

    def to_native(
        self,
        path: StrPath,
        *,
        durable: bool = True,
        replace: bool = True,
        progress: Progress | None = None,
    ) -> int:
        """Write llama.cpp's own session or sequence file.

        Such files have no place for fingerprint, logits and *meta*. Restore points are written as
        llama-server (build 11549 or newer) has them; llama.cpp itself ignores them.

        Args:
            path: The file. An existing one is replaced only by a complete new one.
            durable: Wait until the file is on the disk.
            replace: See :meth:`save`.
            progress: See :meth:`save`.

        Returns:
            Bytes written.

        Raises:
            SaveError: It could not be written; the old file is unchanged.
            FileExistsError: There is a file, with ``replace=False``.
        """
        whole = self.kind == "whole"
        version = self.session_version if whole else self.sequence_version
        header = pack_listed(self.kind, version, array("i", self._token_bytes()))
        head_size = layout.SEQUENCE_HEAD.size if layout.has_sequence_head(self.payload) else 0
        place = layout.FileLayout(len(header), head_size)
        points = pack_points([first_known(one, self.layout) for one in self.restore_points])
        parts: list[Buffer] = [header, place.payload(self.payload), *points]
        return atomic.write_file(path, parts, durable=durable, replace=replace, progress=progress)

    @classmethod
    def from_native(
        cls,
        path: StrPath,
        *,
        fingerprint: Fingerprint = NOTHING_KNOWN,
        meta: Mapping[str, Any] | None = None,
        source: int = 0,
        mapped: bool = False,
    ) -> Checkpoint:
        """Read llama.cpp's own session or sequence file, or a slot file of llama-server.

        Args:
            path: The file.
            fingerprint: The model and the settings that it belongs to, which the file does not
                record: :attr:`llama_state.Context.fingerprint` of the context it was saved from.
            meta: As in :class:`Checkpoint`.
            source: The sequence that was saved, for files that do not record it (recurrent
                states).
            mapped: Map the file for as long as the checkpoint lives, instead of reading it into
                memory. llama.cpp and llama-server rewrite such files in place: if that can happen,
                do not map them. The payload would change, or the process be killed.

        Raises:
            OSError: It cannot be read.
            FormatError: Not such a file, or damaged.
            VersionError: Its version is not known.
            UnsupportedError: Its format is not known.
        """
        with naming(path):
            return cls._of_native(path, fingerprint, meta, source, mapped=mapped)

    @classmethod
    def _of_native(
        cls,
        path: StrPath,
        fingerprint: Fingerprint,
        meta: Mapping[str, Any] | None,
        source: int,
        *,
        mapped: bool,
    ) -> Checkpoint:
        file = reading.WatchedFile(path, writable=True) if mapped else None
        data = file.view if file else reading.read_file(path)
        expect(path, data, "session file", "sequence file", "slot file")
        header = layout.parse_file_header(data)
        prompt = layout.listed_tokens(data, header)
        start, version = header.payload_offset, header.session_version
        traits = _traits(fingerprint)
        parsed, end, points = parse_payload(data, header, version=version, traits=traits)
        if header.kind == "sequence":
            source = source if parsed.source is None else parsed.source
            place = layout.FileLayout(start, layout.SEQUENCE_HEAD.size)
            # This changes our copy of the page, not the file.
            data[place.blob_offset : start] = layout.sequence_head(source)
            start = place.blob_offset
        checkpoint = cls(
            data[start:end],
            kind=header.kind,
            session_version=version,
            source=None if header.kind == "whole" else source,
            tokens=() if prompt.slot else prompt.words,
            packed_tokens=prompt.words if prompt.slot else (),
            fingerprint=fingerprint,
            meta=meta,
            restore_points=points,
        )
        checkpoint._file = file
        return checkpoint


def from_parts(
    payload: Buffer,
    metadata: bytes,
    token_words: Buffer,
    logits: Buffer,
    *blobs: Buffer,
    damaged: bool = False,
) -> Checkpoint:
    """Return the checkpoint of the parts of a container or of a pickle, without verifying them.

    Args:
        payload: The state; without *blobs*, those of the restore points follow in it.
        blobs: Those of the restore points.
        damaged: The payload is damaged or missing: the restore points are left out.
    """
    fields = decode(metadata)
    states = (payload, *blobs) if blobs else split_payload(payload, fields[POINTS])
    words = flat(token_words).cast("i")
    packed = fields["packed tokens"]
    return Checkpoint(
        states[0],
        kind=fields["kind"],
        session_version=fields["session version"],
        source=fields["source"],
        tokens=() if packed else words,
        packed_tokens=words if packed else (),
        logits=logits if len(memoryview(logits)) else None,
        logits_of=fields["logits of"],
        fingerprint=Fingerprint.from_json(fields["fingerprint"]),
        meta=fields["meta"],
        restore_points=() if damaged else points_of(fields[POINTS], states[1:]),
    )


def _traits(fingerprint: Fingerprint) -> tuple[layout.Traits, ...]:
    model = fingerprint.model
    return layout.model_traits(model.get("architecture", ""), model.get)


def _equal(a: memoryview, b: memoryview) -> bool:
    # memoryview compares item by item, bytes at the speed of memory: so copy piece by piece.
    return len(a) == len(b) and all(
        bytes(a[at : at + _PIECE]) == bytes(b[at : at + _PIECE]) for at in range(0, len(a), _PIECE)
    )
