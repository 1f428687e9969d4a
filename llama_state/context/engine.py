"""The small engine: load a model, make a context, decode tokens.

Only this module and the probe of ``_library`` pass llama.cpp's parameter structs, whose layout
moves between builds; see ``_params``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .._llama._llama_cffi import ffi, lib
from .._llama.handles import Call, Handle, Pointer, Resource, owned_context
from .._llama.library import Library
from .._llama.params import CONTEXT_FIELDS, context_offsets, model_offsets
from ..errors import (
    CapacityError,
    ContextError,
    DecodeError,
    FormatError,
    ModelLoadError,
    ModelNotFoundError,
    UnsupportedError,
)
from ..layout.recognition import expect

# llama_decode's return value for "no slot for this batch".
_NO_SLOT: Final = 1
# LLAMA_VOCAB_TYPE_NONE
_NO_VOCABULARY: Final = 0
# Bytes of a file by which it is recognized.
_HEAD: Final = 16


def load_model(library: Library, path: str, n_gpu_layers: int | None) -> Handle:
    """Load a GGUF file.

    Args:
        path: The file.
        n_gpu_layers: Layers to put on a GPU; None for llama.cpp's default.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelLoadError: It is no model, or llama.cpp could not load it; its log lines travel along.
        UnsupportedError: *n_gpu_layers* is given and the struct's layout is unknown, or another
            process loaded the library.
    """
    library.check_process()
    _expect_model(path)
    with library.log.capture():
        params = lib.llama_model_default_params(library.api)
        if n_gpu_layers is not None:
            block = ffi.buffer(ffi.addressof(params))
            at = model_offsets(bytes(block))["n_gpu_layers"]
            struct.pack_into("<i", block, at, n_gpu_layers)
        ptr = lib.llama_model_load_from_file(library.api, os.fsencode(path), params)
        if not ptr:
            raise ModelLoadError("llama.cpp cannot load it", path=path, log=library.log.lines())
    pointer = Pointer(library, ptr, lib.llama_model_free)
    return Handle(Resource(pointer, owned=True), "model")


def _expect_model(path: str) -> None:
    """Raise ModelLoadError for what is no model, with the way to read it; llama.cpp sees the rest.

    Raises:
        ModelNotFoundError: There is nothing.
    """
    file = Path(path)
    if file.is_dir():
        raise ModelLoadError("it is a folder: give the GGUF file in it", path=path)
    if not file.exists():
        raise ModelNotFoundError(path)
    if not file.is_file():  # opening a pipe would wait for a writer
        raise ModelLoadError("it is not a regular file: save the model to one", path=path)
    try:
        with file.open("rb") as opened:
            expect(path, opened.read(_HEAD), "model")
    except FormatError as error:
        raise ModelLoadError(error.reason, path=path) from None
    except OSError as error:
        raise ModelLoadError(f"it cannot be read: {error.strerror}", path=path) from error


def create_context(
    model: Handle, path: str, fields: Mapping[str, int | bool], typed: Mapping[str, object]
) -> Handle:
    """Make a context of *model*.

    Args:
        path: The model's file, for the error.
        fields: Values for names in :data:`CONTEXT_FIELDS`; the rest keeps llama.cpp's defaults.
        typed: The fields that the caller has written in other words, for the error.

    Returns:
        A handle that owns the context, and keeps the model alive.

    Raises:
        ContextError: llama.cpp refused the combination.
        UnsupportedError: The struct's layout is unknown, or the settings did not arrive.
    """
    with model.use() as call:
        params = lib.llama_context_default_params(call.api)
        block = ffi.buffer(ffi.addressof(params))
        offsets = context_offsets(bytes(block))
        for name, value in fields.items():
            struct.pack_into(CONTEXT_FIELDS[name], block, offsets[name], value)
        ptr = lib.llama_init_from_model(call.api, call.ptr, params)
        if not ptr:
            options = {**fields, **typed}
            shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
            raise ContextError(
                f"llama.cpp refused a context with {shown}", path=path, log=call.log()
            )
        context = Handle(owned_context(model.library, ptr, model.pointer), "context")
        _read_back(call, ptr, fields)
    return context


def _read_back(call: Call, ptr: Any, fields: Mapping[str, int | bool]) -> None:
    """Refuse a context that did not get what was requested: its struct has another layout."""
    for name, getter in (("n_seq_max", lib.llama_n_seq_max), ("n_ctx", lib.llama_n_ctx)):
        requested, got = fields.get(name, 0), getter(call.api, ptr)
        # llama.cpp rounds n_ctx up, to 256 cells a sequence at the most.
        if requested and not requested <= got <= requested + 256 * fields.get("n_seq_max", 1):
            raise UnsupportedError(
                f"asked for a context with {name} {requested} and got {got}: this libllama's "
                "llama_context_params has a layout that llama_state misreads"
            )


def checked_tokens(tokens: Iterable[int], n_vocab: int) -> list[int]:
    """*tokens*, which are integers, as a list of ids that are all in the vocabulary.

    Raises:
        DecodeError: One is not; nothing was given to llama.cpp.
    """
    ids = list(tokens)
    for token in ids:
        if not 0 <= token < n_vocab:
            raise DecodeError(
                f"token {token} is outside the vocabulary 0 .. {n_vocab - 1}", code=-1
            )
    return ids


def decode(call: Call, tokens: Sequence[int], seq_id: int, start: int, n_batch: int) -> None:
    """Append *tokens* at position *start*, in pieces of *n_batch*; logits for the last one.

    Raises:
        CapacityError: No room for them.
        DecodeError: llama.cpp refused them otherwise.
        After either the pieces that were decoded before are there.
    """
    for at in range(0, len(tokens), n_batch):
        piece = tokens[at : at + n_batch]
        code = _decode_piece(call, piece, seq_id, start + at, last=at + n_batch >= len(tokens))
        if code == _NO_SLOT:
            raise CapacityError(
                f"cells for {len(tokens)} tokens from position {start} of sequence {seq_id}",
                need=start + len(tokens),
                have=lib.llama_n_ctx_seq(call.api, call.ptr),
                hint="remove sequences, or make a context with a larger n_ctx",
            )
        if code != 0:
            raise DecodeError(
                f"{len(piece)} tokens at position {start + at} of sequence {seq_id}",
                code=code,
                log=call.log(),
            )


def _decode_piece(
    call: Call, piece: Sequence[int], seq_id: int, position: int, *, last: bool
) -> int:
    n = len(piece)
    # Everything that the struct points to is held by these names until the call returns.
    token = ffi.new("int32_t[]", list(piece))
    pos = ffi.new("int32_t[]", list(range(position, position + n)))
    n_seq_id = ffi.new("int32_t[]", [1] * n)
    ids = ffi.new("int32_t[]", [seq_id])
    seq_ids = ffi.new("int32_t *[]", [ids] * n)
    wanted = ffi.new("int8_t[]", n)
    wanted[n - 1] = last
    batch = ffi.new(
        "struct llama_batch *",
        {
            "n_tokens": n,
            "token": token,
            "pos": pos,
            "n_seq_id": n_seq_id,
            "seq_id": seq_ids,
            "logits": wanted,
        },
    )
    return lib.llama_decode(call.api, call.ptr, batch[0])


def last_logits(call: Call, n_vocab: int) -> memoryview[float] | None:
    """Return a copy of the last decoded token's logits, float32; None where there are none."""
    row = lib.llama_get_logits_ith(call.api, call.ptr, -1)
    if not row:
        return None
    return memoryview(bytes(ffi.buffer(row, 4 * n_vocab))).cast("f")


