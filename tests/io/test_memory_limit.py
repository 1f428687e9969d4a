"""Saves and loads where there is no memory for a second state."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llama_state as ls
from llama_state._io import atomic, buffers, lease
from llama_state._io.platform import files
from llama_state.testing import write_benchmark_model
from tests.libllama import LIBRARY

pytestmark = pytest.mark.libllama

Make = Callable[..., ls.Context]


@pytest.mark.parametrize("leases", [True, False])
def test_a_limit_changes_no_byte(
    model: ls.Model, leases: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no memory at all for copies the files are the same, and so is what comes back."""
    monkeypatch.setattr(lease, "_WORTH_MAPPING", 0)
    if not leases:
        monkeypatch.setattr(files, "take_lease", lambda fd: False)
    ls.trim_buffers()
    with (
        model.context(n_ctx=256, n_seq_max=2, n_threads=1) as source,
        model.context(n_ctx=256, n_seq_max=2, n_threads=1) as target,
    ):
        for ctx, lengths in ((source, (60, 20)), (target, (10, 30))):
            for seq_id, n in enumerate(lengths):
                ctx.decode([(i + seq_id) % ctx.n_vocab for i in range(n)], seq_id)
        free, bound = tmp_path / "free", tmp_path / "bound"
        for tokens in ((), range(30)):
            for seq_id in (0, 1):
                source.seq_save_state(free, seq_id, tokens, durable=False)
                n = source.seq_save_state(bound, seq_id, tokens, durable=False, memory_limit=0)
                assert bound.read_bytes() == free.read_bytes()
                restored = target.seq_load_state(bound, seq_id, memory_limit=0)
                assert (restored.nbytes, restored.tokens) == (n, tuple(tokens))
            source.save_state(free, tokens, durable=False)
            source.save_state(bound, tokens, durable=False, memory_limit=0)
            assert bound.read_bytes() == free.read_bytes()
            assert target.load_state(bound, memory_limit=0).sequences.keys() == {0, 1}
            assert target.n_past(0) == source.n_past(0)


def test_what_is_undone_needs_no_memory_either(make: Make, tmp_path: Path) -> None:
    """Also the copy for a rollback, and the one of a copy between streams, go to a file then."""
    with buffers.POOL.limited(0):
        ctx = make(n_seq_max=2)
        ctx.decode(range(40))
        ctx.seq_cp(0, 1)
        assert ctx.n_past(1) == 40
        before = ctx.snapshot()
        assert ctx.seq_restore(ctx.seq_snapshot(0), 1, validate=False).sequences[1].n_past == 40
        assert ctx.snapshot() == before
        with pytest.raises(ls.RestoreError) as caught:
            ctx.seq_restore(ctx.seq_snapshot(0)[:-1], 0, validate=False)
        assert caught.value.rolled_back
        assert ctx.snapshot() == before


STATE = """
import resource, struct, sys
import llama_state as ls
from llama_state import layout
model_path, library_path, path, n_cell, what = sys.argv[1:]
n_cell = int(n_cell)

def data_size():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) << 10 for l in lines if l.startswith("VmData:"))

def write_state(file, blob, session_version):
    # The state of one token, its cell and its rows repeated.
    headed = layout.has_sequence_head(blob)
    parsed = layout.parse_sequence(blob, version=session_version, headed=headed)
    (stream,) = parsed.caches[0].streams
    file.write(blob[8 * headed : stream.offset] + struct.pack("<I", n_cell))
    file.writelines(struct.pack("<iIi", i, 1, 0) for i in range(n_cell))
    at = stream.tail
    for block in (*stream.k, *stream.v):
        file.write(blob[at : block.offset])
        at = block.offset + block.nbytes
        file.write(blob[block.offset : at] * n_cell)

model = ls.Model(model_path, ls.load_library(library_path))
with model.context(n_ctx=n_cell, flash_attn=True) as ctx:
    ctx.decode([1])
    with open(path, "wb") as file:
        version = model.library.sequence_version
        file.write(layout.pack_file_header("sequence", version))
        write_state(file, ctx.seq_snapshot(), model.library.session_version)
"""

