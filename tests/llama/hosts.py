"""Shared libraries as other hosts bring them, compiled: of names alone, or before the real one.

A library that is linked to the real libllama has all of its functions. What it defines itself is
found first, and calls the real one through ``dlsym(RTLD_NEXT, ...)``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from llama_state._llama._llama_cffi import ffi
from tests.libllama import LIBRARY

FUNCTIONS = frozenset(name for name, _ in ffi.typeof("struct llama_api").fields)

# The real one is called with what include/llama.h declares of it.
_BEGIN = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
struct block { uint64_t words[128]; };
#define NEXT(type, name) ((type) dlsym(RTLD_NEXT, name))
"""

# Its states carry versions of the years to come.
UNKNOWN_VERSIONS = """
static void stamp(const char *path, uint32_t version) {
    FILE *file = fopen(path, "r+b");
    fseek(file, 4, SEEK_SET);
    fwrite(&version, 4, 1, file);
    fclose(file);
}
typedef bool (*save)(void *, const char *, const int32_t *, size_t);
bool llama_state_save_file(void *ctx, const char *path, const int32_t *tokens, size_t n) {
    bool done = NEXT(save, "llama_state_save_file")(ctx, path, tokens, n);
    stamp(path, 12);
    return done;
}
typedef size_t (*seq_save)(void *, const char *, int32_t, const int32_t *, size_t);
size_t llama_state_seq_save_file(
        void *ctx, const char *path, int32_t id, const int32_t *tokens, size_t n) {
    size_t done = NEXT(seq_save, "llama_state_seq_save_file")(ctx, path, id, tokens, n);
    stamp(path, 5);
    return done;
}
"""

# It has no back end but a plug-in, which is a file in its folder.
PLUGINS = """
static int loaded;
size_t ggml_backend_reg_count(void) { return loaded; }
void ggml_backend_load_all(void) {}
void ggml_backend_load_all_from_path(const char *folder) {
    char path[4096];
    snprintf(path, sizeof path, "%s/libggml-cpu.so", folder);
    loaded += access(path, F_OK) == 0;
}
typedef void *(*load)(const char *, struct block);
void *llama_model_load_from_file(const char *path, struct block params) {
    return loaded ? NEXT(load, "llama_model_load_from_file")(path, params) : NULL;
}
"""

# It has a back end, and must not be given others.
NO_PLUGINS = """
size_t ggml_backend_reg_count(void) { return 1; }
void ggml_backend_load_all(void) {}
void ggml_backend_load_all_from_path(const char *folder) { abort(); }
"""


def compile_host(path: Path, code: str) -> Path:
    """Compile what stands before the real libllama."""
    real = str(LIBRARY.path)
    return compile_code(
        path, _BEGIN + code, "-Wl,--no-as-needed", real, f"-Wl,-rpath,{LIBRARY.path.parent}", "-ldl"
    )


def compile_names(path: Path, names: Iterable[str]) -> Path:
    """Compile a library that exports *names*, which are never called."""
    return compile_code(path, "\n".join(f"void {name}(void) {{}}" for name in sorted(names)))


def compile_code(path: Path, code: str, *options: str) -> Path:
    """Compile a library."""
    source = path.with_suffix(".c")
    source.write_text(code, encoding="utf-8")
    command = ["cc", "-shared", "-fPIC", "-fno-builtin", "-o", str(path), str(source), *options]
    subprocess.run(command, check=True, timeout=60)
    return path
