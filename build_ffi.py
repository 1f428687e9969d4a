"""Makes the two compiled modules of llama_state out of the headers in ``include/``.

``llama_state._llama._llama_cffi`` is made of ``llama.h`` and ``log_sink.h``, and
``llama_state._io._pages`` of ``pages.h``, which knows nothing of llama.cpp.

Nothing is linked: which libllama is called is decided at run time, library by library. So
every prototype of the header becomes

* a member of ``struct llama_api``, the function table that ``library.py`` fills by name, and
* a static C function of the same name that takes such a table first and calls through it.

``python build_ffi.py --stubs`` writes the type stubs of the compiled modules, made from the
same headers.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from cffi import FFI

INCLUDE = Path(__file__).resolve().parent / "include"
PROTOTYPE = re.compile(
    r"^LLAMA_API (?P<result>.*?[ *])(?P<name>\w+)\((?P<args>.*)\);$", re.MULTILINE
)
PARAMETER = re.compile(r"^(?P<type>.*?[ *])(?P<name>\w+)$")
# What our own C declares as SINK_API or PAGES_API, Python sees.
HELPER_FUNCTION = re.compile(r"^(?:SINK|PAGES)_API (.*\))$", re.MULTILINE)
TABLE = "const struct llama_api *api"
# The wheel's abi3 begins at 3.11; free-threaded builds of Python have no limited API.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
LIMITED_API = [] if FREE_THREADED else [("Py_LIMITED_API", "0x030B0000")]


class Prototype(NamedTuple):
    """One function of the header; ``args`` as written there, ``"void"`` for none."""

    result: str
    name: str
    args: str

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """(type, name) of each parameter."""
        if self.args == "void":
            return []
        matches = [PARAMETER.match(part.strip()) for part in self.args.split(",")]
        return [(m["type"].strip(), m["name"]) for m in matches if m]


def prototypes(header: str) -> list[Prototype]:
    """Return the functions that *header* declares, in its order."""
    return [
        Prototype(m["result"].strip(), m["name"], m["args"]) for m in PROTOTYPE.finditer(header)
    ]


def types(header: str) -> str:
    """*header* without comments, preprocessor lines and functions: what declares its types."""
    lines = (line.split("//")[0].rstrip() for line in header.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith(("#", "LLAMA_API")))


def table(functions: list[Prototype]) -> str:
    """Return the function table: one pointer a function."""
    members = (f"    {f.result} (*{f.name})({f.args});" for f in functions)
    return "\n".join(["struct llama_api {", *members, "};"])


def signature(function: Prototype) -> str:
    """Return the wrapper's C signature: the table first, then the function's own parameters."""
    args = TABLE if function.args == "void" else f"{TABLE}, {function.args}"
    return f"{function.result} {function.name}({args})"


def wrapper(function: Prototype) -> str:
    """Return the wrapper's C definition."""
    call = f"api->{function.name}({', '.join(name for _, name in function.parameters)});"
    body = call if function.result == "void" else f"return {call}"
    return f"static {signature(function)} {{ {body} }}"


def cdef(header: str, sink: str) -> str:
    """Everything that Python sees, as cffi takes it."""
    functions = prototypes(header)
    chain = "struct log_chain { ggml_log_callback next; void *next_data; };"
    signatures = [signature(f) for f in functions] + HELPER_FUNCTION.findall(sink)
    return "\n".join([types(header), table(functions), chain, *(s + ";" for s in signatures)])


def source(header: str) -> str:
    """Return the C text in front of cffi's own."""
    functions = prototypes(header)
    return "\n".join(
        [
            "#include <stdbool.h>\n#include <stddef.h>\n#include <stdint.h>",
            types(header),
            table(functions),
            '#define SINK_API static\n#include "log_sink.h"',
            *map(wrapper, functions),
        ]
    )


SCALARS = {
    "bool": "bool",
    "float": "float",
    "int": "int",
    "int32_t": "int",
    "uint32_t": "int",
    "uint64_t": "int",
    "size_t": "int",
    "void": "None",
}


def python_type(c_type: str) -> str:
    """Return the stub's name for a C type: distinct for every pointer."""
    if c_type in SCALARS:
        return SCALARS[c_type]
    if c_type == "const char *":
        return "bytes | CharPtr"
    words = re.sub(r"\b(const|struct)\b|_t\b", "", c_type).replace("*", " Ptr").split()
    return "".join(word[0].upper() + word[1:] for name in words for word in name.split("_") if word)


