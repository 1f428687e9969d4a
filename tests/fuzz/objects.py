"""One process that gives damaged objects of a prefix store to a context of one kind of model.

Prints the number of each case before it runs, as ``states`` does, and what became of it after. A
case damages objects of a store and asks for a prompt: what comes back must be, byte for byte, what
was remembered of that many tokens, or nothing. Then the store must mend itself.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from xxhash import xxh3_128

import llama_state as ls
from llama_state.store import PrefixStore
from llama_state.store.objects import HEADER
from llama_state.testing.conformance import nmse, nmse_limit

from .damage import KINDS

CHUNK = 16
STOPS = (16, 24, 32, 42)
PROMPT = [*range(3, 43), 7, 7]
OTHER = [*range(3, 38), 9, 9, 9]
"""Shares two chunks, and some of the third, with the prompt."""
UNKNOWN = 99
SECRET = bytes(range(32))
HOW = ("plain", "keyed", "encrypted")
OPTIONS = (
    {"n_seq_max": 1},
    {"n_seq_max": 2, "kv_unified": True},
    {"n_seq_max": 2},
)
LIMIT = 1e-5


class Case:
    """The files of a store, and a random generator.

    Attributes:
        forged: Whether something was made that an unkeyed store must believe.
    """

    def __init__(self, rng: random.Random, folder: Path, files: dict[str, bytes]) -> None:
        self.rng = rng
        self.folder = folder
        self.files = files
        self.forged = False

    def pick(self) -> Path:
        """One of the objects."""
        return self.folder / self.rng.choice(sorted(self.files))

    def sound(self, path: Path) -> bytes:
        """The bytes that an object had."""
        return self.files[str(path.relative_to(self.folder))]

    def remove(self, path: Path) -> None:
        """Remove whatever is there."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)

    def replace(self, path: Path, content: bytes) -> None:
        """Put other bytes in a file's place."""
        self.remove(path)
        path.write_bytes(content)


