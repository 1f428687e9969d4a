"""The public API as a type checker sees it. Checked by mypy, never run."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, assert_type

import llama_state as ls
from llama_state import inspection
from llama_state.adapters.llama_cpp import CacheStats, LlamaContext, PromptCache
from llama_state.aio import AsyncContext
from llama_state.checkpoint.fingerprint import adapter_digest, model_fields
from llama_state.layout import Layout, MediaChunk, SlotTokens
from llama_state.store import PlaceStats, PrefixStore, Remembered
from llama_state.testing import KINDS, write_benchmark_model, write_model, write_probe
from llama_state.testing.conformance import Report, Row, check_model, round_trips


def checkpoints(ctx: ls.Context, path: Path) -> None:
    taken = ctx.checkpoint(0, tokens=[1, 2], logits=True, meta={"a": [1]}, out=bytearray(9))
    assert_type(taken, ls.Checkpoint)
    assert_type(ctx.checkpoint(), ls.Checkpoint)
    assert_type(ctx.resume(taken), ls.Restored)
    assert_type(ctx.resume(taken, 1, check="warn"), ls.Restored)
    ctx.resume(taken, check="maybe")  # type: ignore[arg-type]
    assert_type(taken.save(path, key=b"k", compress=True, durable=False), int)
    assert_type(ls.Checkpoint.load(path, key=b"k", mapped=False), ls.Checkpoint)
    assert_type(taken.to_bytes(), bytes)
    assert_type(ls.Checkpoint.from_bytes(bytearray(9), key=None), ls.Checkpoint)
    assert_type(taken.to_native(path), int)
    assert_type(
        ls.Checkpoint.from_native(path, fingerprint=ctx.fingerprint, meta={}), ls.Checkpoint
    )
    assert_type(taken.tokens, tuple[int, ...])
    assert_type(taken.media, tuple[MediaChunk, ...])
    assert_type(ctx.resume(taken).media, tuple[MediaChunk, ...])
    assert_type(taken.payload, memoryview[int])
    assert_type(taken.logits, memoryview[float] | None)
    assert_type(taken.source, int | None)
    assert_type(taken.fingerprint, ls.Fingerprint)
    assert_type(len(taken), int)


def library(path: Path) -> None:
    lib = ls.load_library()
    assert_type(lib, ls.Library)
    assert_type(ls.load_library("libllama.so"), ls.Library)
    assert_type(ls.load_library(path=path), ls.Library)
    assert_type(lib.path, Path)
    assert_type(lib.source, str)
    assert_type(lib.session_version, int)
    assert_type(lib.sequence_version, int)
    assert_type(lib.capabilities, frozenset[str])
    assert_type(lib.build, str)
    assert_type(lib.require("state-flags"), None)
    assert_type(ls.__version__, str)


def model(path: Path, lib: ls.Library) -> None:
    with ls.Model(path) as opened:
        assert_type(opened, ls.Model)
    made = ls.Model("m.gguf", library=lib, n_gpu_layers=0)
    assert_type(made.path, str)
    assert_type(made.library, ls.Library)
    assert_type(made.arch, str)
    assert_type(made.n_vocab, int)
    assert_type(made.metadata("general.architecture"), str | None)
    assert_type(made.tokenize("text", add_special=False, parse_special=True), list[int])
    assert_type(made.detokenize((1, 2), unparse_special=True), str)
    assert_type(made.close(), None)
    assert_type(made.context(), ls.Context)
    ctx = made.context(
        n_ctx=256,
        n_batch=64,
        n_seq_max=2,
        kv_unified=True,
        flash_attn=None,
        type_k="q8_0",
        type_v="f16",
        n_threads=2,
        swa_full=False,
    )
    assert_type(ctx, ls.Context)
    made.context(n_ctx="256")  # type: ignore[arg-type]
    made.context(type_k=8)  # type: ignore[arg-type]


def attached_llama(llm: object, path: Path) -> None:
    assert_type(ls.attach(llm), ls.Context)
    ctx = LlamaContext(llm)
    assert_type(ctx.tokens, tuple[int, ...])
    assert_type(ctx.rewind_min, int)
    assert_type(ctx.restore(b"", tokens=[1]), ls.Restored)
    assert_type(ctx.seq_restore(b"", 0, tokens=ctx.tokens), ls.Restored)
    assert_type(ctx.load_state(path, tokens=None), ls.Restored)
    assert_type(ctx.save_state(path), int)
    cache = PromptCache(llm, capacity_bytes=1 << 30)
    assert_type(PromptCache(llm, path, capacity_bytes=1, adapters=[(path, 1.0)]), PromptCache)
    assert_type(cache.stats(), CacheStats)
    assert_type(PromptCache(llm, PrefixStore("memory:")), PromptCache)
    places = ["memory:?size=1GiB", "kv"]
    assert_type(PromptCache(llm, places), PromptCache)
    assert_type(PrefixStore([*places, path]).stats().places, Sequence[PlaceStats])
    assert_type(cache.cache_size, int)
    assert_type(cache.store, PrefixStore)
    assert_type(cache.remember(), Remembered)


def attached(pointer: ctypes.c_void_p, lib: ls.Library) -> None:
    assert_type(ls.attach(pointer, lib), ls.Context)
    assert_type(ls.attach(0x7F00, library=lib, model_path="m.gguf"), ls.Context)


def identity(ctx: ls.Context, path: Path) -> None:
    found = ctx.fingerprint
    assert_type(found, ls.Fingerprint)
    assert_type(found.model, Mapping[str, str])
    assert_type(found.context, Mapping[str, str])
    assert_type(found.unknown, Mapping[str, str])
    assert_type(found.to_json(), dict[str, object])
    assert_type(ls.Fingerprint.from_json(object()), ls.Fingerprint)
    assert_type(found.differences(ctx.fingerprint), list[ls.Difference])
    assert_type(ctx.declare(adapters=[(path, 1.0), ("a.gguf", 0.5)]), None)
    assert_type(ctx.declare(adapters=(), rope={"rope_freq_base": 1e6, "yarn_orig_ctx": 1}), None)
    assert_type(model_fields(path), dict[str, str])
    assert_type(adapter_digest("a.gguf"), str)
    ctx.declare([])  # type: ignore[call-arg]
    found.model = {}  # type: ignore[misc]


def context(ctx: ls.Context) -> None:
    with ctx as entered:
        assert_type(entered, ls.Context)
    assert_type(ctx.library, ls.Library)
    assert_type(ctx.pointer, int)
    assert_type(ctx.arch, str)
    assert_type(ctx.n_vocab, int)
    assert_type(ctx.n_ctx, int)
    assert_type(ctx.n_batch, int)
    assert_type(ctx.n_seq_max, int)
    assert_type(ctx.decode([1, 2]), None)
    assert_type(ctx.decode(iter((1, 2)), seq_id=1), None)
    assert_type(ctx.n_past(), int)
    assert_type(ctx.n_past(seq_id=1), int)
    assert_type(ctx.seq_rm(0, 1, None), None)
    assert_type(ctx.seq_rm(0, start=1, end=2), None)
    assert_type(ctx.seq_cp(0, 1, start=0, end=2), None)
    assert_type(ctx.clear(), None)
    assert_type(ctx.close(), None)
    assert_type(ctx.logits(), memoryview[float])
    ctx.decode("text")  # type: ignore[arg-type]
    ctx.n_ctx()  # type: ignore[operator]


def whole(ctx: ls.Context, path: Path) -> None:
    assert_type(ctx.state_size(), int)
    blob = ctx.snapshot()
    assert_type(blob, bytes)
    view: memoryview = ctx.snapshot(out=bytearray(8))
    ctx.snapshot(array("b"))
    for buffer in (blob, bytearray(blob), view, array("B", blob)):
        assert_type(ctx.restore(buffer), ls.Restored)
    assert_type(ctx.restore(blob, validate=False), ls.Restored)
    assert_type(ctx.save_state(path), int)
    assert_type(ctx.save_state("s", tokens=range(3), durable=False), int)
    assert_type(ctx.load_state(path), ls.Restored)
    assert_type(ctx.load_state("s", validate=False), ls.Restored)
    assert_type(ctx.save_state(path, progress=lambda done, total: None), int)
    assert_type(ctx.load_state(path, progress=print, memory_limit=1 << 20), ls.Restored)
    assert_type(ls.trim_buffers(), int)
    ctx.load_state(path, progress=True)  # type: ignore[arg-type]
    ctx.restore("text")  # type: ignore[arg-type]
    ctx.save_state(3)  # type: ignore[arg-type]


async def asynchronous(ctx: ls.Context, path: Path) -> None:
    async with AsyncContext(ctx) as entered:
        assert_type(entered, AsyncContext)
    actx = AsyncContext(ctx)
    assert_type(await actx.decode([1, 2], seq_id=0), None)
    assert_type(await actx.logits(), memoryview[float])
    assert_type(await actx.n_past(1), int)
    assert_type(await actx.snapshot(), bytes)
    view: memoryview = await actx.snapshot(bytearray(8))
    assert_type(await actx.seq_snapshot(1), bytes)
    assert_type(await actx.restore(view, validate=False), ls.Restored)
    assert_type(await actx.save_state(path, durable=False), int)
    assert_type(await actx.load_state(path, progress=print), ls.Restored)
    assert_type(await actx.seq_load_state(path, 1, memory_limit=0), ls.Restored)
    kept = await actx.seq_device_snapshot()
    assert_type(await actx.run(kept.restore, 0), ls.Restored)
    async with actx.savepoint(0) as nothing:
        assert_type(nothing, None)
    assert_type(await actx.close(), None)
    await actx.decode("text")  # type: ignore[arg-type]
    await actx.n_past("0")  # type: ignore[arg-type]


def one_sequence(ctx: ls.Context, path: Path) -> None:
    assert_type(ctx.seq_state_size(), int)
    assert_type(ctx.seq_state_size(seq_id=1), int)
    blob = ctx.seq_snapshot()
    assert_type(blob, bytes)
    assert_type(ctx.seq_snapshot(seq_id=1), bytes)
    view: memoryview = ctx.seq_snapshot(1, out=bytearray(8))
    assert_type(ctx.seq_restore(view), ls.Restored)
    assert_type(ctx.seq_restore(blob, dest_seq_id=1, validate=False), ls.Restored)
    assert_type(ctx.seq_save_state(path), int)
    assert_type(ctx.seq_save_state("s", seq_id=1, tokens=(1, 2), durable=False), int)
    assert_type(ctx.seq_load_state(path), ls.Restored)
    assert_type(ctx.seq_load_state("s", dest_seq_id=1, validate=False), ls.Restored)


def results(restored: ls.Restored) -> None:
    assert_type(restored.nbytes, int)
    assert_type(restored.tokens, tuple[int, ...])
    assert_type(restored.sequences, Mapping[int, ls.Span])
    span = restored.sequences[0]
    assert_type(span, ls.Span)
    assert_type(span.pos_min, int)
    assert_type(span.pos_max, int)
    assert_type(span.rewind_min, int)
    assert_type(span.n_past, int)
    restored.nbytes = 0  # type: ignore[misc]


def savepoint(ctx: ls.Context) -> int:
    with ctx.savepoint() as nothing:
        assert_type(nothing, None)
    with ctx.savepoint(0, 1):
        return 1
    # No "missing return": a savepoint lets the block's exception through.


def errors(ctx: ls.Context) -> None:
    try:
        ctx.clear()
    except ls.TruncatedError as truncated:
        assert_type(truncated.need, int)
        assert_type(truncated.have, int)
    except (ls.ChecksumError, ls.VersionError) as damaged:
        assert_type(damaged.reason, str)
        assert_type(damaged.offset, int | None)
    except ls.FormatError as malformed:
        assert_type(malformed.reason, str)
    except ls.MismatchError as mismatch:
        assert_type(mismatch.differences, tuple[ls.Difference, ...])
        name, saved, current = mismatch.differences[0]
        assert_type((name, saved, current), tuple[str, object, object])
    except ls.CapacityError as capacity:
        assert_type((capacity.need, capacity.have), tuple[int, int])
    except ls.SequenceIdError as sequence:
        assert_type((sequence.seq_id, sequence.limit), tuple[int, int])
    except ls.SaveError as unsaved:
        assert_type(unsaved.errno, int | None)
    except ls.RestoreError as refused:
        assert_type(refused.log, tuple[str, ...])
        assert_type(refused.rolled_back, bool)
    except ls.DecodeError as undecoded:
        assert_type(undecoded.code, int)
        assert_type(undecoded.log, tuple[str, ...])
    except ls.ModelLoadError as unloaded:
        assert_type(unloaded.path, str)
        assert_type(unloaded.log, tuple[str, ...])
    except ls.LibraryNotFoundError as missing:
        assert_type(missing.tried, tuple[tuple[str, str], ...])
    except (ls.ClosedError, ls.UnsupportedError):
        raise
    # What a caller would catch who does not know this package.
    values: list[type[ValueError]] = [ls.FormatError, ls.MismatchError, ls.CapacityError]
    runtime: list[type[RuntimeError]] = [ls.RestoreError, ls.DecodeError, ls.ClosedError]
    others: tuple[type[OSError], type[IndexError], type[ImportError], type[NotImplementedError]]
    others = (ls.SaveError, ls.SequenceIdError, ls.LibraryNotFoundError, ls.UnsupportedError)
    every: list[type[ls.StateError]] = [ls.VersionError, ls.ChecksumError, ls.ModelLoadError]
    del values, runtime, others, every


def inspecting(path: Path) -> None:
    found = ls.inspect_file(path, model="m.gguf", key=b"")
    assert_type(found, ls.StateFile)
    assert_type(found.nbytes, int)
    assert_type(found.version, int | None)
    assert_type(found.session_versions, tuple[int, ...])
    assert_type(found.tokens, "array[int]")
    assert_type(found.layout, Layout | None)
    assert_type(found.slot, SlotTokens | None)
    assert_type(found.media, tuple[MediaChunk, ...])
    assert_type(found.state, memoryview)
    assert_type(found.checkpoint, ls.Checkpoint | None)
    assert_type(found.problem, ls.StateError | None)
    found.problem = None  # type: ignore[misc]
    assert_type(inspection.describe(found), dict[str, Any])
    assert_type(inspection.render(found, ".png"), bytes)
    comparison = inspection.compare(found, found)
    assert_type(comparison.equal, bool)
    assert_type(comparison.rows[0].max_abs, float | None)
    assert_type(inspection.verify_file("s").problems, tuple[str, ...])
    converted = inspection.convert_file("s", path, to="native", force=True)
    assert_type(converted.nbytes, int)
    inspection.convert_file("s", path, to="gguf")  # type: ignore[arg-type]


def testing(path: Path) -> None:
    assert_type(KINDS, tuple[str, ...])
    assert_type(write_model("m.gguf"), Path)
    assert_type(write_model(path, "llama-dense", seed=1, text=True, overrides={"a": 1}), Path)
    assert_type(write_benchmark_model(path, n_layer=2), Path)
    assert_type(write_probe(path), Path)


def conformance(path: Path, opened: ls.Model, lib: ls.Library) -> None:
    options = {"one": {"n_seq_max": 1}}
    report = check_model(path, library=lib, n_tokens=8, configurations=options, seed=1)
    assert_type(report, Report)
    assert_type(check_model(opened), Report)
    assert_type(report.ok, bool)
    assert_type(report.rows, tuple[Row, ...])
    for row in round_trips(opened, {"kv_unified": True}, name="one"):
        assert_type((row.configuration, row.function, row.detail), tuple[str, str, str])
        assert_type((row.seconds, row.nmse), tuple[float, float])
        assert_type(row.nbytes, int)
