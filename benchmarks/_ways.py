"""Every way to save a large state and to bring it back: ours, llama.cpp's own, other bindings'."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from _bare import Bare
from _states import Subject, llama_cpp, some_tokens
from _timing import Way

import llama_state as ls
from llama_state import layout
from llama_state._io import reading
from llama_state._llama._llama_cffi import ffi

if TYPE_CHECKING:
    from llama_state._io import Buffer

# What the tables call the ways that targets compare; the others stand where they are used. Files
# are new and not waited for (``durable=False``), unless the name says "over" or "durable".
EVALUATE = "evaluate"
MEMCPY = "memcpy"
GET_DATA = "llama_state_get_data"
SNAPSHOT_OUT = "snapshot(out=buffer)"
SNAPSHOT = "snapshot()"
ION7_SNAPSHOT = "ion7-core's snapshot"
LLAMA_SAVE = "Llama.save_state()"
SET_DATA = "llama_state_set_data"
RESTORE = "restore(bytes)"
RESTORE_MAPPED = "restore(mapped file)"
ION7_RESTORE = "ion7-core's restore"
LLAMA_LOAD = "Llama.load_state()"
CACHE_HIT = "PromptCache, a hit"
PARSE = "parsing alone"
SEQ_GET = "llama_state_seq_get_data"
SEQ_SNAPSHOT_OUT = "seq_snapshot(out=buffer)"
SEQ_SNAPSHOT = "seq_snapshot()"
SEQ_SET = "llama_state_seq_set_data"
SEQ_RESTORE = "seq_restore(bytes)"
SAVE_FILE = "llama_state_save_file"
SAVE_FILE_OVER = "llama_state_save_file over"
SAVE = "save_state()"
SAVE_OVER = "save_state() over"
SAVE_DURABLE = "save_state() durable"
SAVE_UNCOPIED = "save_state(memory_limit=0)"
SAVE_LIMITED = "save_state(memory_limit=1/16)"
LOAD_FILE = "llama_state_load_file"
LOAD = "load_state()"
LOAD_LIMITED = "load_state(memory_limit=1/16)"
RESTORE_VERSION = "restore(another version)"
RESTORE_TURNED = "restore(V turned)"
RESTORE_STREAMS = "restore(other streams)"
SEQ_VERSION = "seq_restore(another version)"
SEQ_TURNED = "seq_restore(V turned)"
SEQ_STREAMS = "seq_restore(other streams)"
LOAD_VERSION = "load_state(another version)"
REMEMBER = "remember(), 64 new"
RECALL = "recall()"
CLIENT_SET = "the client alone: set"
CLIENT_GET = "the client alone: get into a buffer"
PLACE_PUT = "put(), objects of 32 MiB"
PLACE_OPEN = "open(), objects of 32 MiB"
SEQ_RANGE = "seq_cp, seq_get_data, seq_rm, 64 new"
CHECKPOINT = "checkpoint(out=buffer)"
RESUME = "resume(mapped)"
LOAD_AND_RESUME = "Checkpoint.load() and resume()"

# What a limited save may take of memory, as a share of the state.
_MEMORY_SHARE = 16
# Streams of the contexts that states of other streams come from.
_STREAMS = 4

OURS, C, ION7, LLAMA_CPP_PYTHON = "llama_state", "llama.cpp", "ion7-core", "llama-cpp-python"


@dataclass(frozen=True)
class Work:
    """One state and what is needed to move it about.

    Attributes:
        it: The context, which holds the state.
        blob: The state.
        n_tokens: Tokens in it.
        folder: Where files go.
        out: A buffer of the state's size.
    """

    it: Subject
    blob: bytes
    n_tokens: int
    folder: Path
    out: bytearray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", bytearray(len(self.blob)))

    @property
    def bare(self) -> Bare:
        """The C functions on the context."""
        return Bare(self.it.ctx, self.n_tokens)

    @property
    def tokens(self) -> list[int]:
        """Its tokens."""
        return some_tokens(self.n_tokens)

    def save(self, path: Path, *, durable: bool = False, memory_limit: int | None = None) -> None:
        """save_state, by default without waiting for the disk."""
        self.it.ctx.save_state(path, self.tokens, durable=durable, memory_limit=memory_limit)

    def restore(self, blob: Buffer | None = None) -> None:
        """Restore from *blob*, by default the state that is to be moved about."""
        self.it.restore(self.blob if blob is None else blob, self.n_tokens)


def copying(work: Work) -> Way:
    """Copy the state from one place in memory to another."""
    return Way(MEMCPY, "memory", lambda: ffi.memmove(work.out, work.blob, len(work.blob)))


def memory_ways(work: Work) -> Iterator[Way]:
    """Save all to memory."""
    ctx, out, bare = work.it.ctx, work.out, work.bare
    size = len(work.blob)

    def ion7() -> bytes:
        """Fill a zeroed buffer, then copy it to a string."""
        buffer = bytearray(size)
        bare.get(buffer)
        return bytes(buffer)

    yield Way(GET_DATA, C, lambda: bare.get(out))
    yield Way(SNAPSHOT_OUT, OURS, lambda: ctx.snapshot(out=out))
    yield Way(SNAPSHOT, OURS, ctx.snapshot)
    yield Way(ION7_SNAPSHOT, ION7, ion7)
    if llm := work.it.llm:
        yield Way(LLAMA_SAVE, LLAMA_CPP_PYTHON, lambda: llama_cpp.Llama.save_state(llm))


def restore_ways(work: Work) -> Iterator[Way]:
    """Restoring all from memory."""
    ctx, blob, bare = work.it.ctx, work.blob, work.bare
    version, traits = ctx.library.session_version, ctx._facts.traits
    file = work.folder / "blob"
    file.write_bytes(blob)
    _flush(file)

    def ion7() -> None:
        """Copy the string to a zeroed buffer, then restore that."""
        buffer = bytearray(len(blob))
        buffer[:] = blob
        bare.set(buffer)

    yield Way(SET_DATA, C, lambda: bare.set(blob))
    yield Way(PARSE, OURS, lambda: layout.parse_whole(blob, version=version, traits=traits))
    yield Way(RESTORE, OURS, work.restore)
    yield Way(RESTORE_MAPPED, OURS, lambda: work.restore(reading.map_file(file)))
    yield Way(ION7_RESTORE, ION7, ion7)
    if llm := work.it.llm:
        theirs = llama_cpp.Llama.save_state(llm)
        yield Way(LLAMA_LOAD, LLAMA_CPP_PYTHON, lambda: llama_cpp.Llama.load_state(llm, theirs))
        yield Way(CACHE_HIT, OURS, _cache_hit(work), before=ctx.clear)


def _cache_hit(work: Work) -> Callable[[], object]:
    """Find the prompt's beginning in a PromptCache, which restores it."""
    from llama_state.adapters.llama_cpp import PromptCache

    llm, tokens = work.it.llm, work.tokens
    cache = PromptCache(llm, capacity_bytes=4 * len(work.blob))
    llm.set_cache(cache)
    cache.remember()
    longer = [*tokens, 40]
    return lambda: cache[longer]


