"""The commands for prefix stores."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.store import PrefixStore
from llama_state.testing.models import write_model
from tests.cli.commands import Run
from tests.libllama import LIBRARY

pytestmark = pytest.mark.libllama

SYSTEM = "You answer in few words. " * 3
CHATS = (SYSTEM + "What is a cell?", SYSTEM + "And a stream, then?")
CHUNK = 16


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of the tests."""
    monkeypatch.setenv("LLAMA_STATE_LIBRARY", str(LIBRARY.path))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    return Path(write_model(tmp_path_factory.mktemp("m") / "m.gguf", "llama-dense", text=True))


@pytest.fixture
def folder(tmp_path: Path, model_path: Path) -> Path:
    """A store with two chats on one system prompt."""
    folder = tmp_path / "kv"
    with (
        ls.Model(model_path, LIBRARY) as model,
        model.context(n_ctx=256) as ctx,
        PrefixStore(folder, capacity_bytes=1 << 30, chunk_tokens=CHUNK, namespace="bot") as store,
    ):
        for chat in CHATS:
            store.prefill(ctx, model.tokenize(chat))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Iterator[Path]:
    """A file with a prompt that begins as the chats do."""
    path = tmp_path / "prompt.txt"
    path.write_text(SYSTEM + "Who?", "utf-8")
    return path


def listed(run: Run, folder: Path) -> list[dict[str, object]]:
    """What ``ls --json`` prints."""
    found: list[dict[str, object]] = json.loads(run("store", "ls", folder, "--json")[1])
    return found


