"""The recipes of docs/llama-cpp-python.md for other holders of a context."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import cffi
import pytest

import llama_state as ls
from tests.adapters.llamas import llama_cpp

pytestmark = pytest.mark.llama_cpp

Make = Callable[..., Any]


def test_a_raw_pointer_of_ctypes(make: Make) -> None:
    """A context made with llama.cpp's functions through ctypes, by whoever declares them."""
    model = llama_cpp.llama_model_load_from_file(
        str(make.path("llama-dense")).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 256
    pointer = llama_cpp.llama_init_from_model(model, params)
    library = ls.load_library(llama_cpp.llama_cpp._lib._name)
    for obj in (pointer, ctypes.c_void_p(pointer)):
        with ls.attach(obj, library) as ctx:
            ctx.clear()
            ctx.decode([65, 66, 67])
            blob = ctx.snapshot()
            ctx.decode([68])
            expected = bytes(ctx.logits())
            assert ctx.restore(blob).sequences[0].n_past == 3
            ctx.decode([68])
            assert bytes(ctx.logits()) == expected
    # Theirs to free.
    llama_cpp.llama_free(pointer)
    llama_cpp.llama_model_free(model)


def test_a_pointer_of_another_cffi_module(make: Make) -> None:
    """A cffi module of its own, bound to the same shared object."""
    llm = make()
    ffi = cffi.FFI()
    ffi.cdef("struct llama_context; uint32_t llama_n_ctx(const struct llama_context *);")
    lib = ffi.dlopen(llama_cpp.llama_cpp._lib._name)
    pointer = ffi.cast("struct llama_context *", llm.ctx)
    ctx = ls.attach(pointer, ls.load_library(llama_cpp.llama_cpp._lib._name))
    assert ctx.n_ctx == lib.llama_n_ctx(pointer)
    ctx.decode([65, 66, 67])
    blob = ctx.seq_snapshot()
    ctx.clear()
    assert ctx.seq_restore(blob).sequences[0].n_past == 3
