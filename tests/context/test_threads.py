"""Many threads at once: each on contexts of its own, all on one model, pool, store and log."""

from __future__ import annotations

from pathlib import Path

import pytest

import llama_state as ls
from tests.libllama import LIBRARY, MODELS
from tests.llama.test_library import run
from tests.many_threads import together

pytestmark = pytest.mark.libllama

THREADS, ROUNDS = 6, 8
KINDS = [kind for kind in ("llama-dense", "jamba-dense") if kind in MODELS]


def context(kind: str) -> ls.Context:
    return MODELS[kind].context(n_ctx=256, n_seq_max=2, n_threads=1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_on_its_own_context(kind: str, tmp_path: Path) -> None:
    """States are those of the own context, in memory, in files and as checkpoints."""
    prompts = [[n + 1, *range(2, 12 + n)] for n in range(THREADS)]
    expected = []
    for prompt in prompts:
        with context(kind) as ctx:
            ctx.decode(prompt)
            expected.append(ctx.snapshot())

    def work(n: int) -> None:
        with context(kind) as ctx, context(kind) as other:
            for _ in range(ROUNDS):
                ctx.clear()
                ctx.decode(prompts[n])
                assert ctx.snapshot() == expected[n]
                ctx.save_state(tmp_path / f"{n}", prompts[n])
                assert list(other.load_state(tmp_path / f"{n}").tokens) == prompts[n]
                assert other.snapshot() == expected[n]
                other.clear()
                other.resume(ctx.checkpoint(0, tokens=prompts[n]))
                assert other.n_past() == len(prompts[n])

    together(THREADS, work)


@pytest.mark.parametrize("behind", [False, True], ids=["at once", "behind"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_on_one_store(kind: str, behind: bool) -> None:
    """All is kept once, found by everybody, and counted exactly."""
    common = list(range(1, 40))

    with ls.PrefixStore("memory:", capacity_bytes=1 << 28, chunk_tokens=8) as store:

        def work(n: int) -> None:
            with context(kind) as ctx:
                for turn in range(ROUNDS):
                    prompt = [*common, 50 + n, 60 + turn]
                    ctx.clear()
                    store.prefill(ctx, prompt)
                    assert ctx.n_past() == len(prompt)
                    if behind:
                        assert store.flush()

        together(THREADS, work)
        stats = store.stats()
    assert stats.recalls == THREADS * ROUNDS
    assert not stats.failures
    assert not stats.refused


@pytest.mark.parametrize("kind", KINDS)
def test_one_context_of_all(kind: str) -> None:
    """Calls on one context come one after the other: each sees a whole state of one of them."""
    with context(kind) as ctx:
        states = []
        for n in range(THREADS):
            ctx.clear()
            ctx.decode(range(1, 20 + 20 * n))
            states.append(ctx.snapshot())

        def work(n: int) -> None:
            for _ in range(10 * ROUNDS):
                ctx.restore(states[n])
                assert ctx.snapshot() in states

        together(THREADS, work)
        assert ctx.snapshot() in states


def test_the_log_of_threads_that_are_in_no_call() -> None:
    """What they log while others take it is not lost, and comes whole."""
    code = f"""
import ctypes, logging, sys, threading, time
sys.setswitchinterval(1e-6)
import llama_state as ls
from llama_state._llama import log
library = ls.load_library({str(LIBRARY.path)!r})
lines = []
class Listener(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
log.LOGGER.addHandler(Listener())
log.LOGGER.setLevel(logging.DEBUG)
log.LOGGER.propagate = False
c = ctypes.CDLL({str(LIBRARY.path)!r})
stop, counts = threading.Event(), [0] * 3
def logged(n):
    while not stop.is_set():
        if sum(counts) - len(lines) > 50:  # there is room for some only
            time.sleep(0)
            continue
        c.ggml_backend_load(b"/nowhere")
        counts[n] += 1
def taken():
    with library.log.capture():
        pass
c.ggml_backend_load(b"/nowhere")
taken()
each = lines[-1]
lines.clear()
threads = [threading.Thread(target=logged, args=(n,)) for n in range(3)]
for thread in threads:
    thread.start()
end = time.monotonic() + 1
while time.monotonic() < end:
    taken()
stop.set()
for thread in threads:
    thread.join()
taken()
assert set(lines) == {{each}}, lines
assert len(lines) == sum(counts), (len(lines), counts)
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
