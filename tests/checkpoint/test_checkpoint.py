"""Checkpoints as values and as files, without any libllama."""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cffi import FFI
from hypothesis import given
from hypothesis import strategies as st

from llama_state import layout
from llama_state.checkpoint.checkpoint import Checkpoint
from llama_state.checkpoint.container import pack
from llama_state.checkpoint.fingerprint import Fingerprint
from llama_state.errors import ChecksumError, FormatError, SaveError, VersionError
from tests.layout.blobs import State, text

PRINT = Fingerprint({"architecture": "llama", "weights": "0" * 32}, {"rope": "the model's own"})
SEQUENCE = State("kv", cells=text(5, 3), seq=3)
WHOLE = State("kv", cells=text(5, 0) + text(2, 1), arch="llama")


KEY = bytes(range(20))


def make_checkpoint(state: State = SEQUENCE, **options: Any) -> Checkpoint:
    kind: layout.Kind = "whole" if state.seq is None else "sequence"
    options = {"tokens": range(5), "fingerprint": PRINT, "meta": {"name": "a"}, **options}
    return Checkpoint(
        state.blob(), kind=kind, session_version=state.version, source=state.seq, **options
    )


def file_of(state: State, tokens: tuple[int, ...] = (1, 2)) -> bytes:
    """Build the native file of a state, by the grammar."""
    kind: layout.Kind = "whole" if state.seq is None else "sequence"
    version = state.version if kind == "whole" else layout.SEQUENCE_VERSION[state.version]
    skip = 0 if kind == "whole" or not layout.has_sequence_head(memoryview(state.blob())) else 8
    return layout.pack_file_header(kind, version, array("i", tokens)) + state.blob()[skip:]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(
    tokens=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9),
    logits=st.none() | st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9),
    meta=st.dictionaries(st.text(), JSON, max_size=3),
    key=st.none() | st.binary(min_size=16, max_size=40),
    compress=st.booleans(),
)
def test_round_trip(
    tokens: list[int],
    logits: list[float] | None,
    meta: dict[str, Any],
    key: bytes | None,
    compress: bool,
) -> None:
    """All of it comes back, through bytes and through pickles of every protocol."""
    row = None if logits is None else array("f", logits)
    one = make_checkpoint(
        tokens=tokens, logits=row, logits_of=None if row is None else 3, meta=meta
    )
    two = Checkpoint.from_bytes(one.to_bytes(key=key, compress=compress), key=key)
    assert two == one
    assert (two.tokens, two.meta, two.fingerprint) == (tuple(tokens), meta, PRINT)
    assert two.logits_of == (None if row is None else 3)
    assert (None if two.logits is None else two.logits.tolist()) == logits
    assert two.payload == SEQUENCE.blob()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(one, protocol)) == one  # noqa: S301 - our own
    assert copy.deepcopy(one) == one


def test_pickles_out_of_band_do_not_copy() -> None:
    """With protocol 5 the payload travels as the buffer that it is."""
    one = make_checkpoint()
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(one, 5, buffer_callback=buffers.append)
    assert [bytes(buffer) for buffer in buffers] == [SEQUENCE.blob()]
    assert len(data) < 1000
    two = pickle.loads(data, buffers=buffers)  # noqa: S301 - our own
    assert two == one
    addresses = {FFI().from_buffer(checkpoint.payload) for checkpoint in (one, two)}
    assert len(addresses) == 1


def test_equality_and_length() -> None:
    """Every part counts."""
    one = make_checkpoint(logits=array("f", [1]), logits_of=3)
    assert one == make_checkpoint(logits=array("f", [1]), logits_of=3)
    assert len(one) == len(SEQUENCE.blob())
    others = [
        make_checkpoint(),
        make_checkpoint(logits=array("f", [2]), logits_of=3),
        make_checkpoint(tokens=range(4), logits=array("f", [1]), logits_of=3),
        make_checkpoint(meta={}, logits=array("f", [1]), logits_of=3),
        make_checkpoint(fingerprint=Fingerprint(), logits=array("f", [1]), logits_of=3),
        make_checkpoint(State("kv", cells=text(6, 3), seq=3), logits=array("f", [1]), logits_of=3),
    ]
    for other in others:
        assert one != other
    assert one != "a checkpoint"
    with pytest.raises(TypeError):
        hash(one)


def test_large_payloads_are_compared_in_full() -> None:
    """A difference behind the first pieces is one."""
    a = bytearray(9 << 20)
    b = bytearray(a)
    b[-1] = 1
    pair = [Checkpoint(x, kind="whole", session_version=11) for x in (a, b)]
    assert pair[0] != pair[1]
    assert pair[0] == Checkpoint(bytes(a), kind="whole", session_version=11)


