"""Any file is described as far as it can be read, without any libllama."""

from __future__ import annotations

import gc
import json
import os
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from llama_state import inspect_file
from llama_state.checkpoint.checkpoint import Checkpoint
from llama_state.checkpoint.fingerprint import Fingerprint
from llama_state.errors import ChecksumError, FormatError, TruncatedError, VersionError
from llama_state.inspection import compare, summary, verify_file
from llama_state.inspection import text as printed
from llama_state.inspection.words import first_few, problem_text, ranges, ranges_text, size
from tests.layout.blobs import State, text, u32
from tests.layout.slots import audio, image, packed
from tests.layout.statefiles import GOLDEN, native, slot, write
from tests.layout.test_parse import CACHES, CHAT, FORMS, VERSIONS

WHOLE = State("kv", cells=CHAT, arch="llama")
SEQUENCE = State("kv", cells=text(40, 3), seq=3)
KEY = b"0123456789abcdef"


def states() -> list[Any]:
    """Every kind of memory in every form, whole and one sequence, in one version each."""
    found = []
    # Only one module has n-grams, and is tried with them.
    pairs = ((m, f) for m in CACHES for f in FORMS if f != "n-grams" or m == "hybrid-idx")
    for number, (module, form) in enumerate(pairs):
        state = State(module, VERSIONS[number % 3], **FORMS[form])
        found.append(pytest.param(state, id=f"{module}, {form}, whole"))
        found.append(pytest.param(replace(state, seq=0), id=f"{module}, {form}, sequence"))
    return found


def check_text(about: str) -> None:
    """Check that a text fits a terminal of 80 columns."""
    assert about
    assert max(map(len, about.splitlines())) <= 80


@pytest.mark.parametrize("state", states())
def test_every_kind_of_memory(state: State, tmp_path: Path) -> None:
    """A file of it is sound, adds up, and can be shown as text and as JSON."""
    data = native(state, range(7))
    found = inspect_file(write(tmp_path, data))
    kind = "session file" if state.seq is None else "sequence file"
    assert (found.kind, found.problem, found.nbytes) == (kind, None, len(data))
    assert found.session_versions == (state.version,)
    assert list(found.tokens) == [*range(7)]
    assert found.layout is not None
    about = json.loads(json.dumps(summary.describe(found)))
    assert sum(about["bytes"].values()) == len(data)
    assert about["problem"] is None
    owned = {seq for _, ids in state.cells for seq in ids}
    if state.seq is None and state.module != "none":
        assert about["state"]["architecture"] == "made-up"
        if found.layout.module == state.module:
            assert {one["id"] for one in about["state"]["sequences"]} == owned
    check_text(printed.text(found))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("state", [WHOLE, SEQUENCE], ids=["whole", "sequence"])
def test_blobs(state: State, version: int, tmp_path: Path) -> None:
    """A blob has no version: each that fits is named, the newest first."""
    state = replace(state, version=version)
    found = inspect_file(write(tmp_path, state.blob()))
    assert found.kind == ("whole blob" if state.seq is None else "sequence blob")
    # Without M-RoPE, 9 and 10 are the same bytes.
    assert found.session_versions == ((11,) if version == 11 else (10, 9))
    assert (found.version, found.has_tokens, list(found.tokens)) == (None, False, [])
    assert "a blob records no version" in printed.text(found)
    assert found.layout is not None
    assert found.layout.source == state.seq


def test_blobs_without_a_head(tmp_path: Path) -> None:
    """Early builds of version 9 wrote none."""
    found = inspect_file(write(tmp_path, replace(SEQUENCE, version=9).payload()))
    assert (found.kind, found.session_versions, found.problem) == ("sequence blob", (9,), None)


def test_a_partial_blob(tmp_path: Path) -> None:
    """The only memory whose states say that they are partial."""
    found = inspect_file(write(tmp_path, State("dsv4", seq=0, partial=True).blob()))
    assert found.layout is not None
    assert (found.layout.module, found.layout.partial) == ("dsv4", True)


def test_positions(tmp_path: Path) -> None:
    """Ranges with their holes, in text and as data."""
    cells = (*text(5), *text(3, 0, start=9), *text(2, 1, start=4), *text(3, 0, 1, start=12))
    found = inspect_file(write(tmp_path, native(replace(WHOLE, cells=cells))))
    about = printed.text(found)
    assert "sequence 0       11 cells, positions 0-4, 9-14 (1 hole)" in about
    assert "sequence 1       5 cells, positions 4-5, 12-14 (1 hole)" in about
    assert "13 cells, 3 shared" in about
    first = summary.describe(found)["state"]["sequences"][0]
    assert first["caches"]["kv"] == {"cells": 11, "positions": [[0, 4], [9, 14]]}
    assert (first["pos_min"], first["pos_max"], first["rewind_min"]) == (0, 14, 0)