LIMITED = """
ls.trim_buffers()
idle = data_size()
ctx = model.context(n_ctx=n_cell, flash_attn=True)
size = ctx.seq_load_state(path).nbytes
assert size > 500 << 20, size
ls.trim_buffers()
limit = idle + size * 13 // 10
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    bytes(size)
    raise SystemExit("the limit leaves room for a second state")
except MemoryError:
    pass
save, load = (
    (ctx.save_state, ctx.load_state)
    if what == "whole"
    else (ctx.seq_save_state, ctx.seq_load_state)
)
for _ in range(2):
    assert save(path, durable=False) >= size
    assert load(path).sequences[0].n_past == n_cell
print(size, idle, limit)
"""

STORE = """
import gc
MIB = 1 << 20
CHUNK = 256
ctx = model.context(n_ctx=n_cell + 512, n_seq_max=2, kv_unified=True, flash_attn=True)
size = ctx.seq_load_state(path).nbytes
chunk = size // n_cell * CHUNK
tokens = [i % 50 for i in range(n_cell)]

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) << 10 for l in lines if l.startswith(name + ":"))

def peak(act):
    # What is resident at the most, memory and mapped pages of files, above what was before.
    gc.collect()
    ls.trim_buffers()
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    act()
    return status("VmHWM") - before

def remember(n_new):
    found = store.remember(ctx, tokens)
    assert (found.n_tokens, found.new_tokens) == (len(tokens), n_new), store.stats()

def recall():
    assert store.recall(ctx, [*tokens, 1]).n_past == len(tokens), store.stats()

assert peak(ctx.snapshot) > size * 0.9
with ls.PrefixStore(path + ".store", capacity_bytes=4 << 30, chunk_tokens=CHUNK) as store:
    all_new = peak(lambda: remember(n_cell))
    ctx.decode([7] * 64)
    tokens += [7] * 64
    few_new = peak(lambda: remember(64))
    ctx.clear()
    back = peak(recall)
print([each // MIB for each in (size, chunk, all_new, few_new, back)])
slack = 6 * MIB  # for Python, and huge pages
assert chunk * 0.9 < all_new < chunk + slack
assert chunk // 4 * 0.9 < few_new < chunk // 4 + slack
assert chunk * 0.9 < back < 2 * chunk + slack
"""


@pytest.mark.linux
@pytest.mark.parametrize("scope", ["whole", "sequence"])
def test_half_a_gibibyte_without_room_for_a_second(tmp_path: Path, scope: str) -> None:
    """With 1.3 times the state's size above the process without context, both succeed.

    What is limited is the private memory of the process (RLIMIT_DATA), the context included;
    pages of files are not counted, since the system can write them out.
    """
    run(LIMITED, tmp_path, scope)


@pytest.mark.linux
def test_a_store_holds_one_chunk_or_two(tmp_path: Path) -> None:
    """What is kept of 4,096 tokens goes through memory chunk by chunk; a recall maps two of them.

    64 tokens take no more than they have.
    """
    run(STORE, tmp_path, "store")


def run(program: str, folder: Path, what: str) -> None:
    """Run a program on a model, and a file with the state of 4,096 tokens: 512 MiB."""
    model = write_benchmark_model(folder / "m.gguf", n_layer=4, n_head_kv=64, n_ctx=8192)
    arguments = [str(model), str(LIBRARY.path), str(folder / "state"), "4096", what]
    done = subprocess.run(
        [sys.executable, "-c", STATE + program, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])


@pytest.mark.linux
def test_a_state_that_the_pool_would_not_keep(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written to the pages of its file, which takes no new memory; else as any other is."""
    ctx = make()
    ctx.decode(range(60))
    ctx.save_state(tmp_path / "kept", range(60))
    wanted = (tmp_path / "kept").read_bytes()
    ls.trim_buffers()
    monkeypatch.setattr(buffers.POOL, "_kept", 1 << 16)
    assert ctx.state_size() > 1 << 16
    with monkeypatch.context() as patch:
        patch.setattr(buffers, "anonymous", lambda _: pytest.fail("a copy in new memory"))
        ctx.save_state(tmp_path / "file", range(60))
    assert (tmp_path / "file").read_bytes() == wanted
    monkeypatch.setattr(atomic, "reserve", lambda *_: False)
    seen: list[tuple[int, int]] = []
    ctx.save_state(tmp_path / "copy", range(60), progress=lambda *step: seen.append(step))
    assert (tmp_path / "copy").read_bytes() == wanted
    assert (seen[0], seen[-1]) == ((0, len(wanted)), (len(wanted), len(wanted)))
    with pytest.raises(ls.SaveError, match="cannot reserve space"):
        ctx.save_state(tmp_path / "copy", memory_limit=0)
    assert (tmp_path / "copy").read_bytes() == wanted