def sequence_ways(work: Work) -> Iterator[Way]:
    """Save and restore the only sequence, in memory and in files."""
    ctx, out, bare = work.it.ctx, work.out, work.bare
    arguments = work.it.arguments(work.n_tokens)
    blob = ctx.seq_snapshot(0)
    folder, tokens = work.folder, work.tokens
    yield Way(SEQ_GET, C, lambda: bare.seq_get(out))
    yield Way(SEQ_SNAPSHOT_OUT, OURS, lambda: ctx.seq_snapshot(0, out=out))
    yield Way(SEQ_SNAPSHOT, OURS, ctx.seq_snapshot)
    yield Way(SEQ_SET, C, lambda: bare.seq_set(blob))
    yield Way(SEQ_RESTORE, OURS, lambda: ctx.seq_restore(blob, 0, **arguments))
    yield _new_file("llama_state_seq_save_file", C, folder, bare.seq_save_file)
    yield _new_file(
        "seq_save_state()",
        OURS,
        folder,
        lambda path: ctx.seq_save_state(path, 0, tokens, durable=False),
    )
    file = folder / "sequence"
    ctx.seq_save_state(file, 0, tokens)
    yield Way("llama_state_seq_load_file", C, lambda: bare.seq_load_file(file))
    yield Way("seq_load_state()", OURS, lambda: ctx.seq_load_state(file))


def file_ways(work: Work) -> Iterator[Way]:
    """All, in files."""
    ctx, bare, folder = work.it.ctx, work.bare, work.folder
    yield _new_file(SAVE_FILE, C, folder, bare.save_file)
    yield _new_file(SAVE, OURS, folder, work.save)
    yield _new_file(SAVE_DURABLE, OURS, folder, partial(work.save, durable=True))
    limit = len(work.blob) // _MEMORY_SHARE
    yield _new_file(SAVE_LIMITED, OURS, folder, partial(work.save, memory_limit=limit))
    yield _over_file(SAVE_FILE_OVER, C, folder / "theirs", bare.save_file)
    yield _over_file(SAVE_OVER, OURS, folder / "ours", work.save)
    file = folder / "session"
    work.save(file, durable=True)
    yield Way(LOAD_FILE, C, lambda: bare.load_file(file))
    yield Way(LOAD, OURS, lambda: ctx.load_state(file))
    yield Way(LOAD_LIMITED, OURS, lambda: ctx.load_state(file, memory_limit=limit))


def checkpoint_ways(work: Work) -> Iterator[Way]:
    """Checkpoints of all: with the fingerprint of the model, and a checksum in files."""
    ctx, out, tokens = work.it.ctx, work.out, work.tokens
    file = work.folder / "checkpoint"
    kept = ctx.checkpoint(tokens=tokens)
    kept.save(file)
    mapped = ls.Checkpoint.load(file)
    save = partial(kept.save, durable=False)
    yield Way(CHECKPOINT, OURS, lambda: ctx.checkpoint(tokens=tokens, out=out))
    yield _new_file("Checkpoint.save()", OURS, work.folder, save)
    yield Way("Checkpoint.load()", OURS, lambda: ls.Checkpoint.load(file))
    yield Way(RESUME, OURS, lambda: ctx.resume(mapped))
    yield Way(LOAD_AND_RESUME, OURS, lambda: ctx.resume(ls.Checkpoint.load(file)))


