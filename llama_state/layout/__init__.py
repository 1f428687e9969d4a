"""The byte layout of llama.cpp states: parse, describe, compare and cut them, without llama.cpp.

Pure functions: they take bytes and return frozen descriptions. Little-endian hosts only.
"""

from __future__ import annotations

from .architectures import is_known, model_traits
from .blocks import (
    UNKNOWN_ID,
    Block,
    Cache,
    Cells,
    Compressed,
    Compressor,
    KVCache,
    RecurrentCache,
    Stream,
)
from .conversion import Form, convert, form_of
from .cut import sequence_from_whole
from .formats import (
    MAX_SEQUENCES,
    SEQUENCE_HEAD,
    SEQUENCE_MAGIC,
    SEQUENCE_VERSION,
    TYPES,
    TensorType,
)
from .geometry import CacheGeometry, Geometry, differences, merge
from .headers import (
    FileHeader,
    FileLayout,
    Kind,
    pack_file_header,
    parse_file_header,
    sequence_head,
    token_array,
    unpack_tokens,
)
from .parse import has_sequence_head, parse_sequence, parse_state, parse_whole
from .pieces import Group, groups_of, take
from .recognition import Recognized, recognize
from .restore_points import RestorePoint
from .salvage import leading_cells
from .slots import MediaChunk, Prompt, SlotTokens, is_packed, listed_tokens, parse_slot_tokens
from .spans import Span
from .state import Layout
from .traits import Module, Traits, Window, has_partial

__all__ = [
    "MAX_SEQUENCES",
    "SEQUENCE_HEAD",
    "SEQUENCE_MAGIC",
    "SEQUENCE_VERSION",
    "TYPES",
    "UNKNOWN_ID",
    "Block",
    "Cache",
    "CacheGeometry",
    "Cells",
    "Compressed",
    "Compressor",
    "FileHeader",
    "FileLayout",
    "Form",
    "Geometry",
    "Group",
    "KVCache",
    "Kind",
    "Layout",
    "MediaChunk",
    "Module",
    "Prompt",
    "Recognized",
    "RecurrentCache",
    "RestorePoint",
    "SlotTokens",
    "Span",
    "Stream",
    "TensorType",
    "Traits",
    "Window",
    "convert",
    "differences",
    "form_of",
    "groups_of",
    "has_partial",
    "has_sequence_head",
    "is_known",
    "is_packed",
    "leading_cells",
    "listed_tokens",
    "merge",
    "model_traits",
    "pack_file_header",
    "parse_file_header",
    "parse_sequence",
    "parse_slot_tokens",
    "parse_state",
    "parse_whole",
    "recognize",
    "sequence_from_whole",
    "sequence_head",
    "take",
    "token_array",
    "unpack_tokens",
]
