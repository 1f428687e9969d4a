"""A model file in memory, and the contexts that are created from it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from .. import layout
from .._io import StrPath
from .._io.arguments import checked
from .._io.platform.processes import usable_cores
from .._llama._llama_cffi import lib
from .._llama.discovery import load_library
from .._llama.facts import CreationOptions, metadata
from .._llama.handles import Owner
from .._llama.library import Library
from ..errors import CapacityError, UnsupportedError
from . import engine
from .context import Context
from .identity import origin_of_file

_CACHE_TYPES = {kind.name: number for number, kind in layout.TYPES.items()}
# As llama.cpp's command line spells it, and as its enum counts.
_FLASH_ATTENTION: Final = {None: -1, "auto": -1, "off": 0, "on": 1, -1: -1, 0: 0, 1: 1}
_INT32: Final = 2**31 - 1


@checked
class Model(Owner):
    """A GGUF model.

    A context manager. A model that is closed, or garbage collected, before its contexts is
    freed after the last of them.

    Args:
        path: The GGUF file.
        library: The libllama to use; :func:`llama_state.load_library` finds one by default.
        n_gpu_layers: Layers to put on a GPU; -1 for all, None for llama.cpp's default.

    Attributes:
        path: The file, as given.
        library: The library that holds it.
        arch: Its ``general.architecture``.
        n_vocab: Tokens in its vocabulary.

    Raises:
        LibraryNotFoundError: There is no libllama.
        ModelNotFoundError: There is no such file.
        ModelLoadError: llama.cpp cannot load the file; ``log`` says why.
        ValueError: *n_gpu_layers* is out of range.
    """

    def __init__(
        self, path: StrPath, library: Library | None = None, n_gpu_layers: int | None = None
    ) -> None:
        self.path: str = os.fspath(path)
        self.library: Library = library if library is not None else load_library()
        self._origin = origin_of_file(self.path)
        self._handle = engine.load_model(self.library, self.path, n_gpu_layers)
        with self._handle.use() as call:
            self.arch: str = metadata(call.api, call.ptr, "general.architecture") or ""
            vocab = lib.llama_model_get_vocab(call.api, call.ptr)
            self.n_vocab: int = lib.llama_vocab_n_tokens(call.api, vocab)

    def __repr__(self) -> str:
        closed = ", closed" if self._handle.closed else ""
        return f"<Model {self.path!r} ({self.arch}, {self.n_vocab} tokens{closed})>"

    def metadata(self, key: str) -> str | None:
        """Return a value of the GGUF's metadata as text, or None where the key is not there."""
        with self._handle.use() as call:
            return metadata(call.api, call.ptr, key)

    def context(
        self,
        n_ctx: int = 0,
        n_batch: int | None = None,
        n_seq_max: int = 1,
        kv_unified: bool = False,
        flash_attn: bool | int | str | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        n_threads: int | None = None,
        swa_full: bool = True,
    ) -> Context:
        """Make a context: the memory of one or more sequences.

        Args:
            n_ctx: Cells, over all sequences; 0 for the length the model was trained with.
            n_batch: Tokens that one C call decodes, *n_seq_max* or more; longer runs are cut in
                pieces.
            n_seq_max: Sequences, 1 to 256, and no more than there are cells.
            kv_unified: One stream of cells shared by all sequences, instead of one each.
            flash_attn: On (True, "on", 1), off (False, "off", 0), or llama.cpp's choice (None,
                "auto", -1). A state saved with it off fits only contexts with it off.
            type_k: Cache type of K: f32, f16, bf16, q8_0, q4_0, ...
            type_v: Cache type of V; the quantized ones need flash attention.
            n_threads: Threads that compute, 1 to 512; None for all cores that the process may
                use.
            swa_full: Keep all cells of sliding-window layers, not only the window.

        Raises:
            ContextError: llama.cpp refused the combination; ``log`` says why.
            CapacityError: More sequences than cells, or than *n_batch*.
            ValueError: A number is out of its range, or *flash_attn* is none of these.
            UnsupportedError: An unknown cache type, different ones where the model keeps no V,
                or a libllama whose parameters have an unknown layout.
            ClosedError: The model was closed.
        """
        # llama.cpp computes with one token of each sequence at least, and aborts if it cannot.
        cells = n_ctx or int(self.metadata(f"{self.arch}.context_length") or _INT32)
        if n_seq_max > cells:
            raise CapacityError("n_ctx, cells for n_seq_max sequences", need=n_seq_max, have=cells)
        if n_batch is not None and n_batch < n_seq_max:
            what = "n_batch, one token of each sequence"
            raise CapacityError(what, need=n_seq_max, have=n_batch)
        if type_k != type_v and all(traits.k_only for traits in self._traits()):
            # Newer builds refuse it, older ones crash on some combinations.
            raise UnsupportedError(f"a {self.arch} model keeps no V: type_v must be {type_k} too")
        fields: dict[str, int | bool] = {
            "n_ctx": n_ctx,
            "n_seq_max": n_seq_max,
            "kv_unified": kv_unified,
            "flash_attn": _flash_attention(flash_attn),
            "type_k": _cache_type(type_k),
            "type_v": _cache_type(type_v),
            "swa_full": swa_full,
        }
        if n_batch is not None:
            fields["n_batch"] = n_batch
        typed = {"flash_attn": flash_attn, "type_k": type_k, "type_v": type_v}
        handle = engine.create_context(self._handle, self.path, fields, typed)
        threads = n_threads if n_threads is not None else usable_cores()
        with handle.use() as call:
            lib.llama_set_n_threads(call.api, call.ptr, threads, threads)
        options = CreationOptions({"type_k": type_k, "type_v": type_v}, swa_full)
        return Context(handle, options, self._origin)

    def _traits(self) -> tuple[layout.Traits, ...]:
        with self._handle.use() as call:
            return layout.model_traits(self.arch, lambda key: metadata(call.api, call.ptr, key))

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of *text*.

        Args:
            add_special: Put the tokens around it that the model wants, such as BOS.
            parse_special: Read ``<s>`` and the like as tokens, not as text.

        Raises:
            UnsupportedError: The model has no tokenizer.
        """
        with self._handle.use() as call:
            return engine.tokenize(
                call, text.encode(), add_special=add_special, parse_special=parse_special
            )

    def detokenize(self, tokens: Iterable[int], *, unparse_special: bool = False) -> str:
        """Text of *tokens*; bytes that are no UTF-8 become U+FFFD.

        Args:
            unparse_special: Write special tokens out instead of leaving them away.

        Raises:
            UnsupportedError: The model has no tokenizer.
            DecodeError: A token is not in the vocabulary.
        """
        ids = engine.checked_tokens(tokens, self.n_vocab)
        with self._handle.use() as call:
            return engine.detokenize(call, ids, unparse_special=unparse_special).decode(
                "utf-8", "replace"
            )


def _flash_attention(value: bool | int | str | None) -> int:
    """Return the value of llama.cpp's enum ``llama_flash_attn_type``."""
    if value not in _FLASH_ATTENTION:
        raise ValueError(f"flash_attn must be on, off or auto (True, False or None), not {value!r}")
    return _FLASH_ATTENTION[value]


def _cache_type(name: str) -> int:
    if name not in _CACHE_TYPES:
        raise UnsupportedError(
            f"cache type {name!r} is not one of {', '.join(sorted(_CACHE_TYPES))}"
        )
    return _CACHE_TYPES[name]
