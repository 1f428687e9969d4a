"""Markers, hypothesis profiles, and fixtures of several rooms.

The markers say what a test needs: ``libllama`` (the one that ``load_library()`` finds),
``llama_cpp`` (llama-cpp-python). What has neither needs no llama.cpp at all. ``linux`` is left out
on other systems.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

import tests

if TYPE_CHECKING:
    import llama_state as ls

# A native example makes contexts and decodes; it is not slow by mistake.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=20, derandomize=True, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("whole", settings.get_profile("ci"))
settings.register_profile("soak", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# Provoked aborts must not wait for a debugger, and threads not spin where cores are few.
os.environ["GGML_NO_BACKTRACE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# What a shell starts in the background has SIGINT ignored, and so has what that starts in turn,
# unless it has a handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what only Linux can run, elsewhere."""
    if sys.platform != "linux":
        for item in items:
            if item.get_closest_marker("linux"):
                item.add_marker(pytest.mark.skip("only on Linux"))


def pytest_configure(config: pytest.Config) -> None:
    """With ``-m 'not libllama'`` no libllama is looked for: a machine may have none."""
    wanted = re.split(r"\s+and\s+", config.option.markexpr.strip())
    tests.LIBLLAMA_WANTED = "not libllama" not in wanted


def pytest_collection_finish(session: pytest.Session) -> None:
    """Say which libllama the tests run on, once something has asked for it."""
    if (engine := sys.modules.get("tests.libllama")) and session.config.option.verbose >= 0:
        print(*engine.summary(), sep="\n")


def pytest_unconfigure() -> None:
    if engine := sys.modules.get("tests.libllama"):
        engine.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that takes ``model`` each kind of tiny model that the library can load."""
    if "model" in metafunc.fixturenames:
        metafunc.parametrize("model", _kinds(), indirect=True, scope="session")


def _kinds() -> list[str]:
    if not tests.LIBLLAMA_WANTED:
        return ["any"]
    from tests.libllama import MODELS

    return sorted(MODELS)


@pytest.fixture(scope="session")
def library() -> ls.Library:
    from tests.libllama import LIBRARY

    return LIBRARY


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> ls.Model:
    """The tiny model of one kind."""
    from tests.libllama import MODELS

    return MODELS[request.param]


@pytest.fixture(scope="session")
def llama() -> ls.Model:
    """The plain one, for what does not depend on the kind of memory."""
    from tests.libllama import MODELS

    return MODELS["llama-dense"]


@pytest.fixture
def make(llama: ls.Model) -> Iterator[Callable[..., ls.Context]]:
    """Makes contexts of the plain model and closes them after the test."""
    made: list[ls.Context] = []

    def context(**options: object) -> ls.Context:
        made.append(llama.context(**{"n_ctx": 256, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield context
    for ctx in made:
        ctx.close()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Long reads and writes are done, and reported, in pieces of this many bytes."""
    from llama_state._io import progress, reading

    for module in (progress, reading):
        monkeypatch.setattr(module, "PIECE", 16384)
    return 16384


@pytest.fixture
def shrink_once_opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Makes a file shorter right after its size was asked for."""
    fstat = os.fstat

    def shrink(path: Path, size: int) -> None:
        def then_shrink(fd: int) -> os.stat_result:
            info = fstat(fd)
            os.truncate(path, size)
            return info

        monkeypatch.setattr(os, "fstat", then_shrink)

    return shrink
