"""Between native files and checkpoints, and whether files are sound."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_state import Checkpoint, inspect_file
from llama_state.checkpoint.fingerprint import model_fields
from llama_state.errors import ChecksumError, FormatError, SaveError, UnsupportedError
from llama_state.inspection.conversion import convert_file
from llama_state.inspection.verification import Verdict, as_dict, text, verify_file
from llama_state.testing.models import write_model
from tests.inspection.test_summary import KEY, SEQUENCE, WHOLE, check_text
from tests.layout.blobs import State
from tests.layout.blobs import text as cells_of
from tests.layout.slots import packed
from tests.layout.statefiles import GOLDEN, native, slot, write

SLOT = slot(SEQUENCE, packed([5, 6]))
RECURRENT = State("recurrent", cells=cells_of(4), arch="mamba2")
FILES = {
    "session file": native(WHOLE, [1, 2]),
    "sequence file": native(SEQUENCE, [1, 2]),
    "slot file": SLOT,
    "no tokens": native(WHOLE),
    "recurrent sequence": native(replace(RECURRENT, seq=0)),
    **{name: (GOLDEN / name).read_bytes() for name in ("v9.session", "v10.sequence", "v11.slot")},
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("options", [{}, {"key": KEY}, {"compress": True}], ids=str)
def test_there_and_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A native file that became a checkpoint and is one again has the bytes that it had."""
    source = write(tmp_path, FILES[name], "native")
    done = convert_file(source, tmp_path / "c", **options)
    assert (done.kind, done.nbytes) == ("checkpoint", (tmp_path / "c").stat().st_size)
    key = options.get("key")
    back = convert_file(tmp_path / "c", tmp_path / "back", key=key)
    assert (tmp_path / "back").read_bytes() == FILES[name]
    assert back.kind == inspect_file(source).kind
    convert_file(tmp_path / "back", tmp_path / "again", **options)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("state", [WHOLE, SEQUENCE], ids=["whole", "sequence"])
def test_blobs(state: State, tmp_path: Path) -> None:
    """A blob becomes either; if its version is not certain, it must be given."""
    source = write(tmp_path, state.blob(), "blob")
    convert_file(source, tmp_path / "c")
    assert bytes(Checkpoint.load(tmp_path / "c").payload) == state.blob()
    convert_file(source, tmp_path / "n", to="native")
    assert (tmp_path / "n").read_bytes() == native(state)
    old = write(tmp_path, replace(state, version=9).blob(), "old")
    with pytest.raises(UnsupportedError, match="session version 10, 9"):
        convert_file(old, tmp_path / "o")
    with pytest.raises(FormatError, match="session version 11"):
        convert_file(old, tmp_path / "o", blob_version=11)
    convert_file(old, tmp_path / "o", to="native", blob_version=9)
    assert (tmp_path / "o").read_bytes() == native(replace(state, version=9))


@pytest.mark.parametrize("state", [WHOLE, SEQUENCE], ids=["whole", "sequence"])
@pytest.mark.parametrize("version", [9, 10, 11])
def test_another_session_version(state: State, version: int, tmp_path: Path) -> None:
    """A file, a blob and a checkpoint of one llama.cpp, as another writes them."""
    of_version = replace(state, version=version)
    expected = native(of_version, [1, 2, 3])
    for begun in (9, 10, 11):
        source = write(tmp_path, native(replace(state, version=begun), [1, 2, 3]), "source")
        if begun == version:
            with pytest.raises(UnsupportedError, match="already a native file"):
                convert_file(source, tmp_path / "no", to="native", session_version=version)
            continue
        convert_file(source, tmp_path / "n", session_version=version, force=True)
        assert (tmp_path / "n").read_bytes() == expected
        convert_file(source, tmp_path / "c", to="checkpoint", session_version=version, force=True)
        found = Checkpoint.load(tmp_path / "c")
        assert (bytes(found.payload), found.session_version) == (of_version.blob(), version)
        convert_file(tmp_path / "c", tmp_path / "d", session_version=begun, force=True)
        convert_file(tmp_path / "d", tmp_path / "back", force=True)
        assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_model(tmp_path: Path) -> None:
    """Its fingerprint is recorded, once, and what is not known is recorded as unknown."""
    model = write_model(tmp_path / "m.gguf")
    source = write(tmp_path, native(replace(SEQUENCE, arch="llama")), "native")
    convert_file(source, tmp_path / "c", model=model)
    loaded = Checkpoint.load(tmp_path / "c")
    assert loaded.fingerprint.model == model_fields(model)
    assert loaded.fingerprint.context["type_k"] == "f16"
    assert set(loaded.fingerprint.unknown) == {"adapters", "rope"}
    convert_file(source, tmp_path / "bare")
    convert_file(tmp_path / "bare", tmp_path / "named", to="checkpoint", model=model)
    assert Checkpoint.load(tmp_path / "named") == loaded
    with pytest.raises(UnsupportedError, match="already has a fingerprint"):
        convert_file(tmp_path / "c", tmp_path / "d", to="checkpoint", model=model)
    with pytest.raises(FormatError, match="belongs to a llama model, the one given is mamba2"):
        other = write_model(tmp_path / "o.gguf", "mamba2-dense")
        convert_file(write(tmp_path, native(WHOLE)), tmp_path / "e", model=other)


