"""Kill processes that use one prefix store, at any moment, and look at what they leave.

``python -m tests.fuzz.kills --kills 1000``: two processes remember, recall, evict, forget, pin and
repair in a folder that is always full. One of them is killed, again and again, while the other goes
on. After each kill the folder is opened: it must be within its capacity, sound, and give what a
context gives that decodes the prompt. Exit status 1 where it was not.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import llama_state as ls
from llama_state.store import PrefixStore
from llama_state.testing.conformance import nmse, nmse_limit
from llama_state.testing.models import write_model

KINDS = ("llama-dense", "gemma3-dense", "jamba-dense")
CHUNK = 16
# Some prompts of 60 tokens, not all.
CAPACITIES = {"llama-dense": 400_000, "gemma3-dense": 900_000, "jamba-dense": 3_000_000}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["llama_state", "llama_state.testing.conformance", "tests.kinds"])
LIMIT = 1e-5
LONGEST = 0.15
"""Seconds that a process lives at most, once it has begun."""


def context(model: ls.Model) -> ls.Context:
    """Make a context."""
    return model.context(n_ctx=256, n_threads=1, flash_attn=False)


def store(folder: Path, kind: str) -> PrefixStore:
    """Open the store."""
    return PrefixStore(folder / "kv", capacity_bytes=CAPACITIES[kind], chunk_tokens=CHUNK)


def prompt(rng: random.Random) -> list[int]:
    """A prompt that shares its beginning with others."""
    tokens: list[int] = []
    for _ in range(rng.randint(1, 4)):
        tokens += [10 + rng.randrange(3)] * rng.choice((5, 16, 20))
    return [*tokens, rng.randrange(2, 6)]


def use(kind: str, folder: Path, seed: int, rounds: int, ready: Connection) -> None:
    """Use the store, until this process is killed or has done *rounds* things."""
    rng = random.Random(seed)
    library = ls.load_library()
    with ls.Model(folder / f"{kind}.gguf", library) as model, context(model) as ctx:
        ctx.decode([1])
        ready.send_bytes(b"ready")
        with store(folder, kind) as used:
            for _ in range(rounds):
                tokens = prompt(rng)
                way = rng.random()
                if way < 0.7:
                    used.prefill(ctx, tokens)
                    if way < 0.3:
                        ctx.decode([7] * 9)
                        used.remember(ctx, [*tokens, *[7] * 9], wait=way < 0.15)
                elif way < 0.8:
                    used.evict(int(CAPACITIES[kind] * rng.random()))
                elif way < 0.88:
                    used.forget(ctx, tokens)
                elif way < 0.95:
                    used.pin(ctx, tokens, ttl=0.1)
                else:
                    used.verify(repair=True)
            used.flush()
            if used.stats().failures:
                sys.exit(f"failures: {used.stats().failures}")


def held(folder: Path) -> int:
    """The bytes of all files while nobody makes room, each once."""
    sizes = {}
    with suppress(FileNotFoundError), (folder / "kv" / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.joinpath("kv").rglob("*"):
            with suppress(FileNotFoundError):
                info = path.stat()
                sizes[info.st_ino] = info.st_size * path.is_file()
    return sum(sizes.values())


class Judge:
    """Looks at the folder.

    Attributes:
        counts: What was found.
    """

    def __init__(self, kind: str, folder: Path, model: ls.Model, rng: random.Random) -> None:
        self.kind = kind
        self.folder = folder
        self.rng = rng
        self.ctx, self.fresh = context(model), context(model)
        self.limit = max(LIMIT, nmse_limit(self.ctx.arch))
        self.counts: Counter[str] = Counter()

    def look(self, *, alone: bool) -> None:
        """Look, while another process goes on, or *alone*.

        Raises:
            AssertionError: Something is wrong.
        """
        with store(self.folder, self.kind) as opened:
            size = held(self.folder)
            assert size <= CAPACITIES[self.kind], f"{size} bytes"
            found = opened.verify()
            assert not found.damaged, found.damaged
            assert not found.foreign, f"{found.foreign} objects that cannot be read"
            self.counts["objects"] += found.n_objects
            self.counts["orphans"] += len(found.orphans)
            if alone:
                parts = [path.name for path in self.folder.rglob("*.part")]
                assert not parts, parts
                opened.verify(repair=True)
                assert opened.verify().ok
            for _ in range(3):
                self.recall(opened)
            stats = opened.stats()
            assert not stats.failures, stats.failures
            assert not stats.damaged, "damage"

    def recall(self, opened: PrefixStore) -> None:
        """What is recalled can be gone on from."""
        tokens = prompt(self.rng)
        self.ctx.clear()
        recalled = opened.recall(self.ctx, tokens)
        assert self.ctx.n_past() == recalled.n_past
        self.counts["hits"] += recalled.n_past > 0
        self.ctx.decode(tokens[recalled.n_past :])
        self.fresh.clear()
        self.fresh.decode(tokens)
        error = nmse(self.ctx.logits(), self.fresh.logits())
        assert error <= self.limit, f"wrong hit of {recalled.n_past} tokens: {error}"


class User:
    """A process that uses the store.

    It is forked from one that has imported all that it needs, and nothing else.
    """

    def __init__(self, kind: str, folder: Path, seed: int, rounds: int = 1 << 30) -> None:
        self._ready, ready = FORKS.Pipe(duplex=False)
        arguments = (kind, folder, seed, rounds, ready)
        self._process: BaseProcess = FORKS.Process(target=use, args=arguments)
        self._process.start()
        ready.close()

    def wait(self) -> None:
        """Wait until it uses the store."""
        assert self._ready.poll(60), "it does not begin"
        self._ready.recv_bytes()

    def end(self) -> int | None:
        """Wait until it ends, and return its status."""
        self._process.join(120)
        return self._process.exitcode

    def kill(self) -> None:
        """Kill it.

        Raises:
            AssertionError: It had ended: something was raised in it.
        """
        ended = not self._process.is_alive()
        self._process.kill()
        self._process.join()
        self._process.close()
        self._ready.close()
        assert not ended, "a process ended that nobody killed"


def run(kind: str, folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kill one process after the other, beside one that goes on; what was found."""
    rng = random.Random(f"{kind} {seed}")
    model = ls.Model(write_model(folder / f"{kind}.gguf", kind))
    judge = Judge(kind, folder, model, rng)
    user, following = (User(kind, folder, rng.randrange(1 << 30)) for _ in range(2))
    try:
        user.wait()
        for _ in range(kills):
            following.wait()
            time.sleep(rng.random() * LONGEST)
            user.kill()
            judge.counts["kills"] += 1
            # Each is started while the other is there, so that there is always one.
            user, following = following, User(kind, folder, rng.randrange(1 << 30))
            judge.look(alone=False)
    finally:
        with suppress(AssertionError):
            following.kill()
        user.kill()
    judge.look(alone=True)
    last = User(kind, folder, seed, rounds=20)
    assert last.end() == 0, "failures of a process that nobody killed"
    return judge.counts


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    found: Counter[str] = Counter()
    wrong = []
    for kind in KINDS:
        place = Path(tempfile.mkdtemp(prefix="llama_state-kills-"))
        try:
            found += run(kind, place, -(-options.kills // len(KINDS)), options.seed)
        except AssertionError as error:
            wrong.append(f"{kind}: {error}: left in {place}")
        else:
            shutil.rmtree(place)
    seconds = time.monotonic() - started
    print(f"{found['kills']} kills in {seconds:.0f} s, {found['objects']} objects looked at")
    print(f"  hits, all right            {found['hits']}")
    print(f"  objects of no use          {found['orphans']}")
    print(f"  wrong                      {len(wrong)}")
    for what in wrong:
        print(f"    {what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
