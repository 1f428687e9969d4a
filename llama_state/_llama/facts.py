"""What of a context never changes, read from llama.cpp once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .. import layout
from ..errors import SequenceIdError
from ..layout.architectures import every_kind
from ._llama_cffi import ffi, lib
from .handles import Call


@dataclass(frozen=True, slots=True)
class CreationOptions:
    """Options of a context of ours that cannot be read back from it.

    Attributes:
        types: Cache type by option name, for explaining a refusal: of some architectures
            llama.cpp makes caches of other types than these.
        swa_full: Caches of sliding-window layers have ``n_ctx_seq`` cells too.
    """

    types: Mapping[str, str] = field(default_factory=dict)
    swa_full: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """The constants of a context that its state is checked against.

    Attributes:
        arch: The model's ``general.architecture``.
        traits: How the model's states are laid out, by the table of architectures: a hint.
        others: Returns how else they could be, if none of *traits* reads them.
        recurrent: The memory is recurrent or hybrid: it cannot be cut, only emptied.
        encoder: An encoder-decoder model: decoding before encoding aborts the process.
        n_swa: Size of the sliding attention window in positions, 0 for none.
        n_vocab: Tokens in the vocabulary.
        n_ctx: Cells of the whole context.
        n_ctx_seq: Cells that one sequence, or the unified cache, has.
        n_batch: Tokens that one call of ``llama_decode`` takes.
        n_ubatch: Tokens that are computed at once.
        n_seq_max: Sequence ids run from 0 to this minus 1.
        options: What only the maker of the context knows; nothing for a borrowed one.
    """

    arch: str
    traits: tuple[layout.Traits, ...]
    others: Callable[[], tuple[layout.Traits, ...]]
    recurrent: bool
    encoder: bool
    n_swa: int
    n_vocab: int
    n_ctx: int
    n_ctx_seq: int
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    options: CreationOptions

    def check_sequence(self, seq_id: int) -> int:
        """Return *seq_id*, if it is one of the context.

        Raises:
            SequenceIdError: It is not; llama.cpp would abort the process.
        """
        if not 0 <= seq_id < self.n_seq_max:
            raise SequenceIdError(seq_id, limit=self.n_seq_max)
        return seq_id


def context_facts(call: Call, options: CreationOptions) -> Facts:
    """Read the facts of the context under *call*."""
    api, ctx = call.api, call.ptr
    model = lib.llama_get_model(api, ctx)
    arch = metadata(api, model, "general.architecture") or ""
    recurrent = lib.llama_model_is_recurrent(api, model)
    hybrid = lib.llama_model_is_hybrid(api, model)
    n_swa = max(lib.llama_model_n_swa(api, model), 0)
    told: dict[str, Any] = {
        "rope_type": lib.llama_model_rope_type(api, model),
        "recurrent": recurrent,
        "hybrid": hybrid,
        "n_swa": n_swa,
    }
    traits = layout.model_traits(arch, lambda key: metadata(api, model, key), **told)
    return Facts(
        arch=arch,
        traits=traits,
        others=partial(every_kind, arch, **told),
        recurrent=recurrent or hybrid,
        encoder=lib.llama_model_has_encoder(api, model),
        n_swa=max([n_swa, *(one.window.size for one in traits if one.window)]),
        n_vocab=lib.llama_vocab_n_tokens(api, lib.llama_model_get_vocab(api, model)),
        n_ctx=lib.llama_n_ctx(api, ctx),
        n_ctx_seq=lib.llama_n_ctx_seq(api, ctx),
        n_batch=lib.llama_n_batch(api, ctx),
        n_ubatch=lib.llama_n_ubatch(api, ctx),
        n_seq_max=lib.llama_n_seq_max(api, ctx),
        options=options,
    )


def metadata(api: Any, model: Any, key: str) -> str | None:
    """Return a GGUF value of the model as text, or None where the key is not there."""
    return _text(partial(lib.llama_model_meta_val_str, api, model, key.encode()))


def hyperparameters(api: Any, model: Any, prefix: str) -> dict[str, str]:
    """Return the GGUF keys that begin with *prefix*, with their values: no arrays."""
    indices = range(lib.llama_model_meta_count(api, model))
    keys = (_text(partial(lib.llama_model_meta_key_by_index, api, model, i)) for i in indices)
    return {key: metadata(api, model, key) or "" for key in keys if key and key.startswith(prefix)}


def _text(read: Callable[[Any, int], int]) -> str | None:
    """Return what *read* writes to a buffer when it is called with the buffer and its size."""
    size = read(ffi.NULL, 0)
    if size < 0:
        return None
    out = ffi.new("char[]", size + 1)
    read(out, size + 1)
    return ffi.string(out).decode("utf-8", "replace")