def test_buffer_protocol() -> None:
    """A checkpoint is a buffer of its payload, where classes can be buffers."""
    assert make_checkpoint().__buffer__(0) == SEQUENCE.blob()
    if sys.version_info >= (3, 12):
        assert bytes(memoryview(make_checkpoint())) == SEQUENCE.blob()


def test_it_never_changes() -> None:
    """Neither through its views nor through its meta, which is a copy."""
    meta = {"list": [1]}
    one = make_checkpoint(meta=meta)
    with pytest.raises(TypeError):
        one.payload[0] = 1
    meta["list"].append(2)
    one.meta["list"].append(3)
    assert one.meta == {"list": [1]}


def test_repr() -> None:
    """Says what it is of, how much, and for what."""
    assert repr(make_checkpoint()) == (
        f"<Checkpoint of sequence 3 of llama: 5 tokens, {len(SEQUENCE.blob())} bytes, "
        "session version 11>"
    )
    shown = repr(
        make_checkpoint(WHOLE, logits=array("f", [1]), logits_of=0, fingerprint=Fingerprint())
    )
    assert "the whole context of an unknown model" in shown
    assert "logits" in shown


def test_layout() -> None:
    """The payload is described as one of the model in the fingerprint."""
    assert make_checkpoint().layout.spans == {3: (0, 4)}
    assert make_checkpoint(WHOLE).layout.sequences == (0, 1)
    assert make_checkpoint().source == 3
    assert make_checkpoint(WHOLE).source is None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"meta": {"a": float("nan")}}, FormatError),
        ({"meta": {"a": object()}}, FormatError),
        ({"tokens": [2**31]}, FormatError),
        ({"tokens": ["a"]}, TypeError),
        ({"session_version": 8}, VersionError),
    ],
)
def test_refused_parts(options: dict[str, Any], error: type[Exception]) -> None:
    """What cannot be kept is refused when it is made, not when it is saved."""
    with pytest.raises(error):
        make_checkpoint(**options) if "session_version" not in options else Checkpoint(
            b"", kind="whole", **options
        )


def as_metadata(**changes: Any) -> bytes:
    fields = json.loads(make_checkpoint()._metadata)
    return json.dumps({**fields, **changes}).encode()


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
        as_metadata(kind="other"),
        as_metadata(kind=["whole"]),
        as_metadata(kind="whole"),
        as_metadata(source=None),
        as_metadata(source="0"),
        as_metadata(**{"session version": "11"}),
        as_metadata(**{"session version": True}),
        as_metadata(**{"session version": 12}),
        as_metadata(**{"logits of": "0"}),
        as_metadata(**{"packed tokens": 1}),
        as_metadata(fingerprint={}),
        as_metadata(fingerprint={"model": {"a": 1}, "context": {}, "unknown": {}}),
        as_metadata(meta=[]),
        as_metadata(more=1),
    ],
)
def test_metadata_of_strangers(metadata: bytes) -> None:
    """A container whose digests are right, and whose metadata are not."""
    data = b"".join(pack(metadata, SEQUENCE.blob()))
    with pytest.raises(FormatError):
        Checkpoint.from_bytes(data)


@pytest.mark.parametrize(
    ("key", "mapped"), [(None, False), (None, True), (None, None), (KEY, False), (KEY, None)]
)
def test_files(tmp_path: Path, key: bytes | None, mapped: bool | None) -> None:
    """Saved, replaced while it is mapped, loaded."""
    path = tmp_path / "a.llst"
    one, two = make_checkpoint(), make_checkpoint(meta={"name": "b"})
    assert one.save(path, key=key) == path.stat().st_size
    loaded = Checkpoint.load(path, key=key, mapped=mapped)
    two.save(os.fspath(path), key=key, durable=False)
    assert loaded == one
    loaded.check_unchanged()
    assert Checkpoint.load(path, key=key, mapped=mapped) == two
    path.unlink()
    loaded.check_unchanged()
    assert loaded == one


