"""A valid call of every public function, and what no parameter of it may be.

A parameter has a row by its name, or by "function.name" where the name means something else there.
``python -m tests.context.argument_cases NAME`` tries one function and prints what went wrong.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_state as ls
from llama_state import aio, inspection, layout, testing
from llama_state.store import PrefixStore
from llama_state.testing import write_model

Call = tuple[Callable[..., Any], dict[str, Any]]
NAN, PATH = float("nan"), Path("some/file")

INTEGER = [1.5, NAN, "1", b"1", True, PATH, [], {}]
SECONDS = ["1", b"1", True, PATH, [], {}, NAN]
COUNT = [*INTEGER, -1, 2**64]
SOME = [*COUNT, 0]
POSITION = [*INTEGER, -1, -3, 2**31, 2**64]
FLAG = ["yes", b"", 2, -1, 1.5, NAN, [], PATH, None]
NO_LIST = ["text", b"text", bytearray(2), 5, 1.5, True, PATH, {}]
TOKENS = [*NO_LIST, ["1"], [1.5], [NAN], [True], [None]]
TOKENS_32 = [*TOKENS, [2**31], [-(2**31) - 1]]
VOCABULARY = [*TOKENS, [-1], [2**31], [10**6]]
FILE = [5, 1.5, True, b"path", [], object()]
BUFFER = ["text", 5, 1.5, True, [], PATH]
TEXT = [5, 1.5, True, b"text", [], PATH]
KEY = ["text" * 8, 5, 1.5, True, [], PATH]
MAPPING = ["text", b"", 5, 1.5, True, [1], PATH]
FUNCTION = ["text", b"", 5, 1.5, True, [], PATH]
OBJECT = ["text", b"", 5, 1.5, True, [], PATH, object()]
CHOICE = ["no", "", b"whole", 5, 1.5, True, [], PATH]

NAMES: dict[str, list[Any]] = {
    **dict.fromkeys(("seq_id", "dest_seq_id", "src", "dest", "seq_ids", "source"), POSITION),
    **dict.fromkeys(("start", "end", "logits_of", "first", "last"), POSITION),
    **dict.fromkeys(("memory_limit", "max_size", "n_swa", "size"), COUNT),
    **dict.fromkeys(("capacity_bytes", "pending_bytes", "to_bytes", "shared_tokens"), COUNT),
    **dict.fromkeys(("chunk_tokens", "n_positions"), SOME),
    **dict.fromkeys(("n_tokens", "n_layer", "n_head_kv", "head_dim", "n_embd"), SOME),
    **dict.fromkeys(
        (
            "validate",
            "durable",
            "wait",
            "partial",
            "others",
            "compress",
            "mapped",
            "logits",
            "replace",
        ),
        FLAG,
    ),
    **dict.fromkeys(("add_special", "parse_special", "unparse_special", "text", "plain"), FLAG),
    **dict.fromkeys(("readonly", "repair", "piece", "encrypt"), FLAG),
    **dict.fromkeys(("force", "any_version", "headed", "kv_unified", "swa_full", "full"), FLAG),
    **dict.fromkeys(("recurrent", "hybrid"), FLAG[:-1]),
    **dict.fromkeys(("path", "model", "model_path", "target"), FILE),
    **dict.fromkeys(("blob", "data", "payload", "out", "expected", "got"), BUFFER),
    **dict.fromkeys(("library", "fingerprint", "checkpoint", "context", "handle"), OBJECT),
    **dict.fromkeys(("actx", "ctx", "store"), OBJECT),
    "min_gain": ["text", NAN, True],
    "where": [*FILE, [5], [PATH, b"path"], {}, {"memory:"}, "nowhere:", ["memory:?size=1MiB"] * 2],
    "digest": [*KEY, b"", bytes(15), bytes(65)],
    **dict.fromkeys(("timeout", "ttl"), SECONDS),
    **dict.fromkeys(("current", "saved", "a", "b", "header", "layout", "form", "file"), OBJECT),
    **dict.fromkeys(("meta", "rope", "options", "configurations", "overrides"), MAPPING),
    **dict.fromkeys(("check", "kind", "to", "module", "group"), CHOICE),
    **dict.fromkeys(("arch", "type_k", "type_v", "suffix", "name", "namespace"), TEXT),
    **dict.fromkeys(("session_version", "blob_version", "version", "seed", "rope_type"), INTEGER),
    **dict.fromkeys(("progress", "metadata"), FUNCTION),
    **dict.fromkeys(("key", "shared_key"), KEY),
    "tokens": TOKENS_32,
    "packed_tokens": TOKENS_32,
    "adapters": ["text", 5, True, [5], [("a",)], [(5, 1.0)], [("a", "b")], [("a", NAN)], PATH],
    "n_ctx": COUNT,
    "n_batch": [*COUNT, 0],
    "n_seq_max": [*COUNT, 0, 257],
    "n_threads": [*COUNT, 0, 100_000],
    "n_gpu_layers": [*INTEGER, -2, 2**31, 2**64],
    "flash_attn": ["no", "", b"on", 2, 1.5, NAN, [], {}, PATH],
    "obj": ["x", b"x", 1.5, True, -8, 9, 2**70, [], object()],
    "traits": ["text", b"", 5, 1.5, True, PATH],
}
SPECIAL: dict[str, list[Any]] = {
    "Context.decode.tokens": VOCABULARY,
    "Model.detokenize.tokens": VOCABULARY,
    "Model.tokenize.text": TEXT,
    "Model.metadata.key": TEXT,
    "Checkpoint.load.mapped": [value for value in FLAG if value is not None],
    "Checkpoint.logits": BUFFER,
    "Context.seq_save_state.restore_points": ["text", 5, True, [5], [b"blob"], PATH],
    "AsyncContext.seq_save_state.restore_points": ["text", 5, True, [5], [b"blob"], PATH],
    "Context.checkpoint.restore_points": ["text", 5, True, [5], [b"blob"], PATH],
    "AsyncContext.checkpoint.restore_points": ["text", 5, True, [5], [b"blob"], PATH],
    "Checkpoint.restore_points": ["text", 5, True, [5], [b"blob"], PATH],
    "Context.seq_load_state.restore_points": FLAG,
    "AsyncContext.seq_load_state.restore_points": FLAG,
    "convert_file.source": FILE,
    "check_model.model": FILE[:3],
    "round_trips.model": OBJECT,
    "write_model.kind": CHOICE,
    "pack_file_header.version": COUNT,
    "pack_file_header.tokens": ["text", 5, 1.5, True, [1], b"123"],
    "is_packed.tokens": TOKENS,
    "write_model.seed": INTEGER,
}
# What a caller is given and does not make, and what hands its arguments on unseen.
NOT_MADE = {
    *("Difference", "DeviceSnapshot", "Library", "Context", "Restored", "Span", "StateFile"),
    *("Recalled", "Remembered"),
}
UNSEEN = {"AsyncContext.run", "Fingerprint.from_json"}
# What may kill the process where it is not refused: tried in a process of its own.
DANGEROUS = ("Model", "Model.context", "attach")


class World:
    """Tiny contexts and files for valid calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model_path = write_model(folder / "m.gguf", text=True)
        self.model = ls.Model(self.model_path)
        self.ctx = self.model.context(n_ctx=256, n_seq_max=2, kv_unified=True, n_threads=1)
        self.ctx.decode([1, 2, 3])
        self.ctx.decode([4, 5], 1)
        self.blob, self.seq_blob = self.ctx.snapshot(), self.ctx.seq_snapshot(0)
        self.whole, self.sequence = folder / "whole", folder / "sequence"
        self.ctx.save_state(self.whole, [1, 2, 3])
        self.ctx.seq_save_state(self.sequence, 0, [1, 2, 3])
        self.checkpoint = self.ctx.checkpoint(0, tokens=[1, 2, 3])
        self.data = self.checkpoint.to_bytes()
        self.checkpoint.save(folder / "checkpoint")
        self.file = ls.inspect_file(self.whole)
        self.parsed = layout.parse_whole(self.blob, version=self.model.library.session_version)

    def state(self) -> tuple[object, ...]:
        """Return all that a refused call may not change."""
        files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        return self.ctx.snapshot(), self.ctx.n_past(0), self.ctx.n_past(1), files

    def _of_one(self, version: int) -> layout.Layout:
        return layout.parse_sequence(
            self.seq_blob, version=version, headed=layout.has_sequence_head(self.seq_blob)
        )

    def close(self) -> None:
        self.ctx.close()
        self.model.close()

    def calls(self) -> dict[str, Call]:
        """Return a valid call of each public function: the arguments that it needs."""
        ctx, model, new = self.ctx, self.model, self.folder / "new"
        version = model.library.session_version
        native, seq_native = self.whole.read_bytes(), self.sequence.read_bytes()
        header = layout.parse_file_header(native)
        geometry, meta = self.parsed.geometry, {"a": 1}
        context: dict[str, dict[str, Any]] = {
            "declare": {"rope": {}},
            "decode": {"tokens": [1]},
            "logits": {},
            "n_past": {},
            "seq_rm": {"seq_id": 0, "start": 1},
            "seq_cp": {"src": 0, "dest": 1},
            "clear": {},
            "state_size": {},
            "snapshot": {},
            "restore": {"blob": self.blob},
            "save_state": {"path": new},
            "load_state": {"path": self.whole},
            "seq_state_size": {},
            "seq_snapshot": {},
            "seq_restore": {"blob": self.seq_blob},
            "seq_device_snapshot": {},
            "seq_save_state": {"path": new},
            "seq_load_state": {"path": self.sequence},
            "checkpoint": {"meta": meta},
            "resume": {"checkpoint": self.checkpoint},
        }
        in_thread = {
            f"AsyncContext.{name}": (_in_thread(ctx, name), given)
            for name, given in context.items()
            if name != "declare"
        }
        actx, store = aio.AsyncContext(ctx), PrefixStore("memory:", capacity_bytes=1 << 20)
        on_context = ("find", "recall", "remember", "prefill", "pin", "forget")
        looking: dict[str, dict[str, Any]] = {
            **{name: {} for name in ("stats", "entries", "verify", "flush")},
            "evict": {"to_bytes": 1 << 20},
        }
        about = {"tokens": [1, 2]}
        return {
            "Media": (ls.Media, {"digest": bytes(16), "n_positions": 1}),
            "PrefixStore": (PrefixStore, {"where": ["memory:?size=1MiB"]}),
            **{
                f"PrefixStore.{name}": (getattr(store, name), {"ctx": ctx, **about})
                for name in on_context
            },
            **{f"PrefixStore.{name}": (getattr(store, name), looking[name]) for name in looking},
            "AsyncPrefixStore": (aio.AsyncPrefixStore, {"store": store}),
            "AsyncPrefixStore.flush": (_awaited(aio.AsyncPrefixStore(store), "flush"), {}),
            **{
                f"AsyncPrefixStore.{name}": (
                    _awaited(aio.AsyncPrefixStore(store), name),
                    {"actx": actx, **about},
                )
                for name in on_context
            },
            **{f"Context.{name}": (getattr(ctx, name), given) for name, given in context.items()},
            **in_thread,
            "Context.savepoint": (lambda seq_ids: _enter(ctx.savepoint(seq_ids)), {"seq_ids": 0}),
            "AsyncContext.savepoint": (lambda seq_ids: _undo(ctx, seq_ids), {"seq_ids": 0}),
            "AsyncContext": (aio.AsyncContext, {"context": ctx}),
            "Model": (ls.Model, {"path": self.model_path}),
            "Model.context": (model.context, {"n_ctx": 256, "n_threads": 1}),
            "Model.metadata": (model.metadata, {"key": "general.architecture"}),
            "Model.tokenize": (model.tokenize, {"text": "a"}),
            "Model.detokenize": (model.detokenize, {"tokens": [5]}),
            "attach": (ls.attach, {"obj": ctx.pointer, "library": model.library}),
            "load_library": (ls.load_library, {}),
            "trim_buffers": (ls.trim_buffers, {}),
            "model_fields": (ls.model_fields, {"path": self.model_path}),
            "Fingerprint": (ls.Fingerprint, {}),
            "Fingerprint.differences": (ls.Fingerprint().differences, {"current": ctx.fingerprint}),
            "Fingerprint.to_json": (ls.Fingerprint().to_json, {}),
            "Checkpoint": (
                ls.Checkpoint,
                {"payload": self.blob, "kind": "whole", "session_version": version},
            ),
            "Checkpoint.save": (self.checkpoint.save, {"path": new}),
            "Checkpoint.to_bytes": (self.checkpoint.to_bytes, {}),
            "Checkpoint.load": (ls.Checkpoint.load, {"path": self.folder / "checkpoint"}),
            "Checkpoint.from_bytes": (ls.Checkpoint.from_bytes, {"data": self.data}),
            "Checkpoint.check_unchanged": (self.checkpoint.check_unchanged, {}),
            "Checkpoint.to_native": (self.checkpoint.to_native, {"path": new}),
            "Checkpoint.from_native": (ls.Checkpoint.from_native, {"path": self.whole}),
            "inspect_file": (ls.inspect_file, {"path": self.whole}),
            "verify_file": (inspection.verify_file, {"path": self.whole}),
            "convert_file": (inspection.convert_file, {"source": self.whole, "target": new}),
            "compare": (inspection.compare, {"a": self.file, "b": self.file}),
            "render": (inspection.render, {"file": self.file, "suffix": ".svg"}),
            "render_html": (inspection.render_html, {"file": self.file}),
            "check_model": (testing.check_model, {"model": model}),
            "round_trips": (
                lambda **given: next(iter(testing.round_trips(**given))),
                {"model": model, "options": {}},
            ),
            "nmse": (testing.nmse, {"expected": _floats(), "got": _floats()}),
            "write_model": (testing.write_model, {"path": new}),
            "write_benchmark_model": (testing.write_benchmark_model, {"path": new, "n_layer": 1}),
            "write_probe": (testing.write_probe, {"path": new}),
            "RestorePoint": (ls.RestorePoint, {"n_tokens": 3, "blob": self.ctx.seq_snapshot(0)}),
            "is_known": (layout.is_known, {"arch": "llama"}),
            "model_traits": (layout.model_traits, {}),
            "sequence_from_whole": (
                layout.sequence_from_whole,
                {"data": self.blob, "layout": self.parsed, "seq_id": 0},
            ),
            "form_of": (layout.form_of, {"layout": self.parsed}),
            "convert": (
                layout.convert,
                {"data": self.blob, "layout": self.parsed, "form": layout.form_of(self.parsed)},
            ),
            "merge": (layout.merge, {"a": geometry, "b": geometry}),
            "differences": (layout.differences, {"saved": geometry, "current": geometry}),
            "sequence_head": (layout.sequence_head, {"source": 0}),
            "parse_file_header": (layout.parse_file_header, {"data": native}),
            "unpack_tokens": (layout.unpack_tokens, {"data": native, "header": header}),
            "listed_tokens": (layout.listed_tokens, {"data": native, "header": header}),
            "token_array": (layout.token_array, {"tokens": [1]}),
            "pack_file_header": (layout.pack_file_header, {"kind": "whole", "version": version}),
            "parse_whole": (layout.parse_whole, {"data": self.blob, "version": version}),
            "parse_sequence": (
                layout.parse_sequence,
                {"data": seq_native[24:], "version": version, "headed": False},
            ),
            "parse_state": (
                layout.parse_state,
                {"kind": "whole", "data": self.blob, "version": version, "headed": False},
            ),
            "has_sequence_head": (layout.has_sequence_head, {"data": self.blob}),
            "leading_cells": (
                layout.leading_cells,
                {"data": self.blob, "kind": "whole", "version": version, "headed": False},
            ),
            "is_packed": (layout.is_packed, {"tokens": [1]}),
            "parse_slot_tokens": (layout.parse_slot_tokens, {"data": b""}),
            "has_partial": (layout.has_partial, {"module": "kv"}),
            "groups_of": (layout.groups_of, {"module": "kv"}),
            "take": (
                layout.take,
                {"data": self.seq_blob, "layout": self._of_one(version), "group": "R"},
            ),
            "recognize": (layout.recognize, {"data": native}),
        }


