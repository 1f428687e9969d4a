"""Where the few parameters that we set lie in structs whose layout moves between builds.

``llama_context_params`` had four sizes in seven months of 2026, and a wrong layout is silent:
the write lands in another field. So the fields are found in the bytes of
``llama_context_default_params()`` by their known defaults. Each pattern must match exactly once,
and a layout that does not match is refused. Pure functions on bytes: no library is called here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Final

from ..errors import UnsupportedError

# Beyond this no known layout has a field; bytes after a struct's real end are anything.
_WINDOW: Final = 192

_HEAD = struct.Struct("<4I")  # n_ctx, n_batch, n_ubatch, n_seq_max
_HEAD_DEFAULTS = (512, 2048, 512, 1)
_MODEL_GPU_LAYERS: Final = 16

# rope_scaling_type, pooling_type, attention_type, flash_attn_type: the only enums that are -1
_ENUMS = re.compile(rb"(?:\xff{4}){4}")
# cb_eval, cb_eval_user_data (null), then type_k, type_v (GGML_TYPE_F16 = 1)
_TYPES = re.compile(rb"\0{16}\x01\0\0\0\x01\0\0\0")
# embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified
_FLAGS = re.compile(rb"\0\x01\x01\x01\x01\0")

CONTEXT_FIELDS: Final[Mapping[str, str]] = {
    "n_ctx": "<I",
    "n_batch": "<I",
    "n_ubatch": "<I",
    "n_seq_max": "<I",
    "flash_attn": "<i",
    "type_k": "<i",
    "type_v": "<i",
    "swa_full": "<?",
    "kv_unified": "<?",
}


def context_offsets(defaults: bytes) -> dict[str, int]:
    """Byte offset of every field of :data:`CONTEXT_FIELDS`.

    Args:
        defaults: The block that ``llama_context_default_params()`` returned.

    Raises:
        UnsupportedError: The block does not look like any layout that we know.
    """
    block = defaults[:_WINDOW]
    if _HEAD.unpack_from(block) != _HEAD_DEFAULTS:
        raise _unknown("llama_context_params", f"it begins with {_HEAD.unpack_from(block)}")
    enums = _only(block, _ENUMS, "the four enums that default to -1", start=_HEAD.size, step=4)
    types = _only(block, _TYPES, "type_k and type_v", start=enums + 16, step=8)
    flags = _only(block, _FLAGS, "the flags", start=types + 24, step=1)
    return {
        "n_ctx": 0,
        "n_batch": 4,
        "n_ubatch": 8,
        "n_seq_max": 12,
        "flash_attn": enums + 12,
        "type_k": types + 16,
        "type_v": types + 20,
        "swa_full": flags + 4,
        "kv_unified": flags + 5,
    }


def model_offsets(defaults: bytes) -> dict[str, int]:
    """Byte offset of ``n_gpu_layers`` in what ``llama_model_default_params()`` returned.

    Raises:
        UnsupportedError: The default at that place is not the known -1.
    """
    if struct.unpack_from("<i", defaults, _MODEL_GPU_LAYERS) != (-1,):
        raise _unknown("llama_model_params", "n_gpu_layers is not at byte 16")
    return {"n_gpu_layers": _MODEL_GPU_LAYERS}


def _only(block: bytes, pattern: re.Pattern[bytes], what: str, *, start: int, step: int) -> int:
    """Offset of the single place at or after *start*, aligned to *step*, where *pattern* fits."""
    found = [
        at for at in range(-(-start // step) * step, len(block), step) if pattern.match(block, at)
    ]
    if len(found) != 1:
        raise _unknown("llama_context_params", f"{what} were found at {found or 'no place'}")
    return found[0]


def _unknown(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"this libllama has a {name} of unknown layout ({why}): llama_state cannot create "
        "contexts with it. Create the context with the binding that brought the library and "
        "give it to llama_state.attach()."
    )