def test_what_is_there_stays(tmp_path: Path) -> None:
    """Nothing is replaced without force=True, and nothing is half written."""
    source = write(tmp_path, native(WHOLE), "native")
    target = write(tmp_path, b"precious", "target")
    with pytest.raises(FileExistsError):
        convert_file(source, target)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        convert_file(source, tmp_path / "link")
    damaged = write(tmp_path, native(WHOLE)[:-1], "damaged")
    with pytest.raises(FormatError):
        convert_file(damaged, target, force=True)
    assert target.read_bytes() == b"precious"
    convert_file(source, target, force=True)
    assert inspect_file(target).kind == "checkpoint"
    with pytest.raises(SaveError):
        convert_file(source, tmp_path / "no" / "folder")


def test_nothing_to_convert(tmp_path: Path) -> None:
    """What is of the kind that is asked for, no checkpoint can hold, or has another key."""
    with pytest.raises(UnsupportedError, match="already a native file: a session file"):
        convert_file(write(tmp_path, native(WHOLE)), tmp_path / "n", to="native")
    partial = write(tmp_path, State("dsv4", seq=0, partial=True).blob())
    with pytest.raises(UnsupportedError, match="partial"):
        convert_file(partial, tmp_path / "n")
    convert_file(write(tmp_path, native(WHOLE)), tmp_path / "k", key=KEY)
    with pytest.raises(ChecksumError):
        convert_file(tmp_path / "k", tmp_path / "n")
    convert_file(tmp_path / "k", tmp_path / "z", key=KEY, to="checkpoint", compress=True)
    digests = inspect_file(tmp_path / "z", key=KEY).digests
    assert digests is not None
    assert (digests.keyed, digests.compressed) == (True, True)


# -- verify


def check(verdict: Verdict) -> Verdict:
    check_text(text(verdict).replace(verdict.path, "path"))
    json.dumps(as_dict(verdict))
    return verdict


@pytest.mark.parametrize("name", FILES)
def test_sound_native_files(name: str, tmp_path: Path) -> None:
    """What was checked is said, and that it is not much."""
    verdict = check(verify_file(write(tmp_path, FILES[name], "f")))
    assert verdict.sound
    assert verdict.problems == ()
    assert "native states have no checksums" in verdict.checked
    verdict = check(verify_file(tmp_path / "f", key=KEY))
    assert not verdict.sound
    assert "not authenticated" in verdict.problems[0]


def test_damaged_native_files(tmp_path: Path) -> None:
    """Where it is cut off; what it is instead."""
    verdict = check(verify_file(write(tmp_path, FILES["session file"][:-1])))
    assert not verdict.sound
    assert verdict.problems[0].startswith("cut off in V, at byte ")
    for data, kind in ((b"", None), (b"GGUF....", None), (SLOT[:20], "slot file")):
        verdict = check(verify_file(write(tmp_path, data)))
        assert not verdict.sound
        if kind is None:
            assert verdict.kind is None
    assert check(verify_file(tmp_path / "none")).problems == ("No such file or directory",)
    assert check(verify_file(tmp_path)).problems == ("it is a folder, not a file",)


def test_checkpoints(tmp_path: Path) -> None:
    """All digests are compared; each part that is bad is named, with its place."""
    state = State("kv", cells=cells_of(40), row_k=64 << 10, row_v=64 << 10, arch="llama")
    convert_file(write(tmp_path, native(state)), tmp_path / "c")
    verdict = check(verify_file(tmp_path / "c"))
    assert verdict.sound
    assert "digests agree" in verdict.checked
    data = bytearray((tmp_path / "c").read_bytes())
    digests = inspect_file(tmp_path / "c").digests
    assert digests is not None
    chunks = [part for part in digests.parts if part.name.startswith("payload")]
    assert len(chunks) > 2
    for part in (chunks[0], chunks[2]):
        data[part.offset + 5000] ^= 1
    verdict = check(verify_file(write(tmp_path, bytes(data))))
    assert verdict.problems == tuple(
        f"{part.name} is not what was written, 4.0 MiB at byte {part.offset:,}"
        if part.stored == 4 << 20
        else f"{part.name} is not what was written, {part.stored / (1 << 20):.1f} MiB at byte "
        f"{part.offset:,}"
        for part in (chunks[0], chunks[2])
    )


def test_keyed_checkpoints(tmp_path: Path) -> None:
    """They are sound only with their key."""
    convert_file(write(tmp_path, native(WHOLE)), tmp_path / "c", key=KEY)
    assert verify_file(tmp_path / "c", key=KEY).checked.startswith("4 digests of the key agree")
    for key in (None, b"f" * 16):
        verdict = check(verify_file(tmp_path / "c", key=key))
        assert (verdict.sound, verdict.kind) == (False, "checkpoint")
        assert "key" in verdict.problems[0]


@pytest.mark.parametrize("native_file", [False, True])
def test_a_target_that_comes_to_be_meanwhile(tmp_path: Path, native_file: bool) -> None:
    """It is not replaced, whoever made it."""
    source, target = write(tmp_path, native(SEQUENCE, [1, 2]), "source"), tmp_path / "target"
    if native_file:
        convert_file(source, source, force=True)

    def make(done: int, total: int) -> None:
        target.write_bytes(b"another")

    with pytest.raises(FileExistsError):
        convert_file(source, target, progress=make)
    assert target.read_bytes() == b"another"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
