"""Libraries as other hosts bring them: anywhere, with plug-ins, too old, forks, and too new."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import llama_state as ls
from llama_state._llama import discovery
from llama_state._llama.library import CAPABILITIES
from tests.libllama import LIBRARY, MODELS
from tests.llama.hosts import (
    FUNCTIONS,
    NO_PLUGINS,
    PLUGINS,
    UNKNOWN_VERSIONS,
    compile_host,
    compile_names,
)
from tests.llama.test_library import run

pytestmark = [pytest.mark.libllama, pytest.mark.linux]

OPTIONAL = {name for names in CAPABILITIES.values() for name in names}
# What these packages lack of what is needed.
MEMORY = {
    "llama_get_memory",
    "llama_memory_clear",
    "llama_memory_seq_cp",
    "llama_memory_seq_pos_max",
    "llama_memory_seq_pos_min",
    "llama_memory_seq_rm",
    "llama_model_n_swa",
    "llama_n_ctx_seq",
}
IK_LLAMA_CPP_0_1_5 = MEMORY | {"llama_model_free", "llama_model_rope_type"}
LLAMA_CPP_CFFI_0_4_42 = MEMORY | {"llama_model_is_hybrid"}


@pytest.mark.parametrize("name", ["libllama.so", "./libllama.so", "../here/libllama.so", "."])
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_a_name_in_the_current_folder(name: str, by: str, tmp_path: Path) -> None:
    """The file of this folder is meant: the loader alone would search the system's folders."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "libllama.so").symlink_to(LIBRARY.path)
    argument = repr(name) if by == "argument" else ""
    done = run(
        f"""
        import os
        import llama_state as ls
        os.chdir({str(here)!r})
        print(ls.load_library({argument}).path)
        """,
        LLAMA_STATE_LIBRARY="" if argument else name,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(LIBRARY.path)


def test_a_host_that_has_not_loaded_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each known host is found where it is installed, and its code is not run."""
    for package, patterns in discovery.HOSTS.items():
        file = tmp_path / package / patterns[0].replace("*", "")
        file.parent.mkdir(parents=True)
        for name in (file.name, "libllama.a", f"{file.name}.0.17"):
            (file.parent / name).touch()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit", encoding="utf-8")
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("LLAMA_STATE_LIBRARY", raising=False)
    found = {candidate.source: candidate.path for candidate in discovery.candidates()}
    assert "llama_cpp_py_sync" in discovery.HOSTS
    for package in discovery.HOSTS:
        path = found[package]
        assert path is not None
        assert path.is_relative_to(tmp_path / package)
        assert path.suffix == ".so"  # no archive, and no file for one version


def test_back_ends_as_plugins(tmp_path: Path) -> None:
    """They are loaded from the library's own folder where there is no back end, else not."""
    library = compile_host(tmp_path / "libllama.so", PLUGINS)
    load = f"import llama_state as ls; print(ls.load_library({str(library)!r}).session_version)"
    without = run(load)
    assert "cannot load a model" in without.stderr
    (tmp_path / "libggml-cpu.so").touch()
    done = run(load)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == LIBRARY.session_version
    compile_host(library, NO_PLUGINS)
    done = run(load)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("lacks", "says", "says_not"),
    [
        (IK_LLAMA_CPP_0_1_5, "is a fork of llama.cpp", "too old"),
        (LLAMA_CPP_CFFI_0_4_42, "is a llama.cpp that is too old", "fork"),
        ({"llama_n_ctx_seq"}, "too old: it has no llama_n_ctx_seq yet", "fork"),
        ({"llama_decode"}, "lacks llama_decode", "too old"),
        (FUNCTIONS - {"ggml_commit"}, "is no libllama", "too old"),
    ],
    ids=["ik_llama_cpp", "llama_cpp_cffi", "autumn 2025", "to come", "ggml"],
)
def test_what_is_wrong_is_said(lacks: set[str], says: str, says_not: str, tmp_path: Path) -> None:
    """A library that lacks functions is too old, a fork, another library, or only lacks them."""
    library = compile_names(tmp_path / "libllama.so", FUNCTIONS - lacks - OPTIONAL)
    with pytest.raises(ls.LibraryNotFoundError) as caught:
        ls.load_library(library)
    ((_, why),) = caught.value.tried
    assert says in why
    assert says_not not in why
    assert all(name in why for name in lacks - OPTIONAL)


def test_a_library_for_a_newer_system(tmp_path: Path) -> None:
    """Which glibc it needs is what is wrong, and it is said first."""
    library = tmp_path / "libllama.so"
    compile_host(library, "void *made(void) { return malloc(1); }")
    data = library.read_bytes()
    versions = sorted({word for word in data.split(b"\0") if word.startswith(b"GLIBC_2.")}, key=len)
    assert versions
    newer = b"GLIBC_9." + b"9" * (len(versions[0]) - len(b"GLIBC_9."))
    library.write_bytes(data.replace(versions[0] + b"\0", newer + b"\0"))
    with pytest.raises(ls.LibraryNotFoundError, match=r"needs glibc 9\.9.*newer system"):
        ls.load_library(library)


def test_a_library_of_an_unknown_version(tmp_path: Path) -> None:
    """It says so at load and at save; errors name validate=False, with which states come back."""
    library = compile_host(tmp_path / "libllama.so", UNKNOWN_VERSIONS)
    code = f"""
        import warnings
        import llama_state as ls
        from llama_state.inspection import verification

        def warned(call, *arguments, **options):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                result = call(*arguments, **options)
            assert all(one.category is ls.VersionWarning for one in seen), seen
            assert all(one.filename == "<string>" for one in seen), seen[0].filename
            assert all("session version 12 and sequence version 5" in str(one.message)
                       and "validate=False" in str(one.message) for one in seen)
            return len(seen), result

        def refused(call, *arguments):
            try:
                call(*arguments)
            except ls.UnsupportedError as error:
                assert "validate=False" in str(error), error
            else:
                raise AssertionError

        n, library = warned(ls.load_library, {str(library)!r})
        assert n == 1
        assert (library.session_version, library.sequence_version) == (12, 5)
        assert warned(ls.load_library, {str(library)!r}) == (0, library)
        model = ls.Model({MODELS["llama-dense"].path!r}, library)
        ctx = model.context(n_ctx=256)
        ctx.decode(range(20))
        whole, one = {str(tmp_path / "whole")!r}, {str(tmp_path / "one")!r}
        assert warned(ctx.save_state, whole, range(20), durable=False)[0] == 1
        assert warned(ctx.seq_save_state, one, 0, durable=False)[0] == 1
        n, blob = warned(ctx.snapshot)
        assert n == 0
        other = model.context(n_ctx=256)
        refused(other.load_state, whole)
        refused(other.seq_load_state, one)
        refused(other.restore, blob)
        refused(ctx.checkpoint)
        ctx.decode([5])
        for load in (
            lambda new: new.load_state(whole, validate=False),
            lambda new: new.seq_load_state(one, validate=False),
            lambda new: new.restore(blob, validate=False),
        ):
            with model.context(n_ctx=256) as new:
                load(new)
                assert new.n_past() == 20
                new.decode([5])
                assert bytes(ctx.logits()) == bytes(new.logits())
        for path in (whole, one):
            verdict = verification.verify_file(path)
            assert (verdict.outcome, verdict.sound) == ("unknown version", False)
            assert "UNKNOWN VERSION" in " ".join(verification.text(verdict).split())
        """
    done = run(code)
    assert done.returncode == 0, done.stderr