def files(folder: Path) -> dict[str, int]:
    """All files, and when they were written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_ls(run: Run, folder: Path) -> None:
    """A line for each chat, and nothing of what was said."""
    status, out, err = run("store", "ls", folder)
    head, *lines = out.splitlines()
    assert (status, err, len(lines)) == (0, "", 2)
    assert head.split() == [
        "namespace",
        "model",
        "tokens",
        "bytes",
        "own",
        "last",
        "used",
        "pinned",
        "key",
    ]
    for line, entry in zip(lines, listed(run, folder), strict=True):
        assert line.split()[:2] == ["bot", "llama"]
        assert line.endswith(str(entry["key"])[:16])
    assert "answer" not in out


def test_looking_changes_nothing(run: Run, folder: Path, model_path: Path, text: Path) -> None:
    """Commands that only look write nothing, not even when something was used."""
    before = files(folder)
    key = listed(run, folder)[0]["key"]
    for arguments in (
        ("ls", folder),
        ("show", folder, key, "--text"),
        ("stats", folder),
        ("verify", folder),
        ("find", folder, model_path, text, "--namespace", "bot"),
    ):
        assert run("store", *arguments)[0] == 0, arguments
    assert files(folder) == before


def test_show(run: Run, folder: Path, model_path: Path) -> None:
    """The chain and the identity of a prompt; its text only when asked for."""
    entry = listed(run, folder)[0]
    key = str(entry["key"])
    status, out, err = run("store", "show", folder, key[:12])
    assert (status, err) == (0, "")
    assert key in out
    assert "architecture" in out
    assert "0-15" in out
    facts = json.loads(run("store", "show", folder, key, "--json")[1])
    assert facts["chunks"][-1]["end"] == facts["n_positions"] == entry["n_positions"]
    assert facts["identity"]["namespace"] == "bot"
    assert "tokens" not in facts
    with ls.Model(model_path, LIBRARY) as model:
        tokens = model.tokenize(CHATS[1])
    ids = run("store", "show", folder, key, "--text")[1]
    assert ids.rstrip().endswith(" ".join(map(str, tokens)))
    shown = run("store", "show", folder, key, "--text", "--model", model_path)[1]
    assert CHATS[1] in shown
    assert CHATS[1] not in out


@pytest.mark.parametrize(("key", "problem"), [("", "keys begin so"), ("0" * 64, "no key begins")])
def test_keys(run: Run, folder: Path, key: str, problem: str) -> None:
    """A key that is none, or several, is an error that says so."""
    status, out, err = run("store", "show", folder, key)
    assert (status, out) == (2, "")
    assert problem in err


def test_find(run: Run, folder: Path, model_path: Path, text: Path) -> None:
    """How many tokens are stored, and why not more; 1 where nothing is."""
    status, out, _ = run("store", "find", folder, model_path, text, "--namespace", "bot")
    assert status == 0
    assert "at token" in out
    found = json.loads(
        run("store", "find", folder, model_path, text, "--namespace", "bot", "--json")[1]
    )
    assert found["n_tokens"] >= len(SYSTEM)
    assert found["of"] > found["n_tokens"]
    assert found["reason"] == "differs"
    status, out, _ = run("store", "find", folder, model_path, text)
    assert status == 1
    assert "namespace: stored bot" in out
    status, out, _ = run("store", "find", folder, model_path, text, "--type-k", "f32")
    assert status == 1
    assert "rows of kv" in out


def test_warm(run: Run, tmp_path: Path, model_path: Path, text: Path) -> None:
    """A text is stored once; a store that is too small says so."""
    folder = tmp_path / "new"
    status, out, err = run("store", "warm", folder, model_path, text)
    assert status == 2
    assert "--size" not in out
    assert "capacity" in err
    warm = ("store", "warm", folder, model_path, text, "--size", "1GiB", "--json")
    first, again = (json.loads(run(*warm)[1]) for _ in range(2))
    assert first["stored"]
    assert not first["recalled"]
    assert first["nbytes"] > 0
    assert again["recalled"] + 1 == again["n_tokens"]
    assert again["stored"]
    assert not again["nbytes"]
    status, out, _ = run("store", "find", folder, model_path, text)
    assert status == 0
    assert "all of it is stored" in out
    small = tmp_path / "small"
    status, _, err = run("store", "warm", small, model_path, text, "--size", "10KiB")
    assert status == 1
    assert "not all could be stored" in err


def test_warm_shows_progress(
    run: Run, tmp_path: Path, model_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line, or a bar, as the tokens are evaluated."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    _, _, err = run(
        "store", "warm", f"file://{tmp_path}/kv?size=1GiB", model_path, text, "--chunk-tokens", "16"
    )
    assert "evaluation: 16 of " in err


def test_verify(run: Run, folder: Path) -> None:
    """Damage is named, and set aside when asked."""
    assert run("store", "verify", folder)[1].splitlines()[-1] == "all sound"
    damaged = max(folder.glob("??/*.R"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    status, out, _ = run("store", "verify", folder)
    assert status == 1
    assert f"damaged, not used: {damaged.name.split('-')[1]}.R" in out
    status, out, _ = run("store", "verify", folder, "--repair", "--json")
    assert status == 1
    assert json.loads(out)["repaired"]
    assert run("store", "verify", folder)[0] == 0
    assert not damaged.exists()


def test_rm_and_evict(run: Run, folder: Path) -> None:
    """A chat goes, its system prompt stays for the other; then all goes."""
    one, two = listed(run, folder)
    assert run("store", "rm", folder, str(one["key"])[:16])[0] == 0
    (left,) = listed(run, folder)
    assert left["key"] == two["key"]
    assert left["n_tokens"] == two["n_tokens"]
    assert run("store", "verify", folder)[0] == 0
    status, out, _ = run("store", "evict", folder, "--to", "0")
    assert status == 0
    assert "freed" in out
    assert run("store", "ls", folder)[1] == "nothing is stored\n"
    with pytest.raises(SystemExit):
        run("store", "evict", folder, "--to", "much")


def test_stats(run: Run, folder: Path) -> None:
    """Figures, as text and as JSON."""
    assert "bot (2)" in run("store", "stats", folder)[1]
    facts = json.loads(run("store", "stats", folder, "--json")[1])
    assert facts["n_prompts"] == 2
    assert facts["models"] == {"llama": 2}
    assert facts["used_bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_copy(run: Run, folder: Path, tmp_path: Path, model_path: Path, text: Path) -> None:
    """Only what is missing is copied; what is copied is found."""
    target = tmp_path / "copy"
    copy = ("store", "copy", folder, f"file://{target}?size=1GiB", "--json")
    first, again = (json.loads(run(*copy)[1]) for _ in range(2))
    assert first["ok"]
    assert first["n_objects"]
    assert not first["present"]
    assert again["present"] == first["n_objects"]
    assert not again["n_objects"]
    assert listed(run, target) == listed(run, folder)
    assert run("store", "find", target, model_path, text, "--namespace", "bot")[0] == 0


def test_a_key(run: Run, tmp_path: Path, model_path: Path, text: Path) -> None:
    """A store with a key is read with that only."""
    key, other, folder = tmp_path / "key", tmp_path / "other", tmp_path / "kv"
    key.write_bytes(bytes(range(32)))
    other.write_bytes(bytes(32))
    keyed = ("--key-file", key)
    assert run("store", "warm", folder, model_path, text, "--size", "1GiB", *keyed)[0] == 0
    assert run("store", "verify", folder, *keyed)[0] == 0
    assert len(json.loads(run("store", "ls", folder, "--json", *keyed)[1])) == 1
    before = files(folder)
    for arguments in ([], ["--key-file", other]):
        status, out, err = run("store", "verify", folder, "--repair", *arguments)
        assert (status, out) == (2, "")
        assert "another key" in err
    assert {p: t for p, t in files(folder).items() if p.endswith((".R", ".N"))} == {
        p: t for p, t in before.items() if p.endswith((".R", ".N"))
    }


def test_a_shared_part(run: Run, tmp_path: Path, model_path: Path, text: Path) -> None:
    """An encrypted store with two keys is read and copied with both, and not with one."""
    key, shared, folder, target = (tmp_path / name for name in ("key", "shared", "kv", "copy"))
    key.write_bytes(bytes(range(32)))
    shared.write_bytes(bytes(32))
    part = ("--shared-key-file", shared, "--shared-tokens", "20")
    keyed = ("--key-file", key, *part, "--encrypt")
    assert run("store", "warm", folder, model_path, text, "--size", "1GiB", *keyed)[0] == 0
    listed_now = json.loads(run("store", "ls", folder, "--json", *keyed)[1])
    assert len(listed_now) == 1
    assert run("store", "verify", folder, *keyed)[0] == 0
    assert run("store", "copy", folder, target, "--size", "1GiB", *keyed)[0] == 0
    for place in (folder, target):
        found = json.loads(run("store", "find", place, model_path, text, "--json", *keyed)[1])
        assert found["n_tokens"] == listed_now[0]["n_tokens"] - 1
        with_one = ("--key-file", shared, "--encrypt")
        found = json.loads(run("store", "find", place, model_path, text, "--json", *with_one)[1])
        assert found["n_tokens"] == 20
        assert all(p.read_bytes()[:5] == b"\x89LLSE" for p in place.glob("??/*"))
    for arguments in ([], part, ["--key-file", key, "--shared-tokens", "20"], ["--encrypt"]):
        status, out, err = run("store", "verify", folder, "--repair", *arguments)
        assert (status, out) == (2, "")
        assert "key" in err


def test_a_pin_is_shown(run: Run, folder: Path, model_path: Path) -> None:
    """Of what is pinned, until when."""
    with (
        ls.Model(model_path, LIBRARY) as model,
        model.context(n_ctx=256) as ctx,
        PrefixStore(folder, capacity_bytes=1 << 30, chunk_tokens=CHUNK, namespace="bot") as store,
    ):
        store.pin(ctx, model.tokenize(CHATS[0]), ttl=3600)
    lines = run("store", "ls", folder)[1].splitlines()
    year = time.strftime("%Y", time.localtime(time.time() + 3600))
    assert sum(f"to {year}-" in line for line in lines) == 1


@pytest.mark.parametrize("command", ["ls", "stats", "verify", "evict"])
def test_no_store(run: Run, tmp_path: Path, command: str) -> None:
    """A folder without a store is left as it is; so is one that is not there."""
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "mine").write_text("mine")
    more = ["--to", "0"] if command == "evict" else []
    for place in (tmp_path, tmp_path / "none"):
        status, out, err = run("store", command, place, *more)
        assert (status, out) == (2, "")
        assert str(place) in err
    assert [*tmp_path.rglob("*")] == [tmp_path / "damaged", tmp_path / "damaged" / "mine"]
    status, _, err = run("store", command, "memory:?size=1GiB", *more)
    assert status == 2
    assert "give a folder" in err
