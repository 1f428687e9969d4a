"""The form in which one library writes the states of one model.

Blobs carry no version, and whether the blob of a sequence has a head depends on the build. So
both are known from the library, not from the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from .. import layout
from .._llama import calls
from .._llama.calls import Target
from .._llama.facts import Facts
from .._llama.handles import Call
from .._llama.library import Library
from ..errors import FormatError
from ..layout.restore_points import (
    FilePayload,
    RestorePoint,
    check_point,
    pack_points,
    parse_payload,
)

if TYPE_CHECKING:
    from .._io import Buffer

# The last session version whose whole restore keeps only the last stream of a split context.
LOSES_STREAMS: Final = 9


class StateForm:
    """How a library writes the states of one context.

    Args:
        library: The library.
        facts: The context's constants.
    """

    def __init__(self, library: Library, facts: Facts) -> None:
        self._library = library
        self._facts = facts

    @property
    def loses_streams(self) -> bool:
        """Whether a whole restore of a split context brings back only the last sequence."""
        return self._library.session_version == LOSES_STREAMS

    def file_kind(self, target: Target) -> tuple[layout.Kind, int]:
        """Return the kind of a native file and the version that it carries."""
        if target is None:
            return "whole", self._library.session_version
        return "sequence", self._library.sequence_version

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

    def is_headed(self, blob: memoryview) -> bool:
        """Tell whether the blob of a sequence has a head."""
        # Within session version 9 both forms occur: the builds of spring 2026 wrote no head.
        if self._library.session_version == LOSES_STREAMS:
            return layout.has_sequence_head(blob)
        return self._library.sequence_head

    def parse(
        self, target: Target, blob: Buffer, *, headed: bool, partial: bool = False, at: int = 0
    ) -> layout.Layout:
        """Describe a state of this library's version, read as the context's model says.

        Args:
            target: A sequence id, or None for the whole context.
            blob: The state.
            headed: The blob of a sequence has a head.
            partial: It was taken with ``partial=True``.
            at: Where it begins in its file.

        Raises:
            FormatError: Not such a state, or damaged.
            UnsupportedError: A version that is not known.
        """
        try:
            return layout.parse_state(
                "whole" if target is None else "sequence",
                blob,
                version=self._library.session_version,
                headed=headed,
                traits=self._facts.traits,
                partial=partial,
            )
        except FormatError as error:
            raise error.moved(at) from None

    def parse_file(self, data: memoryview, header: layout.FileHeader) -> FilePayload:
        """Describe the state in a file of this library's version; errors as :meth:`parse`."""
        version = self._library.session_version
        return parse_payload(data, header, version=version, traits=self._facts.traits)

    def pack_points(
        self, target: Target, points: Sequence[RestorePoint], blob: Buffer
    ) -> list[Buffer]:
        """Return what follows the payload of a file, for restore points of the state *blob*.

        Raises:
            FormatError: One is no partial state of this sequence.
        """
        if not points:
            return []
        wrong = next((point for point in points if not isinstance(point, RestorePoint)), None)
        if wrong is not None:
            raise TypeError(f"restore_points must be RestorePoint values, not {type(wrong)}")
        parsed = self.parse_own(target, blob)
        return list(pack_points([check_point(point, parsed) for point in points]))

    def parse_own(self, target: Target, blob: Buffer) -> layout.Layout:
        """Describe what this library has just written; errors as :meth:`parse`."""
        return self.parse(target, blob, headed=self._library.sequence_head)

    def read(self, call: Call, seq_id: int) -> layout.Layout:
        """Read a sequence of the context and describe it; errors as :meth:`parse`."""
        with calls.lent(call, seq_id) as blob:
            return self.parse(seq_id, blob, headed=self._library.sequence_head)

    def _head_size(self, target: Target) -> int:
        headed = target is not None and self._library.sequence_head
        return layout.SEQUENCE_HEAD.size if headed else 0