def conversion_ways(work: Work) -> Iterator[Way]:
    """Restore states of other forms, which are rewritten, beside states of the context's own."""
    ctx, whole, one = work.it.ctx, work.blob, work.it.ctx.seq_snapshot(0)
    arguments = work.it.arguments(work.n_tokens)
    version, traits = ctx.library.session_version, ctx._facts.traits
    of_whole = layout.parse_whole(whole, version=version, traits=traits)
    headed = ctx.library.sequence_head
    of_one = layout.parse_sequence(one, version=version, headed=headed, traits=traits)
    own = layout.form_of(of_whole)
    quantized = any(type_id == 8 for type_id, _ in of_whole.geometry.caches[0].k or ())
    forms = {(RESTORE_STREAMS, SEQ_STREAMS): replace(own, n_stream=_STREAMS)}
    if not quantized:  # of these nobody knows whether they are rotated, and V is in blocks
        other = next(v for v in layout.SEQUENCE_VERSION if v != version)
        forms[RESTORE_VERSION, SEQ_VERSION] = replace(own, version=other)
        forms[RESTORE_TURNED, SEQ_TURNED] = replace(own, v_trans=not own.v_trans)
    yield Way(SET_DATA, C, lambda: work.bare.set(whole))
    yield Way(RESTORE, OURS, work.restore)
    yield Way(SEQ_RESTORE, OURS, lambda: ctx.seq_restore(one, 0, **arguments))
    for (name, seq_name), form in forms.items():
        there = layout.convert(one, of_one, form)
        start, seq_start = (parsed.caches[0].offset for parsed in (of_whole, of_one))
        # The cells of a whole state with one sequence are those of a state of the sequence.
        of_all = whole[:start] + there[seq_start:]
        yield Way(name, OURS, partial(work.restore, of_all))
        yield Way(seq_name, OURS, partial(ctx.seq_restore, there, 0, **arguments))
        if form.version != version:
            file = work.folder / "another version"
            file.write_bytes(layout.pack_file_header("whole", form.version) + of_all)
            _flush(file)
            yield Way(LOAD_VERSION, OURS, partial(ctx.load_state, file, **arguments))
    file = work.folder / "session"
    work.save(file, durable=True)
    yield Way(LOAD, OURS, lambda: ctx.load_state(file))


def size_ways(work: Work) -> Iterator[Way]:
    """Ours, for how they grow, with what llama.cpp itself takes."""
    ctx, file = work.it.ctx, work.folder / "session"
    work.save(file, durable=True)
    yield copying(work)
    yield Way(GET_DATA, C, lambda: work.bare.get(work.out))
    yield Way(SET_DATA, C, lambda: work.bare.set(work.blob))
    yield Way(SNAPSHOT_OUT, OURS, lambda: ctx.snapshot(out=work.out))
    yield Way(SNAPSHOT, OURS, ctx.snapshot)
    yield Way(RESTORE, OURS, work.restore)
    yield _new_file(SAVE, OURS, work.folder, work.save)
    yield Way(LOAD, OURS, lambda: ctx.load_state(file))


def large_ways(work: Work) -> Iterator[Way]:
    """Ours, of a state that is larger than what the pool of buffers keeps."""
    ctx, file = work.it.ctx, work.folder / "session"
    work.save(file, durable=True)  # dirty pages would slow down all that follows
    yield copying(work)
    yield Way(SNAPSHOT_OUT, OURS, lambda: ctx.snapshot(out=work.out))
    yield Way(SNAPSHOT, OURS, ctx.snapshot)
    yield Way(RESTORE, OURS, work.restore)
    yield Way(LOAD, OURS, lambda: ctx.load_state(file))


def large_saves(work: Work) -> Iterator[Way]:
    """Save the same state to new files, which are compared with each other."""
    for name, party, save in (
        (SAVE_FILE, C, work.bare.save_file),
        (SAVE, OURS, work.save),
        (SAVE_UNCOPIED, OURS, partial(work.save, memory_limit=0)),
    ):
        # So large a file is being flushed before it is gone, which the next one would wait for.
        yield replace(_new_file(name, party, work.folder, save), before=os.sync)


def _new_file(name: str, party: str, folder: Path, save: Callable[[Path], object]) -> Way:
    """Save to a path where nothing is; the file is gone before the system begins to flush it."""
    path = folder / "new"
    return Way(name, party, lambda: save(path), after=path.unlink)


def _over_file(name: str, party: str, path: Path, save: Callable[[Path], object]) -> Way:
    """Save over a file that is on the disk."""
    save(path)
    _flush(path)
    return Way(name, party, lambda: save(path), after=lambda: _flush(path))


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
