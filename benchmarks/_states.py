"""Contexts that hold a state of the size that is asked for.

Nearly all of a long decode is attention over what is there already, and the numbers in a cache do
not change how fast they are copied. So 256 tokens are decoded, their state is made longer by
repeating its rows, and restored with everything that a restore checks.
"""

from __future__ import annotations

import importlib
import struct
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _timing import MIB

import llama_state as ls
from llama_state import layout
from llama_state.testing.models import write_benchmark_model

if TYPE_CHECKING:
    from llama_state._io import Buffer
    from llama_state.layout import Block, Stream


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


llama_cpp = _imported("llama_cpp")
"""llama-cpp-python, or None where it is not installed."""

N_LAYER, N_HEAD_KV, HEAD_DIM = 32, 8, 128
_SEED_TOKENS = 256
_SPARE_CELLS = 64


@dataclass(frozen=True)
class Configuration:
    """How the context is made.

    Attributes:
        flash_attn: Flash attention; without it V is stored transposed.
        cache_type: Of K and V.
    """

    flash_attn: bool
    cache_type: str

    def __str__(self) -> str:
        return f"{self.cache_type}, flash" if self.flash_attn else self.cache_type

    def tokens_of(self, mib: int) -> int:
        """Tokens whose state has about *mib* MiB."""
        kind = next(kind for kind in layout.TYPES.values() if kind.name == self.cache_type)
        row = N_HEAD_KV * HEAD_DIM // kind.elements * kind.nbytes
        n = max(mib * MIB // (2 * N_LAYER * row), 1)
        return n // _SEED_TOKENS * _SEED_TOKENS or n


CONFIGURATIONS = (
    Configuration(flash_attn=True, cache_type="f16"),
    Configuration(flash_attn=False, cache_type="f16"),
    Configuration(flash_attn=True, cache_type="q8_0"),
)


@dataclass(frozen=True)
class Subject:
    """A context to measure in.

    Attributes:
        ctx: The context.
        llm: The ``llama_cpp.Llama`` that it is of, or None for one of our own engine.
    """

    ctx: ls.Context
    llm: Any = None

    def restore(self, blob: Buffer, n_tokens: int) -> None:
        """Restore the whole state of *n_tokens*."""
        self.ctx.restore(blob, **self.arguments(n_tokens))

    def arguments(self, n_tokens: int) -> dict[str, Any]:
        """Return what a restore needs beside the blob: a ``Llama`` wants its tokens."""
        return {} if self.llm is None else {"tokens": some_tokens(n_tokens)}


def some_tokens(n: int, seed: int = 0) -> list[int]:
    """Printable bytes, as the model's tokens."""
    return [35 + (seed + 7 * i) % 90 for i in range(n)]


def write_model(folder: Path) -> str:
    """Write a model of 128 KiB of f16 state for a token and return its path."""
    measures = {"n_layer": N_LAYER, "n_head_kv": N_HEAD_KV, "head_dim": HEAD_DIM, "n_ctx": 1 << 17}
    return str(write_benchmark_model(folder / "large.gguf", text=True, **measures))


def open_llama(path: str, n_ctx: int, configuration: Configuration) -> Any:
    """Return a ``llama_cpp.Llama`` on the model at *path*."""
    types = {kind.name: number for number, kind in layout.TYPES.items()}
    kind = types[configuration.cache_type]
    return llama_cpp.Llama(
        path,
        n_ctx=n_ctx,
        n_batch=512,
        flash_attn=configuration.flash_attn,
        type_k=kind,
        type_v=kind,
        verbose=False,
    )


@contextmanager
def subject(
    path: str, n_tokens: int, configuration: Configuration, *, in_llama: bool
) -> Iterator[Subject]:
    """Return a context with room for *n_tokens*.

    Args:
        path: The model.
        n_tokens: The largest number of tokens that it will hold.
        configuration: How it is made.
        in_llama: In a ``llama_cpp.Llama``, attached; else made by our own engine.
    """
    n_ctx = n_tokens + _SPARE_CELLS
    if in_llama:
        with closing(open_llama(path, n_ctx, configuration)) as llm:
            yield Subject(ls.attach(llm), llm)
        return
    kind = configuration.cache_type
    with (
        ls.Model(path) as model,
        model.context(
            n_ctx=n_ctx, flash_attn=configuration.flash_attn, type_k=kind, type_v=kind
        ) as ctx,
    ):
        yield Subject(ctx)


def fill(it: Subject, n_tokens: int) -> bytes:
    """Let a context hold *n_tokens*; its whole state.

    Args:
        it: The context.
        n_tokens: A multiple of 256, or less than that.
    """
    ctx = it.ctx
    ctx.clear()
    ctx.decode(some_tokens(min(n_tokens, _SEED_TOKENS)))
    short = ctx.snapshot()
    parsed = layout.parse_whole(
        short, version=ctx.library.session_version, traits=ctx._facts.traits
    )
    it.restore(_lengthened(short, parsed, n_tokens), n_tokens)
    return ctx.snapshot()


def _lengthened(blob: bytes, parsed: layout.Layout, n: int) -> bytearray:
    """Return the whole state of one sequence, made *n* cells long by repeating its rows."""
    (cache,) = parsed.caches
    assert isinstance(cache, layout.KVCache)
    (stream,) = cache.streams
    times, left = divmod(n, len(stream.cells))
    assert not left, n
    out = bytearray(blob[: stream.offset]) + struct.pack("<I", n) + _cells(blob, stream, n)
    at = stream.tail
    for block in (*stream.k, *stream.v):
        out += blob[at : block.offset]
        at = block.offset + block.nbytes
        transposed = stream.v_trans and block in stream.v
        out += _repeated(blob, block, len(stream.cells) if transposed else None, times)
    return out + blob[at:]


def _cells(blob: bytes, stream: Stream, n: int) -> bytes:
    """*n* cells as the first one of *stream*, at the positions from 0 on."""
    first = stream.cells.starts[0]
    cell = array("i", blob[first : first + 4 * (3 + stream.cells.ext_words)])
    words = cell * n
    words[:: len(cell)] = array("i", range(n))
    return words.tobytes()


def _repeated(blob: bytes, block: Block, n_cell: int | None, times: int) -> bytes:
    """Return a block with all its rows *times* over; of a transposed one *n_cell* is given."""
    end = block.offset + block.nbytes
    if n_cell is None:
        return blob[block.offset : end] * times
    run = n_cell * layout.TYPES[block.type_id].nbytes
    return b"".join(blob[at : at + run] * times for at in range(block.offset, end, run))
