"""What a forked process says of models and contexts of its parent, and how it ends."""

from __future__ import annotations

import pytest

from tests.libllama import LIBRARY, MODELS
from tests.llama.test_library import run

pytestmark = pytest.mark.libllama

BEGIN = f"""
import asyncio, os, sys, threading, time
import llama_state as ls
from llama_state._io.buffers import POOL
PATH, MODEL = {str(LIBRARY.path)!r}, {MODELS["llama-dense"].path!r}
library = ls.load_library(PATH)
model = ls.Model(MODEL, library)
ctx = model.context(n_ctx=256, n_threads=2)
ctx.decode(range(100))
blob = ctx.snapshot()

def in_a_child(work):
    child = os.fork()
    if child == 0:
        work()
        sys.exit(0)
    # It hangs rather than fails, without the mends: longer than any run of it.
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, status
            return
        time.sleep(0.1)
    os.kill(child, 9)
    raise AssertionError("the child hangs")
"""


def check(code: str) -> None:
    done = run(BEGIN + code)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


USES = {
    "decode": "ctx.decode([1])",
    "snapshot": "ctx.snapshot()",
    "restore": "ctx.restore(blob)",
    "n_past": "ctx.n_past()",
    "savepoint": "ctx.savepoint().__enter__()",
    "context": "model.context()",
    "tokenize": "model.tokenize('a')",
    "Model": "ls.Model(MODEL, library)",
    "load_library": "ls.load_library(PATH)",
    "attach": "ls.attach(ctx.pointer, library)",
    "aio": "asyncio.run(actx.n_past())",
}


def test_every_use_is_an_error_at_once() -> None:
    """Also where another thread was in a call, or a task waits for the context's own thread."""
    uses = "\n".join(f"    expect(lambda: {use})" for use in USES.values())
    check(
        f"""
def expect(use):
    try:
        use()
    except ls.UnsupportedError as error:
        assert str(os.getppid()) in str(error) and "spawn" in str(error), error
    else:
        raise AssertionError("no error")

from llama_state.aio import AsyncContext
actx = AsyncContext(ctx)
asyncio.run(actx.n_past())

def uses():
{uses}
    with POOL.lend(100):
        pass  # its lock was held, too

inside, go_on = threading.Event(), threading.Event()
def hold():
    with ctx._handle.use(), POOL._lock:
        inside.set()
        go_on.wait()
thread = threading.Thread(target=hold, daemon=True)
thread.start()
inside.wait()
in_a_child(uses)
go_on.set()
thread.join()
assert ctx.n_past() == 100
"""
    )


def test_nothing_is_freed_or_waited_for() -> None:
    """A child that closes everything, or only exits, leaves the parent's contexts as they are."""
    check(
        """
def close():
    ctx.close()
    ctx.close()
    model.close()

with ctx._handle.use():  # its lock is held at the fork
    in_a_child(close)
    in_a_child(lambda: None)
ctx.restore(blob)
assert ctx.n_past() == 100
"""
    )


def test_a_savepoint_around_a_fork() -> None:
    """What the child raises is what it raises: nothing is undone there."""
    check(
        """
class Mine(Exception): ...
child = None
try:
    with ctx.savepoint():
        child = os.fork()
        if child == 0:
            raise Mine
        os.waitpid(child, 0)
except Mine:
    os._exit(7)
assert ctx.n_past() == 100
"""
    )


def test_a_library_of_the_child() -> None:
    """What a child has loaded itself, it can use."""
    done = run(
        f"""
import os, sys
import llama_state as ls
child = os.fork()
if child == 0:
    model = ls.Model({MODELS["llama-dense"].path!r}, ls.load_library({str(LIBRARY.path)!r}))
    ctx = model.context(n_ctx=256, n_threads=2)
    ctx.decode(range(50))
    ctx.restore(ctx.snapshot())
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