def bytes_of_one(case: Case) -> None:
    """Damage the bytes of an object, anywhere."""
    path = case.pick()
    others = list(case.files.values())
    sound = case.sound(path)
    at = case.rng.choice((0, 152, 4080, 4096, len(sound) // 2))
    damage = KINDS[case.rng.choice(list(KINDS))]
    case.replace(path, sound[:at] + damage(case.rng, sound[at:] or sound, others))


def swapped(case: Case) -> None:
    """Exchange the contents of two objects."""
    one, two = case.pick(), case.pick()
    contents = [case.sound(path) for path in (one, two)]
    case.replace(one, contents[1])
    case.replace(two, contents[0])


def payloads_swapped(case: Case) -> None:
    """Give one object the payload of another, under its own header."""
    one, two = (case.sound(case.pick()) for _ in range(2))
    path = case.pick()
    case.replace(path, one[:4096] + two[4096:])


def emptied(case: Case) -> None:
    """Lose all bytes, or all but the length."""
    path = case.pick()
    case.replace(path, bytes(len(case.sound(path))) if case.rng.random() < 0.5 else b"")


def huge(case: Case) -> None:
    """Say that a file is as long as no memory is."""
    path = case.pick()
    if path.is_file() and not path.is_symlink():
        os.truncate(path, 1 << case.rng.randint(34, 42))


def gone(case: Case) -> None:
    """Lose an object."""
    case.remove(case.pick())


def many(case: Case) -> None:
    """Flip a bit in many objects."""
    share = case.rng.random()
    for name, sound in case.files.items():
        if case.rng.random() < share:
            content = bytearray(sound)
            content[case.rng.randrange(len(content))] ^= 1 << case.rng.randrange(8)
            case.replace(case.folder / name, bytes(content))


def no_file(case: Case) -> None:
    """Put something else in an object's place."""
    path = case.pick()
    case.remove(path)
    way = case.rng.randrange(5)
    if way == 0:
        path.mkdir()
    elif way == 1:
        path.mkdir()
        (path / "file").write_bytes(b"x")
    elif way == 2:
        os.mkfifo(path)
    elif way == 3:
        path.symlink_to(path.name)
    else:
        path.symlink_to(case.pick())


def foreign(case: Case) -> None:
    """Add files that look like objects, or like nothing."""
    path = case.pick()
    parent, key, rest = path.name.split("-")
    content = case.sound(path)
    name = case.rng.choice(
        (
            f"{parent}-{key}-{'9' * 30}.R",
            f"{parent}-{key}-{1 << 40}.R",
            f"{parent}-{key}-0.{rest[-1]}",
            f"{parent}-{key}-0016.R",
            f"{parent}-{key}-١٦.R",
            f"{parent}-{key.upper()}-{rest}",
            f"{parent}-{parent}-{rest}",
            f"{key}-{parent}-{rest}",
            f"{parent}-{case.rng.randbytes(32).hex()}-16.R",
            f"{case.rng.randbytes(32).hex()}-{key}-16.S",
            f"{parent}-{key}-16.P",
            f".{path.name}.part",
            "x" * 200,
        )
    )
    folder = case.rng.choice((path.parent, case.folder, case.folder / key[:2]))
    folder.mkdir(exist_ok=True)
    case.replace(folder / name, case.rng.choice((content, b"", case.rng.randbytes(5000))))


def beside(case: Case) -> None:
    """Disturb what lies beside the objects."""
    way = case.rng.randrange(4)
    if way == 0:
        (case.folder / "lock").write_bytes(case.rng.randbytes(case.rng.randrange(20)))
    elif way == 1:
        (case.folder / "lock").unlink(missing_ok=True)
    elif way == 2:
        shutil.rmtree(case.folder / "damaged", ignore_errors=True)
        (case.folder / "damaged").write_bytes(b"no folder")
    else:
        (case.folder / "00000" / "deep").mkdir(parents=True, exist_ok=True)
        (case.folder / "00000" / "deep" / "file").write_bytes(bytes(100))


def forged(case: Case) -> None:
    """Change fields of a header, and make the digests of a store without a key."""
    path = case.pick()
    sound = case.sound(path)
    fields = list(HEADER.unpack_from(sound))
    n_words = fields[4]
    words = sound[168 : 168 + 4 * n_words]
    content = bytearray(sound[4096:])
    if case.rng.random() < 0.5:
        at = case.rng.choice((2, 3, 4, 5, 6, 7, 8, 12))
        limits = {2: 5, 3: 2}
        new = case.rng.choice((0, 1, 2, 9, 16, 17, 1 << 20, (1 << 31) - 1, fields[8] + 1))
        fields[at] = b"RWSLNP"[new % 6 :][:1] if at == 2 else new % limits.get(at, 1 << 31)
    else:
        content = bytearray(KINDS[case.rng.choice(list(KINDS))](case.rng, bytes(content), [sound]))
        fields[12] = len(content)
    fields[13] = xxh3_128(content).digest()
    head = HEADER.pack(*fields)
    digest = xxh3_128(head + words).digest()
    case.replace(path, head + digest + sound[168:4096] + content)
    case.forged = True


def resealed(case: Case) -> None:
    """Make the digests with a key that is not the store's."""
    path = case.pick()
    sound = case.sound(path)
    fields = list(HEADER.unpack_from(sound))
    content = bytearray(sound[4096:])
    content[case.rng.randrange(len(content))] ^= 1
    key = case.rng.choice((bytes(32), bytes(16), b""))

    def seal(data: bytes) -> bytes:
        return hmac.new(key, b"object" + data, hashlib.sha256).digest()[:16]

    fields[13] = seal(bytes(content))
    head = HEADER.pack(*fields)
    words = sound[168 : 168 + 4 * fields[4]]
    case.replace(path, head + seal(head + words) + sound[168:4096] + content)


WAYS: tuple[Callable[[Case], None], ...] = (
    *(bytes_of_one, bytes_of_one, bytes_of_one, swapped, payloads_swapped, emptied, huge, gone),
    *(many, no_file, foreign, beside, forged, resealed),
)


class Bench:
    """A store, the contexts of one model in one configuration, and what is true of them."""

    def __init__(self, model: ls.Model, options: dict[str, object], folder: Path) -> None:
        self.folder, self.aside = folder / "kv", folder / "aside"
        made = {"n_ctx": 256, "n_threads": 1, "flash_attn": False, **options}
        self.ctx = model.context(**made)  # type: ignore[arg-type]
        self.other = model.context(**made)  # type: ignore[arg-type]
        self.files: dict[str, dict[str, bytes]] = {}
        self.alone: dict[str, tuple[dict[str, bytes], ...]] = {}
        self.truth: dict[tuple[str, int], set[bytes]] = {}
        for how in HOW:
            self.truth[how, 0] = {self.other.seq_snapshot()}
            self.fill(how)
        self.other.clear()
        self.other.decode(PROMPT)
        self.logits = memoryview(bytes(self.other.logits())).cast("f")
        self.limit = max(LIMIT, nmse_limit(self.ctx.arch))

    def open(self, how: str, folder: Path | None = None) -> PrefixStore:
        """Open a store, that of the cases or another one."""
        return PrefixStore(
            folder or self.folder,
            capacity_bytes=1 << 30,
            chunk_tokens=CHUNK,
            key=None if how == "plain" else SECRET,
            encrypt=how == "encrypted",
        )

    def fill(self, how: str) -> None:
        """Fill a store, and keep its files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with self.open(how) as store:
            self.ctx.clear()
            for end in STOPS:
                self.ctx.decode(PROMPT[self.ctx.n_past() : end])
                store.remember(self.ctx, PROMPT[:end])
            first = self.read()
            store.prefill(self.ctx, OTHER)
            self.files[how] = self.read()
            store.forget(self.ctx, PROMPT)
            self.alone[how] = first, self.read()
            assert not store.stats().failures

    def read(self) -> dict[str, bytes]:
        """The files of the store."""
        files = (path for path in self.folder.rglob("??/*") if path.is_file())
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}

    def lay(self, files: dict[str, bytes], folder: Path) -> None:
        """Make a folder anew."""
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def of(self, how: str, n_past: int) -> set[bytes]:
        """What a store that nothing happened to gives for the first tokens of the prompt.

        A beginning that both prompts have is found in either.
        """
        if (how, n_past) not in self.truth:
            prompt = [*PROMPT[:n_past], UNKNOWN]
            found = self.truth[how, n_past] = set()
            for files in self.alone[how]:
                self.lay(files, self.aside)
                with self.open(how, self.aside) as store:
                    self.other.clear()
                    if store.recall(self.other, prompt).n_past == n_past:
                        found.add(self.other.seq_snapshot())
            assert found, n_past
        return self.truth[how, n_past]

    def run(self, rng: random.Random) -> dict[str, str]:
        """Run one case."""
        how = rng.choice(HOW)
        self.lay(self.files[how], self.folder)
        case = Case(rng, self.folder, self.files[how])
        before = self.open(how)  # one that knows the headers
        if rng.random() < 0.3:
            before.find(self.ctx, PROMPT)
        ways = [rng.choice(WAYS) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        for way in ways:
            way(case)
        store = before if rng.random() < 0.5 else self.open(how)
        self.ctx.clear()
        if rng.random() < 0.3:
            self.ctx.decode(PROMPT[: rng.randrange(1, 30)])
        believed = case.forged and how == "plain"
        recalls = rng.random() < 0.6
        try:
            if recalls:
                outcome = self.recall(store, how, believed)
            else:
                outcome = self.prefill(store, believed)
            if rng.random() < 0.3:  # it takes longer than all else
                outcome = self.later(store, how, believed) or outcome
        except Exception as error:
            outcome = f"RAISED {type(error).__name__}: {error}"
        return {"damage": " ".join(way.__name__ for way in ways), "outcome": outcome}

    def recall(self, store: PrefixStore, how: str, believed: bool) -> str:
        """Recall, and compare bytes."""
        held = self.ctx.n_past()
        recalled = store.recall(self.ctx, PROMPT)
        if recalled.n_past != self.ctx.n_past():
            return "WRONG: it holds something else than it says"
        if believed:
            return "believed"
        if not held and self.ctx.seq_snapshot() not in self.of(how, recalled.n_past):
            return "WRONG: other bytes"
        self.ctx.decode(PROMPT[recalled.n_past :])
        if nmse(self.ctx.logits(), self.logits) > self.limit:
            return "WRONG: other logits"
        return "whole" if recalled.n_past > len(PROMPT) - 2 else "shorter"

    def prefill(self, store: PrefixStore, believed: bool) -> str:
        """Prefill, and compare logits."""
        recalled = store.prefill(self.ctx, PROMPT)
        if self.ctx.n_past() != len(PROMPT):
            return "WRONG: not all of it is there"
        if believed:
            return "believed"
        if nmse(self.ctx.logits(), self.logits) > self.limit:
            return "WRONG: other logits"
        return "whole" if recalled.n_past > len(PROMPT) - 2 else "shorter"

    def later(self, store: PrefixStore, how: str, believed: bool) -> str:
        """The store goes on, and is sound when it was repaired; "" if so."""
        self.ctx.clear()
        outcome = self.prefill(store, believed)
        if outcome.startswith("WRONG"):
            return f"{outcome}, later"
        with self.open(how) as again:
            again.entries()
            again.verify(repair=True)
            if not again.verify().ok:
                return "WRONG: not sound after a repair"
            self.ctx.clear()
            outcome = self.prefill(again, believed)
            if outcome.startswith("WRONG"):
                return f"{outcome}, after a repair"
            self.ctx.clear()
            if outcome != "believed" and not again.recall(self.ctx, [*PROMPT, UNKNOWN]).n_past:
                return "LOST: it does not mend"
            again.evict(0)
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind")
    parser.add_argument("models", type=Path)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--cases", type=int, required=True)
    arguments = parser.parse_args()
    library = ls.load_library()
    with tempfile.TemporaryDirectory() as folder:
        model = ls.Model(arguments.models / f"{arguments.kind}.gguf", library)
        benches = [
            Bench(model, dict(options), Path(folder, str(number)))
            for number, options in enumerate(OPTIONS)
        ]
        for number in range(arguments.first, arguments.first + arguments.cases):
            print(number, flush=True)
            rng = random.Random(f"{arguments.kind} {number}")
            print(json.dumps(rng.choice(benches).run(rng)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
