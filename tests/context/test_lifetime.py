"""Who lives how long: closing, exit in any order, leaks, threads, borrowed pointers."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import llama_state as ls
from tests.libllama import LIBRARY, MODELS
from tests.llama.test_library import run, run_beside_another_binding

pytestmark = [pytest.mark.libllama, pytest.mark.linux]

Make = Callable[..., ls.Context]


def test_closed_objects(llama: ls.Model, make: Make, tmp_path: Path) -> None:
    """Everything on a closed context is a ClosedError; closing again is nothing."""
    ctx = make()
    blob = ctx.snapshot()
    ctx.save_state(tmp_path / "state")
    ctx.close()
    ctx.close()
    calls: list[Callable[[], object]] = [
        ctx.snapshot,
        ctx.state_size,
        ctx.clear,
        ctx.logits,
        ctx.n_past,
        ctx.seq_snapshot,
        lambda: ctx.decode([1]),
        lambda: ctx.restore(blob),
        lambda: ctx.seq_rm(0),
        lambda: ctx.pointer,
        lambda: ctx.save_state(tmp_path / "other"),
        lambda: ctx.load_state(tmp_path / "state"),
        lambda: ctx.savepoint().__enter__(),
    ]
    for call in calls:
        with pytest.raises(ls.ClosedError, match="the context was closed"):
            call()
    assert "closed" in repr(ctx)
    assert not (tmp_path / "other").exists()


def test_a_model_outlives_its_contexts(library: ls.Library, llama: ls.Model) -> None:
    """A closed model makes no more contexts; those that it made go on, and free it at last."""
    model = ls.Model(llama.path, library)
    ctx = model.context(n_ctx=256)
    model.close()
    with pytest.raises(ls.ClosedError, match="the model was closed"):
        model.context()
    del model
    gc.collect()
    ctx.decode(range(10))
    assert ctx.n_past() == 10
    ctx.close()


def test_handles_are_not_pickled(llama: ls.Model, make: Make) -> None:
    for thing in (llama, make()):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(thing)


ORDERS = {
    "nothing closed": "",
    "model deleted first": "del model",
    "context deleted first": "del ctx",
    "model closed": "model.close()",
    "both in a cycle": "ctx.me = model; model.me = ctx; del ctx, model",
    "kept by atexit": "import atexit; atexit.register(lambda: ctx.n_past())",
    "sys.exit in a savepoint": "import sys\nwith ctx.savepoint(): sys.exit(0)",
    "a daemon thread decodes": (
        "import threading\n"
        "def work():\n"
        "    while True:\n"
        "        ctx.decode(range(60)); ctx.clear()\n"
        "threading.Thread(target=work, daemon=True).start()\n"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_exit_in_any_order(order: str) -> None:
    """No order of deletion crashes the interpreter's exit, and nothing is printed."""
    done = run(
        "import llama_state as ls\n"
        f"library = ls.load_library({str(LIBRARY.path)!r})\n"
        f"model = ls.Model({MODELS['llama-dense'].path!r}, library)\n"
        "ctx = model.context(n_ctx=256)\n"
        "ctx.decode([1, 2, 3])\n" + ORDERS[order]
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_leaks(llama: ls.Model, library: ls.Library, tmp_path: Path) -> None:
    """Models, contexts, states and files come and go without file descriptors or memory left."""

    def cycle() -> None:
        with ls.Model(llama.path, library) as model, model.context(n_ctx=4096) as ctx:
            ctx.decode(range(64))
            ctx.restore(ctx.snapshot())
            ctx.save_state(tmp_path / "state", range(100))
            ctx.load_state(tmp_path / "state")
            for junk in (b"", b"junk" * 100):
                with pytest.raises(ls.FormatError):
                    ctx.restore(junk)

    for _ in range(5):
        cycle()
    gc.collect()
    files, memory = open_files(), resident()
    for _ in range(25):
        cycle()
    gc.collect()
    assert open_files() == files
    # A context of 4096 cells alone has 4 MiB: 25 leaked ones would be 100.
    assert resident() - memory < 20 << 20


def test_contexts_need_no_collector(llama: ls.Model, tmp_path: Path) -> None:
    """300 contexts come and go in flat memory while the collector is off."""
    blob, sizes = None, []
    gc.collect()
    gc.disable()
    try:
        for turn in range(300):
            ctx = llama.context(n_ctx=4096, n_threads=1)
            ctx.decode(range(8))
            blob = ctx.snapshot()
            with suppress(ls.FormatError):
                ctx.restore(b"junk")
            ctx.resume(ctx.checkpoint(0))
            attached = ls.attach(ctx.pointer, ctx.library)
            attached.restore(blob)
            ctx.save_state(tmp_path / "state", durable=False)
            del ctx, attached
            if turn in (50, 175, 299):
                sizes.append(resident())
        # One context has 4 MiB of cells. The allocator takes some MiB once, at any time.
        assert min(sizes[1] - sizes[0], sizes[2] - sizes[1]) < 2 << 20
    finally:
        gc.enable()


def test_threads_take_turns(make: Make) -> None:
    """Any mix of calls from several threads is one after the other: no torn blob, no crash."""
    ctx = make(n_ctx=1024, n_seq_max=4)
    blobs: list[tuple[int, bytes]] = []
    errors: list[BaseException] = []

    def work(seq_id: int) -> None:
        try:
            for turn in range(20):
                ctx.decode(range(1 + turn % 7), seq_id)
                blobs.append((seq_id, ctx.seq_snapshot(seq_id)))
                ctx.seq_restore(blobs[-1][1], seq_id)
                if turn % 5 == 4:
                    ctx.seq_rm(seq_id)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(blobs) == 80
    for seq_id, blob in blobs:
        ctx.seq_restore(blob, seq_id)  # parses and verifies each


def test_close_waits_for_a_call(llama: ls.Model) -> None:
    """close() while another thread is in a call neither frees under it nor hangs."""
    for _ in range(10):
        ctx = llama.context(n_ctx=1024)
        started = threading.Event()
        seen: list[BaseException] = []

        def work(
            ctx: ls.Context = ctx,
            started: threading.Event = started,
            seen: list[BaseException] = seen,
        ) -> None:
            started.set()
            try:
                while True:
                    ctx.decode(range(100))
                    ctx.snapshot()
                    ctx.clear()
            except ls.ClosedError as error:
                seen.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        ctx.close()
        thread.join(timeout=30)
        assert not thread.is_alive()
        assert len(seen) == 1


# -- contexts that somebody else made


def test_attach_to_any_kind_of_pointer(library: ls.Library, make: Make) -> None:
    """An int, ctypes pointers and a cffi pointer of another module name the same context."""
    from cffi import FFI

    ctx = make()
    ctx.decode(range(12))
    foreign = FFI()
    foreign.cdef("struct llama_context;")
    blank = type("llama_context", (ctypes.Structure,), {})
    pointers = [
        ctx.pointer,
        ctypes.c_void_p(ctx.pointer),
        ctypes.cast(ctx.pointer, ctypes.POINTER(blank)),
        foreign.cast("struct llama_context *", ctx.pointer),
    ]
    for pointer in pointers:
        attached = ls.attach(pointer, library)
        assert attached.pointer == ctx.pointer
        assert attached.snapshot() == ctx.snapshot()
        attached.close()
    assert ctx.n_past() == 12  # letting go of a borrowed context frees nothing


def test_attachments_share_a_lock_and_the_context(library: ls.Library, make: Make) -> None:
    """Two attachments of one context are one lock."""
    ctx = make()
    one, two = ls.attach(ctx.pointer, library), ls.attach(ctx.pointer, library)
    assert one._handle.pointer is two._handle.pointer is ctx._handle.pointer
    blob = ctx.snapshot()
    one.decode(range(5))
    assert two.n_past() == 5
    two.restore(blob)
    assert ctx.n_past() == 0


def test_an_attachment_of_a_closed_context(library: ls.Library, llama: ls.Model) -> None:
    """When the owner, also one of ours, has closed the context, using it is a ClosedError."""
    owner = llama.context(n_ctx=256)
    attached = ls.attach(owner.pointer, library)
    owner.close()
    with pytest.raises(ls.ClosedError):
        attached.snapshot()
    with llama.context(n_ctx=256) as other, ls.attach(other.pointer, library) as again:
        again.decode([1])
        with pytest.raises(ls.ClosedError):
            attached.n_past()


def test_an_attachment_keeps_its_owner(library: ls.Library, llama: ls.Model) -> None:
    """The object that was attached is kept alive, also one that is more than a pointer."""

    class Holder(ctypes.c_void_p):
        ctx: ls.Context

    owner = llama.context(n_ctx=256)
    holder = Holder(owner.pointer)
    holder.ctx = owner
    attached = ls.attach(holder, library)
    del owner, holder
    gc.collect()
    attached.decode([1, 2])
    assert attached.n_past() == 2


def test_attach_refuses(library: ls.Library, make: Make) -> None:
    """No library, a null pointer and what is no pointer each say what is wrong."""
    with pytest.raises(ls.StateError, match="needs the library"):
        ls.attach(make().pointer)
    with pytest.raises(ls.ClosedError, match="null"):
        ls.attach(0, library)
    with pytest.raises(ls.ClosedError, match="null"):
        ls.attach(ctypes.c_void_p(None), library)
    with pytest.raises(ls.StateError, match="not a llama_context pointer"):
        ls.attach("0x1234", library)


def test_threads_and_another_bindings_log() -> None:
    """Contexts work side by side while another binding's Python callback is served by the log.

    The callback takes the GIL inside llama.cpp; our log capture must neither deadlock with it,
    nor call itself, nor lose it.
    """
    done = run_beside_another_binding(
        f"""
        import threading
        import llama_state as ls
        library = ls.load_library({str(LIBRARY.path)!r})
        model = ls.Model({MODELS["llama-dense"].path!r}, library)
        logs = []

        def work(n):
            with model.context(n_ctx=256, n_threads=1) as ctx:
                ctx.decode(range(20))
                blob = ctx.seq_snapshot()
                for _ in range(30):
                    try:
                        ctx.seq_restore(blob[:-7], validate=False)
                    except ls.RestoreError as error:
                        logs.append(error.log)
                        assert error.rolled_back
                    ctx.decode([n])
                    ctx.seq_rm(0, 20)

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "deadlock"
        assert len(logs) == 120 and all(logs), len(logs)
        assert len(seen) > 120
        """
    )
    assert done.returncode == 0, done.stderr


def test_rollback_is_not_trusted(library: ls.Library) -> None:
    """A recurrent context with rollback snapshots accepts a cut after a restore and is wrong.

    llama.cpp does not check that its snapshots are valid; we refuse the cut.
    """
    kind = "lfm2-dense"
    block = type("params", (ctypes.Structure,), {"_fields_": [("words", ctypes.c_uint32 * 256)]})
    c = ctypes.CDLL(str(library.path))
    if kind not in MODELS or not hasattr(c, "llama_n_rs_seq"):
        return
    c.llama_context_default_params.restype = block
    c.llama_model_default_params.restype = block
    for function in (c.llama_model_load_from_file, c.llama_init_from_model):
        function.restype = ctypes.c_void_p
    params = c.llama_context_default_params()
    params.words[0], params.words[4] = 256, 4  # n_ctx, n_rs_seq
    path = os.fsencode(MODELS[kind].path)
    model = c.llama_model_load_from_file(path, c.llama_model_default_params())
    pointer = c.llama_init_from_model(ctypes.c_void_p(model), params)
    try:
        c.llama_n_rs_seq.argtypes = [ctypes.c_void_p]
        if library.session_version == 9 and c.llama_n_rs_seq(pointer) == 0:
            return  # this build has no rollback for this model
        assert c.llama_n_rs_seq(pointer) == 4
        with ls.attach(pointer, library) as ctx:
            ctx.decode(range(10))
            restored = ctx.restore(ctx.snapshot())
            assert restored.sequences[0].rewind_min == 10
            with pytest.raises(ls.UnsupportedError):
                ctx.seq_rm(0, 9)
            assert ctx.n_past() == 10
    finally:
        c.llama_free(ctypes.c_void_p(pointer))
        c.llama_model_free(ctypes.c_void_p(model))


USES: dict[str, Callable[[ls.Context, Path], object]] = {
    "nothing": lambda ctx, path: None,
    "decode": lambda ctx, path: ctx.decode([1, 2, 3]),
    "restore": lambda ctx, path: ctx.restore(ctx.snapshot()),
    "file": lambda ctx, path: (ctx.save_state(path, durable=False), ctx.load_state(path)),
    "sequence": lambda ctx, path: ctx.seq_restore(ctx.seq_snapshot(0), 1),
    "copy": lambda ctx, path: ctx.seq_cp(0, 1),
    "checkpoint": lambda ctx, path: ctx.resume(ctx.checkpoint(0)),
    "device": lambda ctx, path: ctx.seq_device_snapshot().restore(),
    "refused": lambda ctx, path: ctx.restore(b"no state"),
}


@pytest.mark.parametrize("use", USES)
def test_a_context_is_freed_at_once(llama: ls.Model, use: str, tmp_path: Path) -> None:
    """No circle of objects keeps a context until the next garbage collection."""
    gc.collect()
    gc.disable()
    try:
        ctx = llama.context(n_ctx=256, n_seq_max=2, n_threads=1)
        pointer, handle = ctx._handle.pointer, weakref.ref(ctx._handle)
        with suppress(ls.StateError):
            ctx.decode([1, 2, 3])
            USES[use](ctx, tmp_path / "state")
        del ctx
        assert handle() is None
        assert pointer.freed
    finally:
        gc.enable()