def vocabulary(call: Call) -> Any:
    """Return the model's vocabulary.

    Raises:
        UnsupportedError: It has none: llama.cpp aborts the process when asked to tokenize then.
    """
    vocab = lib.llama_model_get_vocab(call.api, call.ptr)
    if lib.llama_vocab_type(call.api, vocab) == _NO_VOCABULARY:
        raise UnsupportedError("this model has no tokenizer: give token ids")
    return vocab


def tokenize(call: Call, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
    """Token ids of UTF-8 *text* by the model's vocabulary.

    Raises:
        UnsupportedError: The model has no tokenizer.
    """
    vocab = vocabulary(call)
    room = len(text) + 16
    for _ in range(2):
        out = ffi.new("int32_t[]", room)
        n = lib.llama_tokenize(
            call.api, vocab, text, len(text), out, room, add_special, parse_special
        )
        if n >= 0:
            return list(out[0:n])
        room = -n
    raise UnsupportedError("llama.cpp could not tokenize the text")


def detokenize(call: Call, tokens: Sequence[int], *, unparse_special: bool) -> bytes:
    """UTF-8 text of token ids; the caller has checked that they are in the vocabulary."""
    vocab = vocabulary(call)
    ids = ffi.new("int32_t[]", list(tokens))
    room = 8 * len(tokens) + 16
    for _ in range(2):
        out = ffi.new("char[]", room)
        n = lib.llama_detokenize(call.api, vocab, ids, len(ids), out, room, False, unparse_special)
        if n >= 0:
            return bytes(ffi.buffer(out, n))
        room = -n
    raise UnsupportedError("llama.cpp could not turn the tokens into text")
