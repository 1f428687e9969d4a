"""The first cells of a state that is cut off or damaged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from .._io.arguments import checked
from ..errors import FormatError
from .architectures import model_traits
from .blocks import Cells
from .cells import Ownership
from .cursor import Cursor, open_view
from .dsv4 import read_head
from .formats import EXT_WORDS
from .headers import Kind
from .kv import read_leading_cells
from .parse import read_arch, read_source
from .traits import Traits, sub_caches

if TYPE_CHECKING:
    from .._io import Buffer


@checked
def leading_cells(
    data: Buffer, kind: Kind, *, version: int, headed: bool, traits: Sequence[Traits] = ()
) -> tuple[Cells, ...]:
    """Return the cells at the start of a state that cannot be parsed.

    Args:
        data: The state.
        kind: "whole" or "sequence".
        version: Session version of the llama.cpp that wrote it.
        headed: Whether a sequence state has its 8-byte head.
        traits: What is known of the model.

    Returns:
        The cells of the first cache, one :class:`Cells` for each stream before the first damaged
        one; empty if the first cache is recurrent or if not even the start can be read.
    """
    cursor = Cursor(open_view(data))
    arch, source = "", None
    with suppress(FormatError):
        if kind == "whole":
            arch = read_arch(cursor)
        elif headed:
            source = read_source(cursor)
        ownership = Ownership(kind == "whole", source)
        candidates = [one for one in traits if one.arch == arch or kind == "sequence"]
        readings = (
            _leading_cells(cursor.view, cursor.at, one, ownership, version)
            for one in candidates or model_traits(arch)
        )
        return max(readings, key=lambda streams: sum(map(len, streams)), default=())
    return ()


def _leading_cells(
    view: memoryview, start: int, traits: Traits, ownership: Ownership, version: int
) -> tuple[Cells, ...]:
    first = next(iter(sub_caches(traits.module)), None)
    if first is None or first.kind != "kv":
        return ()
    cursor = Cursor(view, start)
    try:
        if traits.module == "dsv4":
            read_head(cursor, partial=False)
        return read_leading_cells(
            cursor,
            ownership,
            version=version,
            ext_words=EXT_WORDS[version] if first.has_ext(traits) else 0,
            k_only=first.is_k_only(traits),
        )
    except FormatError:
        return ()