def test_slot_files(tmp_path: Path) -> None:
    """What llama-server packed is shown as such, and never taken for tokens."""
    words = packed([5, 6, *[-1] * 12, 7, -1], {2: image(4, 3, "hash"), 15: audio(1, "snd")})
    found = inspect_file(write(tmp_path, slot(SEQUENCE, words)))
    assert (found.kind, found.problem) == ("slot file", None)
    assert list(found.tokens) == [5, 6, *[-1] * 12, 7, -1]
    assert found.slot is not None
    assert [chunk.kind for chunk in found.slot.media] == ["image", "audio"]
    shown = printed.text(found)
    check_text(shown)
    assert "16, packed by llama-server: 5, 6, media" in shown
    assert "image from token 2: 12 tokens (4 x 3), id hash" in shown
    tokens = summary.describe(found)["tokens"]
    assert (tokens["packed"], tokens["packed_version"], tokens["count"]) == (True, 1, 16)
    assert tokens["media"][0]["grid"] == [4, 3]


def test_damaged_slot_prompts(tmp_path: Path) -> None:
    """The state is described; what cannot be read is no token list."""
    words = packed([5, 6, -1], {2: image(1, 1, "x")})
    words[5] = 6
    found = inspect_file(write(tmp_path, slot(SEQUENCE, words)))
    assert (found.kind, list(found.tokens)) == ("slot file", [])
    assert isinstance(found.problem, FormatError)
    assert found.layout is not None
    assert "packed by llama-server, not readable" in printed.text(found)
    words = packed([5, 6])
    words[1] = 2
    found = inspect_file(write(tmp_path, slot(SEQUENCE, words)))
    assert isinstance(found.problem, VersionError)
    assert found.problem.offset == 12 + 4


def test_another_memory_than_the_table_says(tmp_path: Path) -> None:
    """Builds before July 2026 gave glm-dsa a plain cache: described, and not called damaged."""
    path = write(tmp_path, native(State("kv", version=9, k_only=True, arch="glm-dsa"), [1, 2, 3]))
    found = inspect_file(path)
    assert found.layout is not None
    assert (found.layout.module, found.layout.unexpected) == ("kv", True)
    assert "another kind of memory" in " ".join(printed.text(found).split())
    verdict = verify_file(path)
    assert (verdict.outcome, verdict.sound) == ("unsure", False)
    expected = verify_file(write(tmp_path, native(State("dsa", arch="glm-dsa", k_only=True))))
    assert (expected.outcome, expected.sound) == ("sound", True)


@pytest.mark.parametrize("state", [WHOLE, SEQUENCE], ids=["whole", "sequence"])
def test_every_cut(state: State, tmp_path: Path) -> None:
    """For a file that ends early, the place is reported and the rest shown."""
    data = native(state, [1, 2, 3])
    for length in chain(range(1, 200), range(200, len(data), 61)):
        path = write(tmp_path, data[:length])
        try:
            found = inspect_file(path)
        except FormatError:
            assert length < 4
            continue
        if length == 24 and state is SEQUENCE:  # nothing says that there must be more
            assert "cut off after its tokens" in " ".join(printed.text(found).split())
            continue
        if found.problem is None:  # cut off behind a cache, or before V
            assert found.doubt
            assert verify_file(path).outcome == "unsure"
        else:
            assert found.layout is None
        assert list(found.tokens) == ([1, 2, 3] if length >= 24 else [])
        check_text(printed.text(found))
        assert sum(summary.bytes_by_part(found).values()) == length
    found = inspect_file(write(tmp_path, data[:-1]))
    assert isinstance(found.problem, TruncatedError)
    assert found.problem.have == len(data) - 1
    shown = printed.text(found)
    assert "cut off in V, at byte" in shown
    assert "tensors damaged or cut off" in shown
    described = summary.describe(found)["leading_cells"]
    assert {one["id"] for one in described} == {seq for _, ids in state.cells for seq in ids}


def test_offsets_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    """Also where the damage is behind tokens and architecture."""
    for state in (WHOLE, SEQUENCE):
        data = bytearray(native(state, range(50)))
        at = data.index(b"\1\0\0\0\x40\0\0\0\0\0\0\0")  # the head of the first K
        data[at : at + 4] = u32(99)
        found = inspect_file(write(tmp_path, bytes(data)))
        assert isinstance(found.problem, FormatError)
        assert (found.problem.reason, found.problem.offset) == ("K: unknown tensor type 99", at)


