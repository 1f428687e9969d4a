"""What works on other systems, and what they say of the rest: ``tests/systems.py`` plays them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from llama_state.testing import write_model
from tests.libllama import LIBRARY
from tests.llama.hosts import compile_code
from tests.systems import OPERATIONS, SYSTEMS

pytestmark = [pytest.mark.libllama, pytest.mark.linux]

NO_SPACE: Final = (
    "SaveError: [Errno 12] state not saved, the old file is unchanged: no memory for a copy, and"
    " the file system cannot reserve space for the file: "
)
NO_LOCKS: Final = "UnsupportedError: this system has no file locks"

# What does not work, of each system, and the beginning of what is said then.
EXPECTED: Final[dict[str, dict[str, str]]] = {
    "no fcntl": {"store": NO_LOCKS, "evict_what_is_read": NO_LOCKS, "leftovers": "FileExistsError"},
    "no posix_fallocate": {"save_without_memory": NO_SPACE},
    "no memfd, RTLD_NOLOAD": {"find_loaded": "FileNotFoundError: no libllama is loaded"},
    "no /proc": {"find_loaded": "FileNotFoundError: no libllama is loaded"},
    "win32": {
        "save_without_memory": NO_SPACE,
        "save_over_mapped": "SaveError: [Errno 13] state not saved, the old file is unchanged: ",
    },
}

# The two functions of macOS's loader, by what Linux has.
DYLD: Final = """
#define _GNU_SOURCE
#include <link.h>
#include <stddef.h>
#include <stdint.h>
struct wanted { uint32_t number, at; const char *name; };
static int look(struct dl_phdr_info *info, size_t size, void *data)
{
    struct wanted *wanted = data;
    if (wanted->at == wanted->number)
        wanted->name = info->dlpi_name;
    wanted->at++;
    return 0;
}
uint32_t _dyld_image_count(void)
{
    struct wanted wanted = {UINT32_MAX, 0, NULL};
    dl_iterate_phdr(look, &wanted);
    return wanted.at;
}
const char *_dyld_get_image_name(uint32_t number)
{
    struct wanted wanted = {number, 0, NULL};
    dl_iterate_phdr(look, &wanted);
    return wanted.name;
}
"""


def play(system: str, model: Path, folder: Path, **env: str) -> Any:
    """Run everything on a system; what it prints."""
    command = [sys.executable, "-m", "tests.systems", system, str(model), str(folder)]
    folder.mkdir()
    if system != "linux":
        command.append(str(folder.with_name("linux")))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the folder beside which each system gets its own; Linux has been there."""
    folder = tmp_path_factory.mktemp("systems")
    model = write_model(folder / "model.gguf")
    played = play("linux", model, folder / "linux")
    assert set(played["found"].values()) == {"works"}, played
    return model, folder


@pytest.mark.parametrize("system", [name for name in SYSTEMS if name != "linux"])
def test_a_system(system: str, files: tuple[Path, Path]) -> None:
    """All works and the bytes are those of Linux, but for what is expected to say why it cannot."""
    model, folder = files
    env = {}
    if system == "darwin":
        env["LD_PRELOAD"] = str(compile_code(folder / "dyld.so", DYLD))
    if system == "win32":  # where xllamacpp cannot be used
        env["LLAMA_STATE_LIBRARY"] = str(LIBRARY.path)
    played = play(system, model, folder / system.replace("/", ""), **env)
    expected = EXPECTED.get(system, {})
    for operation in (each.__name__ for each in OPERATIONS):
        found, wanted = played["found"][operation], expected.get(operation, "works")
        assert found.startswith(wanted), (operation, found)
    assert played["differ"] == []
    CALLS.get(system, len)(played["called"])


def asks_for_the_disk(called: list[Any]) -> None:
    """On macOS: files and their folders reach the disk; all space is asked for, from the end on."""
    reserved = [call for call in called if call[0] == "F_PREALLOCATE"]
    assert reserved
    assert all(call == ["F_PREALLOCATE", 4, 3, 0] for call in reserved)
    assert called.count("F_FULLFSYNC") >= 10


def opens_no_text(called: list[Any]) -> None:
    """On Windows: no file in text mode; locks; and libraries find what lies beside them."""
    assert [call for call in called if call[0] == "text mode"] == []
    assert "locking" in called
    assert ["add_dll_directory", str(LIBRARY.path.parent)] in called


CALLS: Final = {"darwin": asks_for_the_disk, "win32": opens_no_text}
