"""llama.cpp's log while libraries fail, handlers raise and the package is imported again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.libllama import LIBRARY, MODELS
from tests.llama.test_library import run

pytestmark = pytest.mark.libllama

BEGIN = f"""
import gc, logging, sys
import llama_state as ls
PATH, MODEL = {str(LIBRARY.path)!r}, {MODELS["llama-dense"].path!r}
"""


def check(code: str) -> None:
    done = run(BEGIN + code)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_failed_probe() -> None:
    """A library that fails its probe goes on logging, and can be tried again."""
    check(
        """
from pathlib import Path
from llama_state._llama import library as module
probe, module._PROBE_MODEL = module._PROBE_MODEL, Path("/nowhere")
for _ in range(20):
    try:
        ls.load_library(PATH)
    except ls.LibraryNotFoundError:
        gc.collect()
        junk = [bytes(64) for _ in range(10_000)]
    else:
        raise AssertionError("the probe worked")
import ctypes
c = ctypes.CDLL(PATH)
for _ in range(20):
    c.llama_model_load_from_file.restype = ctypes.c_void_p
    c.ggml_backend_load(b"/nowhere")
module._PROBE_MODEL = probe
ls.Model(MODEL, ls.load_library(PATH)).context(n_ctx=256).decode([1, 2, 3])
"""
    )


def test_a_handler_that_raises(tmp_path: Path) -> None:
    """Its exception reaches the caller, and nothing of the call is left behind."""
    check(
        f"from pathlib import Path\nFOLDER = Path({str(tmp_path)!r})\n"
        """
from llama_state._llama._llama_cffi import lib
class Failed(Exception): ...
def fail(record):
    raise Failed
library = ls.load_library(PATH)
logger = logging.getLogger("llama_state.llama_cpp")
logger.setLevel(logging.DEBUG)
cut = FOLDER / "cut.gguf"
cut.write_bytes(Path(MODEL).read_bytes()[:100])
for begin in (lambda: ls.Model(MODEL, library), lambda: ls.Model(cut, library)):
    logger.addFilter(fail)
    try:
        begin()
    except Failed:
        pass
    else:
        raise AssertionError("no line was logged")
    assert lib.log_sink_depth() == 0
    assert lib.log_sink_size(False) == 0
    logger.removeFilter(fail)
ls.Model(MODEL, library).context(n_ctx=256).decode([1, 2, 3])
"""
    )


AGAIN = """
for name in [name for name in sys.modules if name.partition(".")[0] == "llama_state"]:
    del sys.modules[name]
import llama_state as again
assert again is not ls
"""
ELSEWHERE = """
try:
    import _interpreters as interpreters
    other = interpreters.create("legacy")  # with the GIL of this one
except ImportError:  # before Python 3.13
    import _xxsubinterpreters as interpreters
    other = interpreters.create()
failed = interpreters.run_string(other, f'''
import llama_state as ls
ctx = ls.Model({MODEL!r}, ls.load_library({PATH!r})).context(n_ctx=256)
ctx.decode([1, 2, 3])
ctx.restore(ctx.snapshot())
''')
assert failed is None, failed  # before Python 3.13 it raises
interpreters.destroy(other)
again = ls
"""


@pytest.mark.parametrize("other", [AGAIN, ELSEWHERE], ids=["again", "sub-interpreter"])
def test_a_second_import(other: str) -> None:
    """Both work on in one process, the logger gets every line, and the first may be collected."""
    check(
        "first = ls.Model(MODEL, ls.load_library(PATH)).context(n_ctx=256)\nfirst.decode([1])\n"
        + other
        + """
lines = []
class Listener(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logger = logging.getLogger("llama_state.llama_cpp")
logger.addHandler(Listener())
logger.setLevel(logging.DEBUG)
second = again.Model(MODEL, again.load_library(PATH)).context(n_ctx=256)
assert lines
second.decode([1, 2])
first.decode([2])
second.restore(first.snapshot())
assert second.n_past() == first.n_past() == 2
del first
gc.collect()
second.decode([3])
"""
    )
