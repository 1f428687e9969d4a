"""Two machines share a system prompt through Redis and through a bucket.

Each machine is a network namespace with an address of its own; the server is on the first one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.testing import write_model
from tests.libllama import LIBRARY
from tests.servers.redis_server import program
from tests.servers.turn import QUESTION, SYSTEM, prompt

pytestmark = pytest.mark.libllama

ROOT = Path(__file__).parents[2]
FIRST, SECOND = "10.213.7.1", "10.213.7.2"
KIND = "llama-dense"


class Machines:
    """Two network namespaces, joined by a cable."""

    def __init__(self, stack: ExitStack) -> None:
        self._names = [f"ls{os.getpid()}{end}" for end in "ab"]
        for name in self._names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        first, second = self._names
        ends = [f"v{name[2:]}" for name in self._names]
        ip("link", "add", ends[0], "netns", first, "type", "veth", "peer", ends[1], "netns", second)
        for name, end, address in zip(self._names, ends, (FIRST, SECOND), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def start(self, number: int, *command: str, shown: bool = True) -> subprocess.Popen[str]:
        """Start a program on one of them."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self._names[number], *command],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "LLAMA_STATE_LIBRARY": str(LIBRARY.path),
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "NO_PROXY": "*",
            },
            stdout=subprocess.PIPE if shown else subprocess.DEVNULL,
            stderr=subprocess.PIPE if shown else subprocess.DEVNULL,
            text=True,
        )

    def output(self, number: int, *command: str) -> str:
        """Run a program on one of them, and return what it prints."""
        with self.start(number, *command) as process:
            out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        return out

    def _succeeds(self, number: int, *command: str) -> bool:
        with self.start(number, *command) as process:
            process.communicate(timeout=60)
        return process.returncode == 0

    @contextmanager
    def running(self, number: int, *command: str) -> Iterator[subprocess.Popen[str]]:
        """Run a server on one of them for the length of a block."""
        with self.start(number, *command, shown=False) as process:
            try:
                yield process
            finally:
                process.kill()

    def wait_for(self, port: int, server: subprocess.Popen[str]) -> None:
        """Wait until the server on the first machine takes connections from the second."""
        connect = f"import socket; socket.create_connection(({FIRST!r}, {port}), 1)"
        end = time.monotonic() + 60
        while not self._succeeds(1, sys.executable, "-c", connect):
            assert server.poll() is None, "the server ended at once"
            assert time.monotonic() < end, "the server does not start"


def ip(*arguments: str) -> None:
    """Run ip."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    """The two of them; skips the test where none can be made."""
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed: apt-get install iproute2")
    with ExitStack() as stack:
        try:
            made = Machines(stack)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield made


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    """A tiny model."""
    return Path(write_model(tmp_path / "m.gguf", KIND))


def redis_command(folder: Path) -> Sequence[str]:
    """A server of Redis that both can reach."""
    options = ("--port", "6379", "--bind", FIRST, "--protected-mode", "no", "--save", "")
    return (program("redis"), *options, "--dir", str(folder))


def s3_command(folder: Path) -> Sequence[str]:
    """A server of S3 that both can reach."""
    return (sys.executable, "-m", "moto.server", "-H", FIRST, "-p", "5000")


def make_bucket(machines: Machines) -> None:
    """Make the bucket, from the second machine."""
    signed = "AWS4-HMAC-SHA256 Credential=x/20200101/us-east-1/s3/aws4_request, Signature=0"
    machines.output(
        1,
        *(sys.executable, "-c"),
        "from urllib.request import Request, urlopen;"
        f"urlopen(Request('http://{FIRST}:5000/kept', method='PUT',"
        f" headers={{'Authorization': {signed!r}}}))",
    )


@pytest.mark.parametrize("engine", ["redis", "s3"])
def test_two_machines(machines: Machines, model_path: Path, tmp_path: Path, engine: str) -> None:
    """The second evaluates what is its own, and its logits are those of a run of its own."""
    command = (redis_command if engine == "redis" else s3_command)(tmp_path)
    port = 6379 if engine == "redis" else 5000
    url = f"redis://{FIRST}" if engine == "redis" else f"s3://kept/x?endpoint=http://{FIRST}:5000"
    with machines.running(0, *command) as server:
        machines.wait_for(port, server)
        if engine == "s3":
            make_bucket(machines)
        evaluated = []
        for number in (0, 1):
            turn = ("-m", "tests.servers.turn", str(model_path), url, str(number + 1))
            n, best, failures = machines.output(number, sys.executable, *turn).split(maxsplit=2)
            assert failures.strip() == "{}", failures
            assert int(best) == greedy(model_path, number + 1)
            evaluated.append(int(n))
        assert evaluated == [SYSTEM + QUESTION, QUESTION]


def greedy(model_path: Path, seed: int) -> int:
    """The next token of a run without a store."""
    with ls.Model(model_path, LIBRARY) as model, model.context(n_ctx=512) as ctx:
        ctx.decode(prompt(seed, model.n_vocab))
        row = ctx.logits()
        return max(range(len(row)), key=row.__getitem__)