def _floats() -> memoryview:
    return memoryview(bytes(8)).cast("f")


def _enter(manager: Any) -> None:
    with manager:
        pass


def _undo(ctx: ls.Context, seq_id: int) -> None:
    async def run() -> None:
        async with aio.AsyncContext(ctx).savepoint(seq_id):
            pass

    asyncio.run(run())


def _awaited(store: aio.AsyncPrefixStore, name: str) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        async def run() -> Any:
            return await getattr(store, name)(**given)

        return asyncio.run(run())

    return call


def _in_thread(ctx: ls.Context, name: str) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        async def run() -> Any:
            return await getattr(aio.AsyncContext(ctx), name)(**given)

        return asyncio.run(run())

    return call


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function and method that takes what a caller passes, with its own name."""
    for module in (ls, aio, inspection, layout, testing):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield name, value
            elif inspect.isclass(value) and not issubclass(value, BaseException):
                yield from _methods(name, value, described=module in (inspection, layout, testing))


def _methods(name: str, kind: type, *, described: bool) -> Iterator[tuple[str, Any]]:
    """The methods of a class, unless it only describes what a function has found."""
    if described or name in NOT_MADE - {"Context"}:
        return
    if name not in NOT_MADE:
        yield name, kind
    for method, value in vars(kind).items():
        value = getattr(value, "__func__", value)
        taken = inspect.isfunction(value) and not method.startswith("_") and method != "close"
        if taken and f"{name}.{method}" not in UNSEEN:
            yield f"{name}.{method}", value


def rows(name: str, function: Callable[..., Any]) -> dict[str, list[Any] | None]:
    """What each parameter may not be; None for one that has no row."""
    found: dict[str, list[Any] | None] = {}
    for one, parameter in inspect.signature(function).parameters.items():
        if one in ("self", "cls"):
            continue
        own = name.replace("AsyncContext", "Context")
        bad = SPECIAL.get(f"{own}.{one}", NAMES.get(one))
        if own == "Fingerprint":
            bad = MAPPING
        if bad is not None and "None" not in str(parameter.annotation):
            bad = [*bad, None]
        found[one] = bad
    return found


def wrongs(world: World, name: str, function: Callable[..., Any]) -> list[str]:
    """Give each parameter each bad value; return what was taken, changed, or not named."""
    call, given = world.calls()[name]
    before, found = world.state(), []
    for parameter, values in rows(name, function).items():
        for value in values or ():
            shown = f"{name}({parameter}={value!r})"
            try:
                call(**{**given, parameter: value})
            except (ls.StateError, ValueError, TypeError) as error:
                if not _names(str(error), parameter):
                    found.append(f"{shown}: {type(error).__name__}: {error}")
            except Exception as error:
                found.append(f"{shown}: raised {error!r}")
            else:
                found.append(f"{shown}: was taken")
            if world.state() != before:
                return [*found, f"{shown}: changed something"]
    return found


def _names(text: str, parameter: str) -> bool:
    if parameter in text or parameter.rstrip("s") in text:
        return True
    other = {"obj": "llama_context", "packed_tokens": "tokens"}.get(parameter, "sequence id")
    return other in text


def main(name: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        found = wrongs(world, name, dict(public())[name])
        world.close()
    print(*found, sep="\n")
    return bool(found)


ALL = SimpleNamespace(names=sorted({name for name, _ in public()}), functions=dict(public()))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
