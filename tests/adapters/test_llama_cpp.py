"""Inside llama-cpp-python: its library, its context, its log callback, and xllamacpp's beside it.

A library cannot be unloaded, so every check runs in an interpreter of its own: ``python
test_llama_cpp.py NAME FOLDER`` runs one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state.testing import write_model
from llama_state.testing.conformance import NMSE_LIMIT, check_model, nmse

pytestmark = pytest.mark.llama_cpp

PROMPT = "The state of a context, saved and brought back."


@contextmanager
def llama(folder: Path) -> Iterator[Any]:
    """A ``Llama`` on the tiny text model."""
    import llama_cpp

    path = write_model(folder / "text.gguf", text=True)
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False)
    try:
        yield model
    finally:
        model.close()


def address(model: Any) -> int:
    """Where the context of a ``Llama`` is."""
    found = ctypes.cast(model.ctx, ctypes.c_void_p).value
    assert found
    return found


def xllamacpp() -> Path:
    """The shared object of the installed xllamacpp, which is not imported."""
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.so"))


def logits_of(model: Any) -> list[float]:
    """What llama-cpp-python itself reads after a decode."""
    import llama_cpp

    row = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return list(row[: model.n_vocab()])


def its_library_is_found(folder: Path) -> None:
    """``load_library()`` binds the very library that llama_cpp loaded, xllamacpp or not."""
    with llama(folder):
        import llama_cpp

        library = ls.load_library()
        assert library.source == "process", library.source
        theirs = llama_cpp.llama_cpp._lib
        assert library.path == Path(theirs._name).resolve()
        there = ctypes.cast(theirs.llama_state_get_data, ctypes.c_void_p).value
        here = ctypes.cast(ctypes.CDLL(str(library.path)).llama_state_get_data, ctypes.c_void_p)
        assert here.value == there
        assert ls.load_library(theirs._name) is library


def its_context_is_attached(folder: Path) -> None:
    """Snapshot, decode, restore, decode again: the same logits, in the context of a ``Llama``."""
    with llama(folder) as model:
        tokens = model.tokenize(PROMPT.encode())
        model.eval(tokens)
        library = ls.load_library()
        with ls.attach(address(model), library) as ctx:
            assert ctx.pointer == address(model)
            assert (ctx.arch, ctx.n_ctx) == ("llama", model.n_ctx())
            assert ctx.n_past() == len(tokens)
            whole, sequence = ctx.snapshot(), ctx.seq_snapshot()
            ctx.decode([65])
            expected = ctx.logits()
            assert list(expected) == logits_of(model)
            for restore, blob in ((ctx.restore, whole), (ctx.seq_restore, sequence)):
                ctx.decode(range(66, 90))
                restored = restore(blob)
                assert restored.sequences[0].n_past == ctx.n_past() == len(tokens)
                ctx.decode([65])
                assert nmse(expected, ctx.logits()) < NMSE_LIMIT
                assert list(ctx.logits()) == logits_of(model)
            with ctx.savepoint():
                pass
            assert ctx.n_past() == len(tokens) + 1
        # Let go, not freed: the Llama goes on.
        gc.collect()
        model.reset()
        model.eval(tokens)
        assert logits_of(model)


def its_files_are_exchanged(folder: Path) -> None:
    """Session files go both ways between llama_cpp's own functions and ours."""
    with llama(folder) as model:
        import llama_cpp

        tokens = model.tokenize(PROMPT.encode())
        model.eval(tokens)
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        theirs, ours = folder / "theirs", folder / "ours"
        assert llama_cpp.llama_state_save_file(model.ctx, os.fsencode(theirs), array, len(tokens))
        with ls.attach(address(model), ls.load_library()) as ctx:
            assert ctx.save_state(ours, tokens) == theirs.stat().st_size
            assert ours.read_bytes() == theirs.read_bytes()
            ctx.clear()
            assert ctx.load_state(theirs).tokens == tuple(tokens)
            assert ctx.n_past() == len(tokens)
            ctx.clear()
            room = (llama_cpp.llama_token * 512)()
            count = ctypes.c_size_t()
            assert llama_cpp.llama_state_load_file(
                model.ctx, os.fsencode(ours), room, len(room), ctypes.byref(count)
            )
            assert room[: count.value] == tokens
            assert ctx.n_past() == len(tokens)


