"""The package as its .py files alone: no compiled extension, and so no libllama."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llama_state

PACKAGE = Path(llama_state.__file__).parent
GOLDEN = Path(__file__).parents[1] / "golden"


class Copy:
    """A copy of the package, in which commands and code run.

    Attributes:
        folder: What holds it, and the files that the commands write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(
            PACKAGE,
            folder / "llama_state",
            ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"),
        )

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python on the copy, away from any checkout."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("LLAMA_STATE")
        }
        return subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", *arguments],
            cwd=self.folder,
            env={**environment, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run ``llama-state``."""
        return self.python("-m", "llama_state", *map(str, arguments))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """The copy; an installed or other checkout of the package is not the one that is imported."""
    copy = Copy(tmp_path_factory.mktemp("package"))
    done = copy.python("-c", "import llama_state; print(llama_state.__file__)")
    assert done.stdout.strip() == str(copy.folder / "llama_state" / "__init__.py")
    return copy


@pytest.mark.parametrize("name", ["v9.session", "v10.sequence", "v11.session", "v11.slot"])
def test_commands_for_state_files(copy: Copy, name: str) -> None:
    """inspect, verify, convert (there and back) and diff do all their work."""
    native, checkpoint, back = GOLDEN / name, f"{name}.llst", f"{name}.back"
    for arguments, expected in (
        (["inspect", native], "kind  "),
        (["inspect", "--json", native], '"problem": null'),
        (["verify", native], "sound"),
        (["convert", native, checkpoint], ": checkpoint, "),
        (["inspect", checkpoint], "all sound"),
        (["verify", checkpoint], "digests agree"),
        (["diff", native, checkpoint], "the states are equal"),
        (["convert", checkpoint, back], " bytes"),
    ):
        done = copy.command(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert expected in done.stdout
    assert (copy.folder / back).read_bytes() == native.read_bytes()
    other = copy.command("diff", GOLDEN / "v9.sequence", GOLDEN / "v11.session")
    assert other.returncode in (1, 2)
    assert "Traceback" not in other.stderr


def test_prefix_stores(copy: Copy) -> None:
    """What is in one is listed and verified."""
    code = """
from llama_state.store import PrefixStore
PrefixStore("kv", capacity_bytes=1 << 20).close()
"""
    assert copy.python("-c", code).returncode == 0
    for arguments, expected in (
        (["ls", "kv"], "nothing is stored"),
        (["stats", "kv"], "0, 0 of them pinned"),
        (["verify", "kv"], "all sound"),
        (["copy", "kv", "other", "--size", "1MiB"], "0 objects copied"),
    ):
        done = copy.command("store", *arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert expected in done.stdout


def test_the_package(copy: Copy) -> None:
    """Formats, files and checkpoints are read and written from Python too."""
    code = f"""
import sys
import llama_state, llama_state.layout, llama_state.inspection
from llama_state import Checkpoint, Fingerprint, StateFile, inspect_file
made = Checkpoint.from_native({str(GOLDEN / "v11.session")!r})
made.save("a.llst")
found = Checkpoint.load("a.llst")
assert found.payload == made.payload and list(found.tokens) == [1, 0, 1, 0, 1]
assert inspect_file("a.llst").problem is None
assert not any("cffi" in name for name in sys.modules if name.startswith("llama_state"))
"""
    done = copy.python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "name", ["Context", "DeviceSnapshot", "Library", "Model", "attach", "load_library", "aio"]
)
def test_the_rest_says_what_to_do(copy: Copy, name: str) -> None:
    """Names that need the extension raise LibraryNotFoundError, an ImportError, each time."""
    code = f"""
import llama_state
for _ in range(2):
    try:
        llama_state.{name}
    except llama_state.LibraryNotFoundError as error:
        assert isinstance(error, (ImportError, llama_state.StateError))
        print(error)
"""
    done = copy.python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("_llama_cffi is not built: run pip install -e . in a checkout") == 2


@pytest.mark.parametrize("command", ["check", "demo", "doctor"])
def test_commands_that_need_it(copy: Copy, command: str) -> None:
    """They say the same, without a traceback; their help needs nothing."""
    done = copy.command(command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("the extension llama_state._llama._llama_cffi is not built")
    assert "pip install -e ." in done.stderr
    assert copy.command(command, "--help").returncode == 0


def test_a_wrong_extension(tmp_path: Path) -> None:
    """One that Python cannot load is not said to be missing."""
    copy = Copy(tmp_path)
    suffix = next(path.name for path in (PACKAGE / "_llama").glob("_llama_cffi*.so"))
    (tmp_path / "llama_state" / "_llama" / suffix).write_text("not a shared object")
    done = copy.command("doctor")
    assert done.returncode == 2
    assert "built for another Python or system" in done.stderr
    assert "pip install -e ." in done.stderr
