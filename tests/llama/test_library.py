"""Finding a libllama, binding it, and what it says of itself."""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import llama_state as ls
from llama_state._llama import discovery
from llama_state.testing.models import KINDS
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama

VERSIONS = {9: 2, 10: 3, 11: 4}


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1", **environment},
        timeout=120,
        check=False,
    )


def test_versions_are_a_known_pair(library: ls.Library) -> None:
    """Session and sequence version come from files that the library wrote."""
    assert VERSIONS[library.session_version] == library.sequence_version
    assert library.path.is_file()
    assert str(library.session_version) in repr(library)


def test_the_default_engine_loads_all_kinds(library: ls.Library) -> None:
    """All thirteen kinds of model are tested on the newest format."""
    if library.session_version == 11:
        assert set(MODELS) == set(KINDS)
    assert "llama-dense" in MODELS


def test_one_file_is_one_library(library: ls.Library) -> None:
    """The same path gives the same object: tables are never doubled."""
    assert ls.load_library(library.path) is library
    assert ls.load_library(str(library.path)) is library


def test_a_library_is_not_pickled(library: ls.Library) -> None:
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(library)


def test_the_environment_decides_over_what_is_installed(
    library: ls.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLAMA_STATE_LIBRARY is used, and where it does not work nothing else is."""
    monkeypatch.setenv("LLAMA_STATE_LIBRARY", str(library.path))
    assert ls.load_library() is library
    monkeypatch.setenv("LLAMA_STATE_LIBRARY", "/nowhere/libllama.so")
    with pytest.raises(ls.LibraryNotFoundError) as caught:
        ls.load_library()
    assert caught.value.tried == (("LLAMA_STATE_LIBRARY=/nowhere/libllama.so", "no such file"),)


def test_every_place_is_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing there the error lists each place and the reason, and what to install."""
    monkeypatch.delenv("LLAMA_STATE_LIBRARY", raising=False)
    monkeypatch.setattr(discovery.libraries, "loaded_files", list)
    monkeypatch.setattr(discovery, "HOSTS", {"xllamacpp_missing": ("*.so",)})
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(ls.LibraryNotFoundError, match="pip install") as caught:
        ls.load_library()
    assert [why for _, why in caught.value.tried] == [
        "not set",
        "no libllama is loaded",
        "not installed",
        "not installed",
    ]
    assert isinstance(caught.value, ImportError)


def test_what_is_no_libllama_is_refused(tmp_path: Path) -> None:
    """Text, a foreign library and an empty folder each say what is wrong with them."""
    (tmp_path / "libllama.so").write_text("not a library")
    with pytest.raises(ls.LibraryNotFoundError, match="cannot be opened"):
        ls.load_library(tmp_path / "libllama.so")
    libm = ctypes.util.find_library("m")
    assert libm is not None
    foreign = next(p for p in discovery.libraries.loaded_files() if p.name.startswith("libm"))
    with pytest.raises(ls.LibraryNotFoundError, match=r"lacks .*llama_state_get_data"):
        ls.load_library(foreign)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ls.LibraryNotFoundError, match="holds no libllama"):
        ls.load_library(tmp_path / "empty")


def test_capabilities_are_symbols(library: ls.Library) -> None:
    """A capability that is missing is refused by name, before its NULL slot could be called."""
    assert "log-get" in library.capabilities
    for name in library.capabilities:
        library.require(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "capabilities", frozenset())
        with pytest.raises(ls.UnsupportedError, match="llama_state_seq_get_size_ext"):
            library.require("state-flags")


THEIR_LOG = f"""
import ctypes
theirs = ctypes.CDLL({str(LIBRARY.path)!r})
seen = []
callback_type = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
callback = callback_type(lambda level, text, data: seen.append(text))
theirs.llama_log_set(callback, None)
"""
STILL_THEIRS = """
now, data = ctypes.c_void_p(), ctypes.c_void_p()
theirs.llama_log_get(ctypes.byref(now), ctypes.byref(data))
assert now.value == ctypes.cast(callback, ctypes.c_void_p).value
"""