def its_log_callback_stays(folder: Path) -> None:
    """Before, between and after our calls llama_cpp's log goes where llama_cpp sent it."""
    import llama_cpp

    heard: list[bytes] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, data: object) -> None:
        heard.append(text)

    def installed() -> int | None:
        callback = llama_cpp.llama_log_callback()
        llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(ctypes.c_void_p()))
        return ctypes.cast(callback, ctypes.c_void_p).value

    llama_cpp.llama_log_set(listen, ctypes.c_void_p())
    mine = ctypes.cast(listen, ctypes.c_void_p).value
    broken = folder / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with llama(folder) as model:
        library = ls.load_library()
        assert installed() == mine
        with ls.attach(address(model), library) as ctx:
            ctx.decode([65, 66])
            ctx.restore(ctx.snapshot())
        assert installed() == mine
        heard.clear()
        with pytest.raises(ls.ModelLoadError) as caught:
            ls.Model(broken, library)
        # Ours to report, and theirs to hear.
        assert caught.value.log
        assert all(any(line in text.decode() for text in heard) for line in caught.value.log)
        assert installed() == mine
        heard.clear()
        refused = llama_cpp.llama_model_load_from_file(
            os.fsencode(broken), llama_cpp.llama_model_default_params()
        )
        assert not refused
        assert heard


def two_libraries_side_by_side(folder: Path) -> None:
    """llama_cpp's and xllamacpp's in one process: each round trips, neither sees the other."""
    with llama(folder) as model:
        theirs, other = ls.load_library(), ls.load_library(xllamacpp())
        assert theirs is not other
        assert theirs.path != other.path
        assert theirs.api != other.api
        path = folder / "text.gguf"
        options = {"split": {"n_seq_max": 3}, "unified": {"n_seq_max": 3, "kv_unified": True}}
        for library in (theirs, other):
            report = check_model(path, library=library, configurations=options)
            assert report.ok, str(report)
            assert report.library == str(library.path)
        with (
            ls.attach(address(model), theirs) as attached,
            ls.Model(path, theirs) as one,
            ls.Model(path, other) as two,
            one.context(n_ctx=256, flash_attn=False) as a,  # as llama_cpp makes them
            two.context(n_ctx=256) as b,
        ):
            assert [ctx.library for ctx in (attached, a, b)] == [theirs, theirs, other]
            assert len({ctx.pointer for ctx in (attached, a, b)}) == 3
            # Interleaved, each goes on alone.
            for token in range(20):
                a.decode([token])
                if token % 2:
                    b.decode([token])
            assert [ctx.n_past() for ctx in (attached, a, b)] == [0, 20, 10]
            expected = a.logits()
            blobs = [ctx.snapshot() for ctx in (a, b)]
            b.clear()
            attached.restore(blobs[0])
            attached.decode([5])
            a.decode([5])
            assert nmse(a.logits(), attached.logits()) < NMSE_LIMIT
            assert nmse(a.logits(), expected) > NMSE_LIMIT
            assert b.n_past() == 0
            b.restore(blobs[1])
            assert [ctx.n_past() for ctx in (attached, a, b)] == [21, 21, 10]
            # Files of another version are rewritten before llama.cpp sees them.
            a.save_state(folder / "one")
            restored = b.load_state(folder / "one")
            assert b.n_past() == 21
            if theirs.session_version != other.session_version:
                versions = f"{theirs.session_version} to {other.session_version}"
                assert f"session version {versions}" in (restored.converted or "")


CHECKS: tuple[Callable[[Path], None], ...] = (
    its_library_is_found,
    its_context_is_attached,
    its_files_are_exchanged,
    its_log_callback_stays,
    two_libraries_side_by_side,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_a_process_of_its_own(check: Callable[[Path], None], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    done = subprocess.run(
        [sys.executable, __file__, check.__name__, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "LLAMA_STATE_LIBRARY": ""},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    {check.__name__: check for check in CHECKS}[sys.argv[1]](Path(sys.argv[2]))
