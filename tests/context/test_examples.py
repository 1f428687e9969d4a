"""The scripts of examples/ that need no other binding run, each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from llama_state.testing import write_model
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama

EXAMPLES = Path(__file__).parents[2] / "examples"
HYBRID = "jamba-dense" if "jamba-dense" in MODELS else "mamba2-dense"
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=100).execute()
nbformat.write(notebook, sys.argv[2])
"""
EVALUATED = re.compile(r"evaluated (\d+) (?:tokens )?of (\d+)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model that has a tokenizer, and one whose memory cannot be cut."""
    for name, kind in (("plain", "llama-dense"), ("hybrid", HYBRID)):
        write_model(tmp_path / f"{name}.gguf", kind, text=True)
    return tmp_path


def run(name: str, *arguments: object) -> list[str]:
    """The lines that an example prints."""
    return python(str(EXAMPLES / f"{name}.py"), *map(str, arguments))


def python(*arguments: str, cwd: Path | None = None) -> list[str]:
    """The lines that a process of Python prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=cwd,
        env={
            **os.environ,
            "LLAMA_STATE_LIBRARY": str(LIBRARY.path),
            "PYTHONPATH": str(EXAMPLES.parent),
            "PYTEST_ADDOPTS": "",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def evaluated(lines: list[str]) -> list[tuple[int, int]]:
    """How many tokens of how many were evaluated, for each line that says so."""
    return [(int(m[1]), int(m[2])) for m in map(EVALUATED.match, lines) if m]


def test_all_of_them_are_tested() -> None:
    """Those without llama-cpp-python here, the others in ``adapters``."""
    names = {
        path.stem for path in EXAMPLES.glob("*.py") if "import llama_cpp" not in path.read_text()
    }
    assert names == {
        "branch_an_agent",
        "chat_after_a_restart",
        "keep_a_hybrid_model",
        "serve_chats",
        "serve_with_fastapi",
        "share_a_folder",
        "share_a_system_prompt",
    }


@contextmanager
def serving(name: str, *arguments: object, says: str) -> Iterator[tuple[int, IO[str]]]:
    """Run an example that serves; give its port and what it prints, and interrupt it."""
    with subprocess.Popen(
        [sys.executable, "-u", str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "LLAMA_STATE_LIBRARY": str(LIBRARY.path)},
    ) as server:
        assert server.stdout
        try:
            lines = iter(server.stdout.readline, "")
            found = (re.search(rf"{says}(\d+)", line) for line in lines)
            yield int(next(match for match in found if match)[1]), server.stdout
            server.send_signal(signal.SIGINT)
            assert server.wait(60) in (0, -signal.SIGINT)
            assert "Traceback" not in server.stdout.read()
        finally:
            server.kill()


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_chat_after_a_restart(folder: Path, kind: str) -> None:
    """A process that starts again evaluates the new message; without the store, all of it."""
    path = folder / f"{kind}.gguf"
    texts = ("Hello", "And then?")
    first, second = (run("chat_after_a_restart", path, folder, text) for text in texts)
    (done, whole), (new, longer) = evaluated([first[0], second[0]])
    assert done == whole
    assert new == longer - whole - 16  # what was asked and answered is there
    shutil.rmtree(folder / "kv")
    ((n_evaluated, n_tokens),) = evaluated(run("chat_after_a_restart", path, folder, "Hello"))
    assert n_evaluated == n_tokens > longer


def test_share_a_system_prompt(folder: Path) -> None:
    """The system prompt is evaluated once, and kept once."""
    lines = run("share_a_system_prompt", folder / "plain.gguf")
    chats = evaluated(lines[1:])
    assert len(chats) == 4
    assert all(new < 30 < whole for new, whole in chats)
    kept, alone = map(int, re.findall(r"\d+", lines[-1]))
    assert kept < alone / 3


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_branch_an_agent(folder: Path, kind: str) -> None:
    """Each step that is tried costs its own tokens."""
    steps = evaluated(run("branch_an_agent", folder / f"{kind}.gguf"))
    assert len(steps) == 9
    assert all(new < 20 < whole for new, whole in steps)


def test_keep_a_hybrid_model(folder: Path) -> None:
    """Where a restore point is, a question costs its own tokens, and a repeated one nothing."""
    lines = run("keep_a_hybrid_model", folder / "hybrid.gguf")
    (all_of_it, whole), (new, _), (again, _) = evaluated(lines)
    assert all_of_it == whole
    assert 0 < new < 20
    assert again == 0
    assert lines[3].startswith("no restore point after token")


def test_share_a_folder(folder: Path) -> None:
    """What the first process has evaluated the others do not; without the key nothing is found."""
    lines = run("share_a_folder", folder / "plain.gguf", folder / "shared")
    first, *others = evaluated(lines)
    assert first[0] == first[1]
    assert len(others) == 3
    assert all(new < 20 < whole for new, whole in others)
    assert lines[-1] == "without the key: nothing is stored"


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_serve_chats(folder: Path, kind: str) -> None:
    """Clients take turns on one context; each turn evaluates the message, whoever was before."""
    arguments = (folder / f"{kind}.gguf", folder / "kv", 0)
    with serving("serve_chats", *arguments, says="listening on port ") as (port, printed):
        clients = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(2)]
        turns = []
        for turn in range(3):
            for number, client in enumerate(clients):
                client.sendall(f"Message {turn} of client {number}\n".encode())
                assert client.makefile("rb").readline().startswith((b"'", b'"'))
                turns += evaluated([printed.readline()])
        assert len(turns) == 6
        assert turns[0][0] == turns[0][1]
        for (_, before), (new, whole) in zip(turns[:4], turns[2:], strict=True):
            assert new == whole - before - 16  # all but what was asked and answered
        clients[0].sendall(b"x" * 1100 + b"\n")
        assert b"need" in clients[0].makefile("rb").readline()  # and the other one goes on
        clients[1].sendall(b"Still there?\n")
        assert clients[1].makefile("rb").readline()
        for client in clients:
            client.close()


def test_serve_with_fastapi(folder: Path) -> None:
    """The same over HTTP."""
    pytest.importorskip("fastapi")

    def say(text: str) -> dict[str, object]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/chats/mine",
            json.dumps({"text": text}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - our own
            return json.load(answer)

    arguments = (folder / "plain.gguf", folder / "kv", 0)
    with serving("serve_with_fastapi", *arguments, says=r"running on http://127\.0\.0\.1:") as (
        port,
        _,
    ):
        first, second = say("Hello, server."), say("Hello, server.")
        assert first["text"]
        assert first["evaluated"] == second["evaluated"] + 1  # the first one begins with BOS
        with pytest.raises(urllib.error.HTTPError, match="413") as refused:
            say("x" * 1100)
        refused.value.close()


def test_look_into_states(tmp_path: Path) -> None:
    """The notebook runs, and what it shows are tables; it is kept without what it shows."""
    pytest.importorskip("nbclient")
    source, done = EXAMPLES / "look_into_states.ipynb", tmp_path / "done.ipynb"
    cells = json.loads(source.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    python("-c", EXECUTE, str(source), str(done), cwd=tmp_path)
    shown = [
        output["data"].get("text/html", "")
        for cell in json.loads(done.read_text())["cells"]
        for output in cell.get("outputs", ())
    ]
    tables = ["".join(html) for html in shown if html]
    facts = ("session file", "kv", "a prompt", "only in the second", "snapshot/restore")
    assert len(tables) == len(facts)
    for table, fact in zip(tables, facts, strict=True):
        assert fact in table


def test_check_states(folder: Path) -> None:
    """The job for GitHub runs the check on the project's own model, and keeps its report."""
    job = (EXAMPLES / "check_states.yml").read_text()
    (command,) = re.findall(r"- run: pytest (.*)", job)
    (folder / "models").mkdir()
    (folder / "plain.gguf").rename(folder / "models" / "tiny.gguf")
    some = (
        "-p",
        "llama_state.pytest_plugin",
        "-k",
        "unified and plain and save_state and not empty",
    )
    lines = python("-m", "pytest", *some, *shlex.split(command), cwd=folder)
    assert re.search(r"\b[1-9]\d* passed\b", lines[-1])
    (report,) = re.findall(r"path: (\S+\.xml)", job)
    assert (folder / report).is_file()