def run_beside_another_binding(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run *code* where another binding has loaded the library; its log callback must stay."""
    return run(THEIR_LOG + textwrap.dedent(code) + STILL_THEIRS, **environment)


def test_loaded_by_somebody_else() -> None:
    """A library that is in the process is found there and keeps its own log callback."""
    done = run_beside_another_binding(
        """
        import llama_state as ls
        library = ls.load_library()
        assert library.source == "process", library.source
        assert not seen, "the probe is silent"
        try:
            ls.Model(__file__ if "__file__" in globals() else "/proc/self/maps", library)
        except ls.ModelLoadError as error:
            assert not error.log or seen
        else:
            raise AssertionError
        """,
        LLAMA_STATE_LIBRARY="",
    )
    assert done.returncode == 0, done.stderr


def test_nothing_on_stderr_by_default(tmp_path: Path) -> None:
    """llama.cpp's chatter goes to the Python logger, which is quiet unless somebody listens."""
    model = MODELS["llama-dense"]
    code = f"""
        import logging, sys
        import llama_state as ls
        if sys.argv[1:]:
            logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
        with ls.Model({model.path!r}, ls.load_library({str(LIBRARY.path)!r})) as model:
            model.context(n_ctx=256).close()
        """
    quiet = run(code)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    loud = run(code.replace("if sys.argv[1:]", "if True"))
    assert "llama_state.llama_cpp:" in loud.stdout
    assert loud.stderr == ""


def test_log_lines_reach_the_logger_and_the_exception(
    library: ls.Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The lines of a failing call travel with its exception."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with (
        caplog.at_level(logging.DEBUG, logger="llama_state.llama_cpp"),
        pytest.raises(ls.ModelLoadError) as caught,
    ):
        ls.Model(broken, library)
    assert caught.value.path == str(broken)
    assert caught.value.log
    logged = {record.getMessage() for record in caplog.records}
    assert set(caught.value.log) <= logged


def test_two_libraries_side_by_side(tmp_path: Path) -> None:
    """Two copies of a libllama in one process each keep their own models and contexts."""
    other = tmp_path / "other" / LIBRARY.path.name
    other.parent.mkdir()
    shutil.copy(LIBRARY.path, other)
    done = run(
        f"""
        import llama_state as ls
        one = ls.load_library({str(LIBRARY.path)!r})
        two = ls.load_library({str(other)!r})
        assert one is not two and one.api != two.api
        path = {MODELS["llama-dense"].path!r}
        with ls.Model(path, one) as a, ls.Model(path, two) as b:
            with a.context(n_ctx=256) as x, b.context(n_ctx=256) as y:
                x.decode(range(20))
                y.restore(x.snapshot())
                x.decode([5]); y.decode([5])
                assert bytes(x.logits()) == bytes(y.logits())
                assert (x.library, y.library) == (one, two)
        """
    )
    assert done.returncode == 0, done.stderr


LOAD = """
    import llama_state as ls
    print(ls.load_library().session_version)
"""


@pytest.mark.parametrize("memory_files", [True, False])
def test_without_a_folder_for_temporary_files(tmp_path: Path, memory_files: bool) -> None:
    """A library is probed without one, or the error says what is missing."""
    code = "import os, tempfile; tempfile.tempdir = '/nowhere'\n"
    if not memory_files:
        code += "del os.memfd_create\n"
    result = run(code + textwrap.dedent(LOAD))
    if memory_files:
        assert result.returncode == 0, result.stderr
        assert int(result.stdout) in VERSIONS
    else:
        assert "LibraryNotFoundError" in result.stderr
        assert "set TMPDIR" in result.stderr


def test_a_mapped_file_whose_name_is_not_text(tmp_path: Path) -> None:
    """Any file can be mapped in a process: only the names that matter are looked at."""
    name = os.fsencode(tmp_path) + b"/bytes \xff\xfe.so"
    code = f"""
        import mmap
        with open({name!r}, "w+b") as file:
            file.write(bytes(4096))
            file.flush()
            kept = mmap.mmap(file.fileno(), 4096)
    """
    result = run(textwrap.dedent(code) + textwrap.dedent(LOAD))
    assert result.returncode == 0, result.stderr