@pytest.mark.parametrize(("magic", "version"), [(b"nsgg", 12), (b"qsgg", 1), (b"nsgg", 4)])
def test_versions_that_are_not_known(magic: bytes, version: int, tmp_path: Path) -> None:
    """Version and tokens are shown; the rest may mean anything."""
    data = native(WHOLE, [7, 8])
    found = inspect_file(write(tmp_path, magic + u32(version) + data[8:]))
    assert isinstance(found.problem, VersionError)
    assert (found.version, list(found.tokens), found.layout) == (version, [7, 8], None)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"GGUF" + bytes(60), "not a state but a GGUF file"),
        (b"\x1f\x8b" + bytes(60), "not a state but a gzip file"),
        (b"\x28\xb5\x2f\xfd" + bytes(60), "not a state but a Zstandard file"),
        (b"PK\3\4" + bytes(60), "not a state but a ZIP file"),
        (b"some text", r"not a state .*73 6f 6d 65"),
        (bytes(1000), "not a state"),
        (b"n", "not a state"),
    ],
)
def test_no_states(data: bytes, reason: str, tmp_path: Path) -> None:
    """What else a file may be is said."""
    with pytest.raises(FormatError, match=reason):
        inspect_file(write(tmp_path, data))


def test_no_files(tmp_path: Path) -> None:
    """What cannot be read is an OSError with its name, and nothing is waited for."""
    os.mkfifo(tmp_path / "fifo")
    for name, kind in (("", IsADirectoryError), ("none", FileNotFoundError), ("fifo", OSError)):
        path = tmp_path / name
        with pytest.raises(kind) as caught:
            inspect_file(path)
        assert caught.value.filename == str(path)


@pytest.mark.parametrize("name", ["v9", "v10", "v11"])
def test_golden_files(name: str) -> None:
    """Files that llama.cpp's data came from, of every version."""
    session, sequence = (inspect_file(GOLDEN / f"{name}.{k}") for k in ("session", "sequence"))
    assert (session.kind, session.session_versions) == ("session file", (int(name[1:]),))
    assert (sequence.kind, sequence.session_versions) == ("sequence file", (int(name[1:]),))
    assert list(session.tokens) == list(sequence.tokens) == [1, 0, 1, 0, 1]
    assert session.layout is not None
    assert sequence.layout is not None
    assert (session.layout.arch, session.layout.module) == ("llama", "kv")
    assert session.layout.spans == {0: (0, 4), 1: (0, 2)}
    assert sequence.layout.spans == {0: (0, 4)}
    assert "sequence 0       4 cells, positions 0, 2-4 (1 hole)" in printed.text(session)


def test_golden_blob_and_slot() -> None:
    """A blob of a build without heads, and what llama-server wrote."""
    blob = inspect_file(GOLDEN / "v9-headless.blob")
    assert (blob.kind, blob.session_versions) == ("sequence blob", (9,))
    found = inspect_file(GOLDEN / "v11.slot")
    assert (found.kind, list(found.tokens)) == ("slot file", [1, 259, 107, 108])
    assert found.layout is not None
    assert found.layout.spans == {0: (0, 3)}


def test_nothing_is_left_to_the_garbage_collector(tmp_path: Path) -> None:
    """A file's pages are let go of at once, also those of a damaged file.

    Before 3.12.6 Python crashes where it collects a loop that a memoryview is part of.
    """
    damaged = bytearray(native(SEQUENCE))
    damaged[12:24] = u32(4) + b"DSV4" + u32(1)  # begins like the state of a whole context
    other = native(State("recurrent", seq=0))
    for data in (damaged, native(WHOLE), native(WHOLE)[:-1], native(SEQUENCE)[:-1], other[:-1]):
        path = write(tmp_path, bytes(data))
        found = inspect_file(path)
        with suppress(FormatError):
            compare(found, found)
        printed.text(found)
        del found
        gc.collect()
        gc.disable()
        try:
            found = inspect_file(path)
            with suppress(FormatError):
                compare(found, found)
            printed.text(found)
            del found
            assert gc.collect() == 0
        finally:
            gc.enable()


# -- checkpoints


def checkpoint(state: State, **options: Any) -> Checkpoint:
    kind: Any = "whole" if state.seq is None else "sequence"
    options = {"source": state.seq, **options}
    return Checkpoint(state.blob(), kind=kind, session_version=state.version, **options)


