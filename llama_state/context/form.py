"""The form in which one library writes the states of one model.

Blobs carry no version, and whether the blob of a sequence has a head depends on the build. So
both are known from the library, not from the bytes. How the caches lie in them is known from the
bytes: what the table of architectures says, and what the library says of its model, are hints.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from .. import layout
from .._io.records import logger
from .._llama import calls
from .._llama.calls import Target
from .._llama.facts import Facts
from .._llama.handles import Call
from .._llama.library import Library
from ..errors import FormatError, StateError, UnsupportedError
from ..layout.appended import FilePayload, pack_points, parse_payload
from ..layout.architectures import is_of_table
from ..layout.restore_points import RestorePoint, check_point, listed

if TYPE_CHECKING:
    from .._io import Buffer

LOGGER = logger("layout")

# The last session version whose whole restore keeps only the last stream of a split context.
LOSES_STREAMS: Final = 9


class StateForm:
    """How a library writes the states of one context.

    Args:
        library: The library.
        facts: The context's constants.

    Attributes:
        traits: How the caches lie in the states, as far as that is known by now.
    """

    def __init__(self, library: Library, facts: Facts) -> None:
        self._library = library
        self._facts = facts
        self.traits: tuple[layout.Traits, ...] = facts.traits
        self._warned = False

    @property
    def version(self) -> int:
        """The session version of the library."""
        return self._library.session_version

    @property
    def loses_streams(self) -> bool:
        """Whether a whole restore of a split context brings back only the last sequence."""
        return self._library.session_version == LOSES_STREAMS

    def file_kind(self, target: Target) -> tuple[layout.Kind, int]:
        """Return the kind of a native file and the version that it carries."""
        if target is None:
            return "whole", self._library.session_version
        return "sequence", self._library.sequence_version

    def can_convert(self, header: layout.FileHeader) -> bool:
        """Tell whether files of another version can be rewritten as files of the library's."""
        return header.is_known and self.version in layout.SEQUENCE_VERSION

    def file_layout(self, target: Target, payload_offset: int) -> layout.FileLayout:
        """Return how a blob lies over a native file whose payload begins at *payload_offset*."""
        return layout.FileLayout(payload_offset, self._head_size(target))

    def native(self, target: Target, blob: memoryview, headed: bool) -> memoryview:
        """Return a blob with the head that this library wants, or without."""
        if target is None or headed == bool(self._head_size(target)):
            return blob
        if headed:
            return blob[layout.SEQUENCE_HEAD.size :]
        return memoryview(layout.sequence_head(target) + bytes(blob))

    def native_head(self, target: Target) -> bytes:
        """Return what this library wants before a payload that goes to a target."""
        if target is None or not self._head_size(target):
            return b""
        return layout.sequence_head(target)

    def is_headed(self, blob: memoryview) -> bool:
        """Tell whether the blob of a sequence has a head."""
        # Within session version 9 both forms occur: the builds of spring 2026 wrote no head.
        if self._library.session_version == LOSES_STREAMS:
            return layout.has_sequence_head(blob)
        return self._library.sequence_head

    def parse(
        self,
        target: Target,
        blob: Buffer,
        *,
        headed: bool,
        partial: bool = False,
        at: int = 0,
        traits: Sequence[layout.Traits] | None = None,
        version: int | None = None,
    ) -> layout.Layout:
        """Describe a state.

        Args:
            target: A sequence id, or None for the whole context.
            blob: The state.
            headed: The blob of a sequence has a head.
            partial: It was taken with ``partial=True``.
            at: Where it begins in its file.
            traits: How it can be read; None: as :attr:`traits`.
            version: Its session version; None: the library's.

        Raises:
            FormatError: Not such a state, or damaged.
            UnsupportedError: A version that is not known.
        """
        try:
            return layout.parse_state(
                "whole" if target is None else "sequence",
                blob,
                version=self._library.session_version if version is None else version,
                headed=headed,
                traits=self.traits if traits is None else traits,
                partial=partial,
            )
        except FormatError as error:
            raise error.moved(at) from None
        except UnsupportedError:
            self._library.require_known_version()  # whose error says more
            raise

    def parse_file(
        self,
        data: memoryview,
        header: layout.FileHeader,
        *,
        traits: Sequence[layout.Traits] | None = None,
        version: int | None = None,
    ) -> FilePayload:
        """Describe the state in a file; *version* and errors as of :meth:`parse`."""
        self._library.require_known_version()
        version = self._library.session_version if version is None else version
        return parse_payload(data, header, version=version, traits=traits or self.traits)

    def pack_points(
        self, target: Target, points: Sequence[RestorePoint], blob: Buffer
    ) -> list[Buffer]:
        """Return what follows the payload of a file, for restore points of the state *blob*.

        Raises:
            FormatError: One is no partial state of this sequence.
        """
        return list(pack_points(self.own_points(target, points, blob)))

    def own_points(
        self, target: Target, points: Sequence[RestorePoint], blob: Buffer
    ) -> list[RestorePoint]:
        """Return restore points of the state *blob*, in order; errors as :meth:`pack_points`."""
        if not (given := listed(points)):
            return []
        parsed = self.parse_own(target, blob)
        in_order = sorted(given, key=lambda point: point.n_tokens)
        return [check_point(point, parsed) for point in in_order]

    def parse_own(
        self, target: Target, blob: Buffer, *, traits: Sequence[layout.Traits] | None = None
    ) -> layout.Layout:
        """Describe what this context has just written; errors as :meth:`parse`."""
        headed = self._library.sequence_head
        try:
            return self.parse(target, blob, headed=headed, traits=traits)
        except FormatError:
            # It cannot be damaged: so it is not what it was taken for.
            with suppress(StateError):
                return self.parse(target, blob, headed=headed, traits=self._facts.others())
            raise

    def read(self, call: Call, seq_id: int, like: layout.Layout | None = None) -> layout.Layout:
        """Read a sequence of the context and describe it, if it can be read so *like* another.

        A state that is empty, or short, reads as several kinds of memory.
        """
        traits = self.traits if like is None else (like.traits, *self.traits)
        with calls.lent(call, seq_id) as blob:
            return self.parse_own(seq_id, blob, traits=traits)

    def readings(self, call: Call, seq_id: int) -> tuple[layout.Traits, ...]:
        """Return all traits that read a sequence of the context, its partial state too."""
        found = self._facts.others()
        for partial in (False, True) if "state-flags" in self._library.capabilities else (False,):
            with calls.lent(call, seq_id, calls.PARTIAL_ONLY if partial else 0) as blob:
                found = tuple(t for t in found if self._reads(t, seq_id, blob, partial=partial))
        return found

    def _reads(self, traits: layout.Traits, seq_id: int, blob: Buffer, *, partial: bool) -> bool:
        headed = self._library.sequence_head
        try:
            self.parse(seq_id, blob, headed=headed, partial=partial, traits=[traits])
        except StateError:
            return False
        return True

    def settle(self, parsed: layout.Layout) -> None:
        """Read the states of the context as one that it wrote or took from now on."""
        if parsed.partial or not parsed.sequences:
            return  # it can be read as one of another kind of memory, too
        read = (parsed.traits, *parsed.alternatives)
        expected = parsed.traits in self.traits
        if not expected or (layout.is_known(self._facts.arch) and not is_of_table(parsed.traits)):
            self._warn(parsed.module)
        known = (traits for traits in self.traits if traits in read)
        self.traits = tuple(known) if expected else read

    def _warn(self, module: layout.Module) -> None:
        if not self._warned:
            LOGGER.warning(
                "the states of this %s model read as those of %s memory, and the table of "
                "llama_state has another one; they are saved and restored as what they are: "
                "please report it",
                self._facts.arch,
                module,
            )
        self._warned = True

    def _head_size(self, target: Target) -> int:
        headed = target is not None and self._library.sequence_head
        return layout.SEQUENCE_HEAD.size if headed else 0