def stub(header: str, helpers: str, origin: str) -> str:
    """Return the type stub of the module with the functions of *header* and *helpers*.

    Args:
        header: Prototypes of llama.cpp; those functions take the table first.
        helpers: Our own C.
        origin: The header that the stub names as its source.
    """
    functions = [
        Prototype(f.result, f.name, TABLE if f.args == "void" else f"{TABLE}, {f.args}")
        for f in prototypes(header)
    ]
    own = prototypes("\n".join(f"LLAMA_API {s};" for s in HELPER_FUNCTION.findall(helpers)))
    methods = []
    names: set[str] = set()
    for f in functions + own:
        kinds = [(name, python_type(kind)) for kind, name in f.parameters]
        names.update(name for _, kind in kinds for name in kind.split(" | "))
        names.update(python_type(f.result).split(" | "))
        args = ", ".join(["self", *(f"{name}: {kind}" for name, kind in kinds), "/"])
        methods.append(f"    def {f.name}({args}) -> {python_type(f.result)}: ...")
    classes = [f"class {name}(CData): ..." for name in sorted(names - {*SCALARS.values(), "bytes"})]
    return "\n".join(
        [
            f"# Made by `python build_ffi.py --stubs` from include/{origin}.",
            "# ruff: noqa: E501",
            "from typing import Any",
            "",
            "class CData:",
            "    def __getattr__(self, name: str) -> Any: ...",
            "    def __setattr__(self, name: str, value: Any) -> None: ...",
            "    def __getitem__(self, index: Any) -> Any: ...",
            "    def __setitem__(self, index: Any, value: Any) -> None: ...",
            "    def __len__(self) -> int: ...",
            "    def __int__(self) -> int: ...",
            "",
            *classes,
            "",
            "class _FFI:",
            "    NULL: Any",
            "    CData: type[CData]",
            "    error: type[Exception]",
            "    def new(self, cdecl: str, init: Any = ...) -> Any: ...",
            "    def addressof(self, cdata: Any) -> Any: ...",
            "    def cast(self, cdecl: Any, source: Any) -> Any: ...",
            "    def typeof(self, cdecl: Any) -> Any: ...",
            "    def sizeof(self, cdecl: Any) -> int: ...",
            "    def string(self, cdata: Any, maxlen: int = ...) -> bytes: ...",
            "    def buffer(self, cdata: Any, size: int = ...) -> Any: ...",
            "    def from_buffer(",
            "        self, cdecl: str, python_buffer: Any, require_writable: bool = ...",
            "    ) -> Any: ...",
            "    def memmove(self, dest: Any, src: Any, n: int) -> None: ...",
            "",
            "class _Lib:",
            *methods,
            "",
            "ffi: _FFI",
            "lib: _Lib",
            "",
        ]
    )


def builder(module: str, declarations: str, code: str, *headers: str) -> FFI:
    """Return what compiles *module*, which is made anew when one of *headers* has changed."""
    ffi = FFI()
    ffi.cdef(declarations)
    ffi.set_source(
        f"llama_state.{module}",
        code,
        define_macros=LIMITED_API,
        include_dirs=[str(INCLUDE)],
        depends=[str(INCLUDE / name) for name in headers],
    )
    return ffi


HEADER = (INCLUDE / "llama.h").read_text()
SINK = (INCLUDE / "log_sink.h").read_text()
PAGES = "\n".join((INCLUDE / name).read_text() for name in ("pages.h", "matrix.h"))
STUBS = {
    "_llama/_llama_cffi.pyi": stub(HEADER, SINK, "llama.h"),
    "_io/_pages.pyi": stub("", PAGES, "pages.h and matrix.h"),
}

llama_builder = builder(
    "_llama._llama_cffi", cdef(HEADER, SINK), source(HEADER), "llama.h", "log_sink.h"
)
pages_builder = builder(
    "_io._pages",
    "\n".join(f"{signature};" for signature in HELPER_FUNCTION.findall(PAGES)),
    """#include <stdbool.h>\n#include <stddef.h>\n#include <stdint.h>\n#include <string.h>
#define PAGES_API static\n#include "pages.h"\n#include "matrix.h"
""",
    "pages.h",
    "matrix.h",
)

if __name__ == "__main__":
    if sys.argv[1:] == ["--stubs"]:
        for name, text in STUBS.items():
            (Path(__file__).with_name("llama_state") / name).write_text(text)
    else:
        for each in (llama_builder, pages_builder):
            each.compile(verbose=True)
