"""One process in which models, contexts and attachments come and go by command.

Each line of standard input is a JSON list: the name of a method of :class:`Worker` and its
arguments. The answer is one line: ``["ok", value]``, or ``["error", class, text]``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_state as ls
from llama_state._llama._llama_cffi import ffi, lib
from llama_state._llama.handles import Pointer

# Seconds that a forked process or a thread may take; either is over at once.
LIMIT = 20


class Worker:
    """Things by their names, and their pointers, which are remembered for ever."""

    def __init__(self, path: str, folder: str) -> None:
        self.path = path
        self.library = ls.load_library()
        self.things: dict[str, Any] = {}
        self.pointers: dict[str, Pointer] = {}
        self.foreign: dict[str, Any] = {}
        self.devices: list[tuple[int, ls.DeviceSnapshot]] = []  # with the context's address
        # Not a temporary folder: the exit of a forked process would remove it.
        self.file = Path(folder, "state")
        self.running: list[tuple[threading.Thread, threading.Event, list[Any]]] = []
        self.base = ls.Model(path, self.library)
        with self.base.context(n_ctx=256, n_threads=1) as ctx:
            ctx.decode([1, 2, 3])
            ctx.save_state(self.file, [1, 2, 3])

    # -- to make

    def model(self, name: str) -> None:
        self.things[name] = ls.Model(self.path, self.library)
        self.pointers[name] = self.things[name]._handle.pointer

    def context(self, name: str, model: str, cycle: bool) -> None:
        ctx: Any = self.things[model].context(n_ctx=256, n_threads=2)
        if cycle:
            ctx.itself = ctx
        self.things[name] = ctx
        self.pointers[name] = ctx._handle.pointer

    def attach(self, name: str, to: str) -> None:
        self.things[name] = ls.attach(self._address(to), self.library)

    def adopt(self, name: str, to: str) -> None:
        """Attach by a pointer object that two attachments have in common."""
        key = f"pointer of {to}"
        if key not in self.things:
            self.things[key] = ctypes.c_void_p(self._address(to))
        self.things[name] = ls.attach(self.things[key], self.library)

    def make_foreign(self, name: str) -> None:
        """Make a context as another binding does."""
        with self.base._handle.use() as call:
            params = lib.llama_context_default_params(call.api)
            self.foreign[name] = lib.llama_init_from_model(call.api, call.ptr, params)

    def make_again(self, name: str) -> bool:
        """Free such a context and make it again; say whether it has the same address."""
        before = self._address(name)
        self.things.pop(f"pointer of {name}", None)
        self.free_foreign(name)
        self.make_foreign(name)
        return self._address(name) == before

    def free_foreign(self, name: str) -> None:
        lib.llama_free(self.library.api, self.foreign.pop(name))

    def inherits(self, name: str) -> bool:
        """Whether a new attachment has logits or a device snapshot of what was there before."""
        here = self._address(name)
        ctx = ls.attach(here, self.library)
        fresh = [each for address, each in self.devices if address == here and not each.stale]
        try:
            ctx.logits()
        except ls.StateError:
            return bool(fresh)
        return True

    def _address(self, name: str) -> int:
        if name in self.foreign:
            return int(ffi.cast("uintptr_t", self.foreign[name]))
        return int(self.things[name].pointer)

    # -- to use

    def use(self, name: str, how: str) -> object:
        ctx: ls.Context = self.things[name]
        return WAYS[how](self, ctx)

    def load(self, name: str, action: str, target: str) -> int:
        """Load the file; in the middle of it something is done with another thing."""
        ctx: ls.Context = self.things[name]
        pointer, todo = ctx._handle.pointer, [action]

        def progress(done: int, total: int) -> None:
            while todo:
                getattr(self, todo.pop())(target)
            assert not pointer.freed, "freed in the middle of a call"

        ctx.load_state(self.file, progress=progress)
        return ctx.n_past()

    def hold(self, name: str) -> None:
        """Begin to load the file in a thread, and go on there until :meth:`let_go`."""
        ctx: ls.Context = self.things[name]
        inside, go_on = threading.Event(), threading.Event()
        result: list[Any] = []

        def progress(done: int, total: int) -> None:
            inside.set()
            assert go_on.wait(LIMIT), "something else waits for this call"

        def work(ctx: ls.Context) -> None:
            try:
                ctx.load_state(self.file, progress=progress)
                result.append("ok")
            except (ls.ClosedError, AssertionError) as error:
                result.append(repr(error))
            finally:
                inside.set()

        thread = threading.Thread(target=work, args=(ctx,), daemon=True)
        del ctx
        thread.start()
        assert inside.wait(LIMIT)
        self.running.append((thread, go_on, result))

    def let_go(self) -> list[Any]:
        """End all that :meth:`hold` has begun."""
        results = []
        while self.running:
            thread, go_on, result = self.running.pop()
            go_on.set()
            thread.join(LIMIT)
            assert not thread.is_alive()
            results += result
        return results

    # -- to end

    def close(self, name: str) -> None:
        self.things[name].close()

    def drop(self, name: str) -> None:
        del self.things[name]

    def collect(self, _: str = "") -> None:
        gc.collect()

    def threshold(self, allocations: int) -> None:
        """Let the collector run at each so many allocations; 0: never."""
        gc.set_threshold(allocations)

    def fork(self, names: list[str]) -> list[str]:
        """Use everything in a forked process, and drop it there.

        Returns:
            What it says of each; how many pointers it freed; how it ended.
        """
        read, write = os.pipe()
        known = [pointer for pointer in self.pointers.values() if not pointer.freed]
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(read)
            with os.fdopen(write, "w") as out:
                for name in names:
                    out.write(_outcome(self.things[name]) + "\n")
                self.things.clear()
                gc.collect()
                out.write(f"{sum(pointer.freed for pointer in known)}\n")
            sys.exit(0)  # with every finalizer
        os.close(write)
        with os.fdopen(read) as answers:
            said = answers.read().split()
        _, status = os.waitpid(child, 0)
        assert time.monotonic() - start < LIMIT
        return [*said, str(os.waitstatus_to_exitcode(status))]

    def freed(self, names: list[str]) -> dict[str, bool]:
        """Whether the pointers were freed."""
        return {name: self.pointers[name].freed for name in names}

    def reset(self) -> list[str]:
        """Drop everything; return what was not freed then."""
        self.let_go()
        self.things.clear()
        self.devices.clear()
        gc.set_threshold(700)
        gc.collect()
        for name in list(self.foreign):
            self.free_foreign(name)
        left = [name for name, pointer in self.pointers.items() if not pointer.freed]
        self.pointers.clear()
        return left


def _decode(worker: Worker, ctx: ls.Context) -> int:
    ctx.clear()
    ctx.decode([1, 2, 3, 4, 5])
    return ctx.n_past()


def _restore(worker: Worker, ctx: ls.Context) -> int:
    before = ctx.n_past()
    ctx.restore(ctx.snapshot())
    return ctx.n_past() - before


def _device(worker: Worker, ctx: ls.Context) -> int:
    if ctx.library.session_version == 9:  # llama.cpp has none there
        ctx.n_past()
        return 0
    snapshot = ctx.seq_device_snapshot()
    # Of a context of ours it is not kept: it would keep the context.
    if ctx.pointer in map(worker._address, worker.foreign):
        worker.devices.append((ctx.pointer, snapshot))
    return 0


def _undo(worker: Worker, ctx: ls.Context) -> int:
    before = ctx.n_past()
    try:
        with ctx.savepoint():
            ctx.decode([1])
            raise ZeroDivisionError
    except ZeroDivisionError:
        return ctx.n_past() - before


WAYS: dict[str, Callable[[Worker, ls.Context], int]] = {
    "decode": _decode,
    "restore": _restore,
    "device": _device,
    "undo": _undo,
}
EXPECTED = {"decode": 5, "restore": 0, "device": 0, "undo": 0}


def _outcome(thing: Any) -> str:
    try:
        thing.n_past() if isinstance(thing, ls.Context) else thing.context(n_ctx=256)
    except ls.StateError as error:
        return type(error).__name__
    return "used"


def main() -> None:
    worker = Worker(*sys.argv[1:])
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            answer = ["ok", getattr(worker, command)(*arguments)]
        except Exception as error:
            answer = ["error", type(error).__name__, str(error)]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