@pytest.mark.parametrize("state", [WHOLE, SEQUENCE], ids=["whole", "sequence"])
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "keyed"])
@pytest.mark.parametrize("compress", [False, True])
def test_checkpoints(state: State, key: bytes | None, compress: bool, tmp_path: Path) -> None:
    """Everything that is in one is shown, and its digests were compared."""
    prints = Fingerprint({"architecture": "llama"}, {"streams": "1"}, {"rope": "not recorded here"})
    saved = checkpoint(state, tokens=[4, 5], fingerprint=prints, meta={"name": "x"})
    nbytes = saved.save(tmp_path / "c", key=key, compress=compress)
    found = inspect_file(tmp_path / "c", key=key)
    assert (found.kind, found.version, found.problem) == ("checkpoint", 1, None)
    assert found.checkpoint == saved
    assert bytes(found.state) == state.blob()
    assert (found.state_offset is None) == compress
    assert found.layout == saved.layout
    about = json.loads(json.dumps(summary.describe(found)))
    assert sum(about["bytes"].values()) == nbytes
    assert about["digests"] == {
        "kind": "XXH3-128" if key is None else "HMAC-SHA256",
        "keyed": key is not None,
        "compressed": compress,
        "count": 4,
        "damaged": [],
    }
    assert about["fingerprint"]["model"] == {"architecture": "llama"}
    assert about["meta"] == {"name": "x"}
    shown = printed.text(found)
    check_text(shown)
    for part in ("all sound", "architecture llama", "streams 1", "rope: not recorded here"):
        assert part in shown


def test_checkpoints_with_logits_and_packed_tokens(tmp_path: Path) -> None:
    """As they are in a file of llama-server."""
    words = packed([5, -1, -1], {1: image(2, 1, "hash")})
    logits = memoryview(bytes(40)).cast("f")
    saved = checkpoint(SEQUENCE, packed_tokens=words, logits=logits, logits_of=3)
    saved.save(tmp_path / "c")
    found = inspect_file(tmp_path / "c")
    assert list(found.tokens) == [5, -1, -1]
    shown = printed.text(found)
    assert "3, packed by llama-server: 5, media, media" in shown
    assert "10, of sequence 3" in shown
    about = summary.describe(found)
    assert about["bytes"]["logits"] == 40
    assert sum(about["bytes"].values()) == found.nbytes


def test_damaged_checkpoints(tmp_path: Path) -> None:
    """Which part is bad; the sound ones are shown."""
    path = tmp_path / "c"
    checkpoint(SEQUENCE, tokens=[4, 5], meta={"name": "x"}).save(path)
    data = bytearray(path.read_bytes())
    sound = inspect_file(path)
    assert sound.digests is not None
    for part in sound.digests.parts:
        changed = bytearray(data)
        changed[part.offset + part.stored // 2] ^= 1
        found = inspect_file(write(tmp_path, bytes(changed)))
        assert isinstance(found.problem, FormatError)
        if part.name != "metadata":  # a changed header makes the table of digests wrong
            assert isinstance(found.problem, ChecksumError)
            assert found.digests is not None
            assert [one.name for one in found.digests.damaged] == [part.name]
            assert f"{part.name} is not what was written" in printed.text(found)
        if part.name.startswith("payload"):
            assert found.checkpoint is not None
            assert found.checkpoint.meta == {"name": "x"}
        check_text(printed.text(found))
    for length in range(1, len(data), 97):
        if length < 8:
            continue
        found = inspect_file(write(tmp_path, bytes(data[:length])))
        assert found.kind == "checkpoint"
        assert found.problem is not None


def test_keys(tmp_path: Path) -> None:
    """Without its key a checkpoint tells nothing, and another key is not its key."""
    path = tmp_path / "c"
    checkpoint(SEQUENCE).save(path, key=KEY)
    for key in (None, b"f" * 16):
        found = inspect_file(path, key=key)
        assert isinstance(found.problem, ChecksumError)
        assert (found.checkpoint, found.layout) == (None, None)
        assert "key" in printed.text(found)
    checkpoint(SEQUENCE).save(path)
    assert "not authenticated" in str(inspect_file(path, key=KEY).problem)


# -- words


def test_ranges() -> None:
    """Runs, each number once, the middle left out of many."""
    assert ranges([]) == []
    assert ranges([3, 1, 2, 2, 9, 5, 6]) == [(1, 3), (5, 6), (9, 9)]
    assert ranges_text([]) == "none"
    assert ranges_text([(0, 511)]) == "0-511"
    assert ranges_text([(0, 3), (5, 5)]) == "0-3, 5 (1 hole)"
    many = [(at, at + 1) for at in range(0, 50, 5)]
    assert ranges_text(many) == "0-1, 5-6, 10-11, ..., 45-46 (9 holes)"


def test_words() -> None:
    """Sizes have units, lists are cut."""
    numbers = (0, 1023, 1024, 1536, 5 << 20, 3 << 30)
    assert [*map(size, numbers)] == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 GiB"]
    assert first_few([1, 2]) == "1, 2"
    assert first_few(range(100), most=3) == "0, 1, 2, ..."
    error = TruncatedError("K", need=2000, have=1000, offset=24)
    assert problem_text(error) == "cut off in K, at byte 24: 2,000 bytes needed, 1,000 there"
    assert problem_text(FormatError("no", offset=4000)) == "no, at byte 4,000"