def write_into(path: Path, byte: bytes = b"\xff") -> None:
    """Change the payload of a checkpoint in place, and say that it was not."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(4096 + 100)
        file.write(byte)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("trick", ["time set back", "renamed", "replaced", "relative"])
@pytest.mark.parametrize("key", [KEY, None], ids=["keyed", "plain"])
def test_forged_after_it_was_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trick: str, key: bytes | None
) -> None:
    """With a key, what was verified is what is used. Without, a change by mistake is found."""
    path = tmp_path / "a.llst"
    one = make_checkpoint()
    one.save(path, key=key)
    monkeypatch.chdir(tmp_path)
    loaded = Checkpoint.load("a.llst" if trick == "relative" else path, key=key)
    inode = tmp_path / "same"
    os.link(path, inode)
    if trick == "renamed":
        path.rename(tmp_path / "b.llst")
    elif trick == "replaced":
        make_checkpoint(meta={"name": "b"}).save(path, key=key)
    elif trick == "relative":
        monkeypatch.chdir("/")
    write_into(inode)
    if key is None:
        if trick != "time set back":  # that is no mistake
            os.utime(inode, ns=(1, 1))
            with pytest.raises(ChecksumError, match="load it again"):
                loaded.check_unchanged()
        return
    loaded.check_unchanged()
    assert loaded == one


def test_a_key_and_a_mapping(tmp_path: Path) -> None:
    """One excludes the other."""
    make_checkpoint().save(tmp_path / "a.llst", key=KEY)
    with pytest.raises(ValueError, match="mapped=True"):
        Checkpoint.load(tmp_path / "a.llst", key=KEY, mapped=True)


def test_a_native_file_that_is_rewritten_in_place(tmp_path: Path) -> None:
    """It was read; only if it was mapped, on demand, it changes, and that is noticed."""
    path = tmp_path / "a.state"
    one = make_checkpoint()
    one.to_native(path)
    read, mapped = Checkpoint.from_native(path), Checkpoint.from_native(path, mapped=True)
    payload = bytes(read.payload)
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(1, 1))
    assert read.payload == payload
    read.check_unchanged()
    with pytest.raises(ChecksumError, match="load it again"):
        mapped.check_unchanged()
    path.write_bytes(b"")  # llama.cpp does that first: a mapping would be the end of the process
    assert read.payload == payload


def test_no_file_is_replaced(tmp_path: Path) -> None:
    """Nor is a link followed, if asked."""
    path, link = tmp_path / "a.llst", tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    one = make_checkpoint()
    assert one.save(path, replace=False) == path.stat().st_size
    content = path.read_bytes()
    for taken in (path, link):
        with pytest.raises(FileExistsError):
            one.save(taken, replace=False)
        with pytest.raises(FileExistsError):
            one.to_native(taken, replace=False)
    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.llst", "link"]


@pytest.mark.parametrize("compress", [False, True])
def test_the_size_can_be_bounded(tmp_path: Path, compress: bool) -> None:
    """What is larger when decompressed is refused before anything is."""
    path = tmp_path / "a.llst"
    one = make_checkpoint()
    one.save(path, compress=compress)
    assert Checkpoint.load(path, max_size=len(one)) == one
    for load in (Checkpoint.load, lambda p, **o: Checkpoint.from_bytes(p.read_bytes(), **o)):
        with pytest.raises(FormatError, match="max_size"):
            load(path, max_size=len(one) - 1)


def test_a_mapped_file_that_is_written_to(tmp_path: Path) -> None:
    """It was verified before it changed."""
    path = tmp_path / "a.llst"
    make_checkpoint().save(path)
    mapped, read = Checkpoint.load(path), Checkpoint.load(path, mapped=False)
    with path.open("r+b") as file:
        file.seek(4096 + 100)
        file.write(b"\xff")
    os.utime(path, ns=(1, 1))  # clocks of file systems are coarse
    with pytest.raises(ChecksumError, match="load it again"):
        mapped.check_unchanged()
    read.check_unchanged()
    with pytest.raises(ChecksumError, match="payload chunk 1 of 1"):
        Checkpoint.load(path)


def make_large(fill: int = 0) -> Checkpoint:
    """One of several chunks."""
    payload = bytes([fill]) * (9 << 20)
    return Checkpoint(payload, kind="whole", session_version=11, fingerprint=PRINT)


def reports(
    call: Callable[..., object], path: Path, stop_at: int | None = None
) -> list[tuple[int, int]]:
    """Return the progress reports of a save or a load, which is stopped at one of them."""
    steps: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        steps.append((done, total))
        if len(steps) - 1 == stop_at:
            raise KeyError("stopped")

    if stop_at is None:
        call(path, progress=report)
    else:
        with pytest.raises(KeyError, match="stopped"):
            call(path, progress=report)
    return steps


def test_progress(tmp_path: Path) -> None:
    """Reported in steps from nothing to all; an exception at any of them changes nothing."""
    path = tmp_path / "a.llst"
    for call in (make_large().save, Checkpoint.load):
        steps = reports(call, path)
        done, totals = [step[0] for step in steps], {step[1] for step in steps}
        assert done == sorted(done)
        assert totals == {done[-1]}
        assert len(steps) > 3
        before = path.read_bytes()
        for stop_at in range(len(steps)):
            reports(make_large(1).save if call != Checkpoint.load else call, path, stop_at)
            assert path.read_bytes() == before
            assert [p.name for p in tmp_path.iterdir()] == ["a.llst"]


def test_nothing_is_lost_when_saving_fails(tmp_path: Path) -> None:
    """The old file stays, nothing lies about."""
    path = tmp_path / "a.llst"
    make_checkpoint().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="16 bytes"):
        make_checkpoint(meta={}).save(path, key=b"short")
    with pytest.raises(SaveError):
        make_checkpoint().save(tmp_path / "none" / "a.llst")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.llst"]


@pytest.mark.parametrize("version", [9, 10, 11])
@pytest.mark.parametrize("seq", [None, 0, 2])
@pytest.mark.parametrize("tokens", [(), (1,), tuple(range(3000))])
def test_native_files_and_back(
    tmp_path: Path, version: int, seq: int | None, tokens: tuple[int, ...]
) -> None:
    """A native file becomes a checkpoint and the same native file; a checkpoint likewise."""
    cells = text(4, 2 if seq is None else seq)
    state = State("kv", version=version, cells=cells, seq=seq, arch="llama")
    native, again = tmp_path / "native", tmp_path / "again"
    native.write_bytes(file_of(state, tokens))
    one = Checkpoint.from_native(native, fingerprint=PRINT, meta={"name": "a"})
    assert (one.tokens, one.session_version) == (tokens, version)
    assert one.layout.spans == {2 if seq is None else seq: (0, 3)}
    assert one.to_native(again) == native.stat().st_size
    assert again.read_bytes() == native.read_bytes() == file_of(state, tokens)
    two = Checkpoint.from_native(again, fingerprint=PRINT, meta={"name": "a"})
    assert two.to_bytes() == one.to_bytes()
    assert one == Checkpoint(
        layout.SEQUENCE_HEAD.pack(layout.SEQUENCE_MAGIC, seq) + file_of(state, ())[12:]
        if seq is not None
        else state.blob(),
        kind="whole" if seq is None else "sequence",
        session_version=version,
        source=seq,
        tokens=tokens,
        fingerprint=PRINT,
        meta={"name": "a"},
    )


def test_recurrent_sequences_name_no_sequence(tmp_path: Path) -> None:
    """Their checkpoint is of sequence 0."""
    path = tmp_path / "native"
    path.write_bytes(file_of(State("recurrent", cells=text(4, 2), seq=2)))
    assert Checkpoint.from_native(path).source == 0


def test_native_files_that_are_none(tmp_path: Path) -> None:
    """Cut, extended, of an unknown version, or something else; offsets are those in the file."""
    path = tmp_path / "native"
    data = file_of(SEQUENCE)
    for size in range(0, len(data), 3):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError):
            Checkpoint.from_native(path, fingerprint=PRINT)
    for wrong in (data + b"\0", b"GGUF" + data, data[:4] + b"\x07" + data[5:]):
        path.write_bytes(wrong)
        with pytest.raises(FormatError):
            Checkpoint.from_native(path, fingerprint=PRINT)
    make_checkpoint().save(path)
    with pytest.raises(FormatError):
        Checkpoint.from_native(path)
    at = 12 + 4 * 2 + 4  # the cell count
    path.write_bytes(data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :])
    with pytest.raises(FormatError) as caught:
        Checkpoint.from_native(path, fingerprint=PRINT)
    assert caught.value.offset is not None
    assert caught.value.offset >= at - 4
    path.write_bytes(file_of(SEQUENCE))
    Checkpoint.from_native(path)


def test_converting_does_not_change_the_source(tmp_path: Path) -> None:
    """The head of a sequence is written to memory, not to the file."""
    path = tmp_path / "native"
    path.write_bytes(file_of(SEQUENCE))
    one = Checkpoint.from_native(path)
    assert one.source == 3
    assert path.read_bytes() == file_of(SEQUENCE)


def test_random_bytes_are_refused() -> None:
    """Whatever they are."""
    random = Random(9)
    for size in (0, 1, 8, 64, 112, 5000):
        for _ in range(20):
            with pytest.raises(FormatError):
                Checkpoint.from_bytes(random.randbytes(size))
