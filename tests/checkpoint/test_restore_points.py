"""Restore points in a checkpoint: nothing that a slot file has is lost on the way and back."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_state import Checkpoint, FormatError, inspect_file
from llama_state.checkpoint.container import pack
from llama_state.inspection import compare, convert_file, verify_file
from llama_state.inspection.report import text as report_of
from llama_state.inspection.summary import describe
from llama_state.inspection.text import text as text_of
from llama_state.layout import RestorePoint
from tests.layout.blobs import State
from tests.layout.slots import packed
from tests.layout.statefiles import slot, write
from tests.layout.test_restore_points import KINDS, points, state

MOMENTS = [3, 5]


def slot_file(folder: Path, kind: str, moments: list[int] = MOMENTS, name: str = "slot") -> Path:
    content = slot(state(kind, 9), packed(range(9)))
    return write(folder, content + (points(kind, moments) if moments else b""), name)


def partial(kind: str, n_tokens: int) -> bytes:
    return replace(state(kind, n_tokens), partial=True).blob()


def made(**changes: Any) -> Checkpoint:
    arguments: dict[str, Any] = {
        "kind": "sequence",
        "session_version": State("hybrid").version,
        "source": 0,
        "restore_points": [RestorePoint(3, partial("hybrid", 3))],
    }
    return Checkpoint(state("hybrid", 9).blob(), **{**arguments, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_they_come_through_everything(kind: str, tmp_path: Path) -> None:
    """Containers, compressed too, pickles of each protocol, and the file that is written again."""
    path = slot_file(tmp_path, kind)
    one = Checkpoint.from_native(path)
    one.save(tmp_path / "saved")
    copies = [
        one,
        Checkpoint.from_native(path, mapped=True),
        Checkpoint.load(tmp_path / "saved"),
        Checkpoint.from_bytes(one.to_bytes(compress=True)),
        *(pickle.loads(pickle.dumps(one, protocol)) for protocol in (2, 5)),  # noqa: S301
    ]
    for copy in copies:
        assert copy == one
        assert bytes(copy.payload) == state(kind, 9).blob()
        assert [point.n_tokens for point in copy.restore_points] == MOMENTS
        assert [point.blob for point in copy.restore_points] == [partial(kind, n) for n in MOMENTS]
        assert "2 restore points" in repr(copy)
        copy.to_native(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert one != Checkpoint.from_native(slot_file(tmp_path, kind, [3, 4], "other"))
    assert one != Checkpoint.from_native(slot_file(tmp_path, kind, [], "none"))


@given(st.integers(1, 3), st.binary(max_size=20_000), st.lists(st.binary(max_size=9_000)))
def test_a_payload_of_several_buffers(n: int, payload: bytes, more: list[bytes]) -> None:
    """It is cut into chunks as if it were one."""
    parts = [
        b"".join(map(bytes, pack(b"{}", payload, more=more, chunk=4096 * n))),
        b"".join(map(bytes, pack(b"{}", payload + b"".join(more), chunk=4096 * n))),
    ]
    assert parts[0] == parts[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compress", [False, True])
def test_they_are_converted_there_and_back(kind: str, compress: bool, tmp_path: Path) -> None:
    path = slot_file(tmp_path, kind)
    convert_file(path, tmp_path / "checkpoint", compress=compress)
    found = inspect_file(tmp_path / "checkpoint")
    assert (found.problem, len(found.restore_points)) == (None, 2)
    about = describe(found)
    assert sum(about["bytes"].values()) == found.nbytes
    assert "after 5 tokens: positions 0 to 4" in text_of(found)
    assert compare(found, inspect_file(path)).equal
    convert_file(tmp_path / "checkpoint", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_another_session_version_has_them_too(tmp_path: Path) -> None:
    """In its own form: version 10 has no words for rotations, version 11 has."""
    path = slot_file(tmp_path, "iswa")
    convert_file(path, tmp_path / "older", session_version=10)
    older = inspect_file(tmp_path / "older")
    assert (older.problem, older.session_versions) == (None, (10,))
    blobs = [replace(state("iswa", n), partial=True, version=10).blob() for n in MOMENTS]
    assert [point.blob for point in older.restore_points] == blobs
    convert_file(tmp_path / "older", tmp_path / "newer", session_version=11)
    assert (tmp_path / "newer").read_bytes() == path.read_bytes()


def test_where_they_differ_is_said(tmp_path: Path) -> None:
    one = inspect_file(slot_file(tmp_path, "hybrid"))
    without = inspect_file(slot_file(tmp_path, "hybrid", [], "without"))
    found = compare(one, without)
    assert not found.equal
    assert "after 3, 5 tokens | none" in report_of(found)
    content = bytearray(Path(one.path).read_bytes())
    content[-17] ^= 1  # the last byte of the last blob
    found = compare(one, inspect_file(write(tmp_path, bytes(content), "flipped")))
    assert not found.equal
    assert "2 restore points | 1 other blob" in report_of(found)
    assert compare(one, one).equal


@pytest.mark.parametrize("compress", [False, True])
def test_verify_finds_what_is_damaged(compress: bool, tmp_path: Path) -> None:
    """By its digest; the state of what is not compressed is described all the same."""
    content = bytearray(made().to_bytes(compress=compress))
    path = write(tmp_path, bytes(content))
    assert verify_file(path).sound
    content[inspect_file(path).digests.parts[-1].end - 1] ^= 1  # type: ignore[union-attr]
    path = write(tmp_path, bytes(content))
    assert verify_file(path).outcome == "damaged"
    found = inspect_file(path)
    assert found.restore_points == ()
    assert (found.layout is None) == (compress and found.state_offset is None)


def test_verify_reads_them(tmp_path: Path) -> None:
    """What a digest cannot know: they are of another sequence, or later than the state."""
    for n_tokens, blob in (
        (12, partial("hybrid", 12)),
        (3, partial("iswa", 3)),
        (4, partial("hybrid", 3)),
    ):
        made(restore_points=[RestorePoint(n_tokens, blob)]).save(tmp_path / "checkpoint")
        verdict = verify_file(tmp_path / "checkpoint")
        assert verdict.outcome == "damaged"
        assert "restore point" in verdict.problems[0]


def test_the_first_position_is_that_of_the_memory(tmp_path: Path) -> None:
    """Where it is not given: llama-server needs the right one."""
    made().to_native(tmp_path / "slot")
    (point,) = inspect_file(tmp_path / "slot").restore_points
    assert point.span == (2, 2)


def test_what_cannot_have_them() -> None:
    with pytest.raises(FormatError, match="only a sequence"):
        made(kind="whole", source=None)
    with pytest.raises(TypeError, match="RestorePoint"):
        made(restore_points=[b"blob"])


FIELDS: list[Any] = [
    [[3, 0, 2]],
    [[3, 0, 2, 4, 5]],
    [[3, 0, 3, 40]],
    [[0, None, -1, 40]],
    [[3, 0, None, 40]],
    [[3, 0, 2.0, 40]],
    [[3, 0, True, 40]],
    [[2**31, 0, 2, 40]],
    [[3, 0, 2, -1]],
    [[3, 0, 2, 10**9]],
    [[3, 0, 2, 40]],
    [5],
    {},
    None,
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_forged_metadata_are_refused(fields: Any, tmp_path: Path) -> None:
    one = made()
    metadata = {**json.loads(one._metadata), "restore points": fields}
    path = write(tmp_path, b"".join(pack(json.dumps(metadata).encode(), one.payload)))
    with pytest.raises(FormatError):
        Checkpoint.load(path)
    assert inspect_file(path).problem is not None
