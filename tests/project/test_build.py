"""The header is the single source of the binding."""

from __future__ import annotations

import re
from pathlib import Path

import build_ffi
from llama_state._llama import library
from llama_state._llama._llama_cffi import ffi, lib

ROOT = Path(__file__).parents[2]
HEADER = (ROOT / "include" / "llama.h").read_text()


def test_every_prototype_is_understood() -> None:
    """No line of the header is passed over: as many functions as there are LLAMA_API lines."""
    declared = re.findall(r"^LLAMA_API", HEADER, re.MULTILINE)
    functions = build_ffi.prototypes(HEADER)
    assert len(functions) == len(declared) > 40
    assert len({f.name for f in functions}) == len(functions)


def test_the_compiled_module_is_that_of_the_header() -> None:
    """The function table has the header's functions, and each has its wrapper."""
    fields = [name for name, _ in ffi.typeof("struct llama_api").fields]
    assert fields == [f.name for f in build_ffi.prototypes(HEADER)]
    assert all(hasattr(lib, name) for name in fields)


def test_the_stubs_are_those_of_the_headers() -> None:
    """The stubs were made from these headers: python build_ffi.py --stubs."""
    for name, text in build_ffi.STUBS.items():
        assert (ROOT / "llama_state" / name).read_text() == text


def test_capabilities_name_functions_of_the_header() -> None:
    """A function is required unless a capability makes it optional."""
    names = {f.name for f in build_ffi.prototypes(HEADER)}
    assert names > library._OPTIONAL


def test_one_line_adds_a_function() -> None:
    """A new prototype becomes a table member, a wrapper and a line of the stub."""
    header = "LLAMA_API const char *llama_new(struct llama_model *model, int32_t n);\n"
    (function,) = build_ffi.prototypes(header)
    assert function.parameters == [("struct llama_model *", "model"), ("int32_t", "n")]
    assert build_ffi.wrapper(function) == (
        "static const char * llama_new(const struct llama_api *api, struct llama_model *model, "
        "int32_t n) { return api->llama_new(model, n); }"
    )
    assert "def llama_new(self, api: LlamaApiPtr, model: LlamaModelPtr, n: int, /)" in (
        build_ffi.stub(header, "", "llama.h")
    )


def test_no_moving_struct_is_laid_out() -> None:
    """Parameter structs are opaque blocks; only the stable batch has fields."""
    structs = dict(re.findall(r"^struct (\w+) \{\n(.*?)\n\};", HEADER, re.MULTILINE | re.DOTALL))
    assert structs.keys() == {"llama_model_params", "llama_context_params", "llama_batch"}
    for name in ("llama_model_params", "llama_context_params"):
        assert structs[name].strip() == "uint64_t block[128];"
