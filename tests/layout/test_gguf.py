"""Headers of GGUF files: read exactly, and believed in nothing."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import gguf
import pytest

from llama_state.errors import FormatError, TruncatedError, UnsupportedError, VersionError
from llama_state.layout.gguf import TENSOR_TYPES, GGUFHeader, part_paths, read_header
from llama_state.testing import KINDS, write_model
from tests.layout import ggufs
from tests.layout.ggufs import ARRAY, F16, F32, STRING, Typed, array, build, string, u32

KEYS = {
    "general.architecture": string("tiny"),
    "tiny.block_count": u32(2),
    "tokenizer.ggml.tokens": array(STRING, ["a", "", "long enough"]),
    "tokenizer.ggml.scores": array(6, [0.5, -1.0]),
}
TENSORS = {
    "first.weight": ((4, 2), F32, bytes(range(32))),
    "second.weight": ((3,), F16, b"abcdef"),
}
REFUSED = (FormatError, UnsupportedError)


def header_of(path: Path) -> GGUFHeader:
    return read_header(part_paths(path))


def bytes_read() -> int:
    """Return the bytes that this process has read so far, from files of any kind."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return ggufs.write(tmp_path / "m.gguf", KEYS, TENSORS)


# -- what is read


@pytest.mark.parametrize("version", [2, 3])
def test_keys_and_tensors(tmp_path: Path, version: int) -> None:
    """Both versions that are in use; offsets are those in the file."""
    path = ggufs.write(tmp_path / "m.gguf", KEYS, TENSORS, version=version)
    header = header_of(path)
    assert list(header.keys) == list(KEYS)
    assert header.keys["tiny.block_count"].number() == 2
    assert header.keys["tokenizer.ggml.tokens"].text() == '["a", "", "long enough"]'
    for tensor in header.tensors:
        shape, kind, data = TENSORS[tensor.name]
        assert (tensor.shape, tensor.type_id, tensor.nbytes) == (shape, kind, len(data))
        assert path.read_bytes()[tensor.offset :][: tensor.nbytes] == data


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_gguf_package_reads_it(kind: str, tmp_path: Path) -> None:
    """Another reader finds the same keys, shapes, types, places and sizes."""
    path = write_model(tmp_path / "m.gguf", kind, text=True)
    header, other = header_of(path), gguf.GGUFReader(path)
    assert set(header.keys) == {name for name in other.fields if not name.startswith("GGUF.")}
    ours = [(t.name, t.shape, t.type_id, t.offset, t.nbytes) for t in header.tensors]
    assert ours == [
        (t.name, tuple(map(int, t.shape)), int(t.tensor_type), int(t.data_offset), int(t.n_bytes))
        for t in other.tensors
    ]


def test_types_are_those_of_the_gguf_package() -> None:
    """Name, values and bytes of a block of every type; two occur in no file."""
    found = {id_: (t.name.lower(), t.elements, t.nbytes) for id_, t in TENSOR_TYPES.items()}
    known = {int(kind): (kind.name.lower(), *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {id_: known[id_] for id_ in found} == found
    assert {known[id_][0] for id_ in set(known) - set(found)} <= {"q8_1", "q8_k"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (u32(7), "7"),
        (Typed(1, -3), "-3"),
        (Typed(11, -(2**40)), str(-(2**40))),
        (Typed(6, 1e-5), "0.000010"),
        (Typed(12, 1e6), "1000000.000000"),
        (Typed(6, float("inf")), "inf"),
        (Typed(7, True), "true"),
        (string("yarn\0hidden"), "yarn"),
        (array(5, [1, -2]), "[1, -2]"),
        (array(7, [True, False]), "[true, false]"),
        (array(6, [0.5]), "[0.500000]"),
        (array(STRING, ['a"b', "c\\d"]), '["a\\"b", "c\\\\d"]'),
        (array(4, []), "[]"),
    ],
)
def test_text_is_that_of_llama_cpp(value: Typed, shown: str, tmp_path: Path) -> None:
    """Numbers as std::to_string writes them, arrays and strings as llama.cpp does."""
    path = ggufs.write(tmp_path / "m.gguf", {"key": value})
    assert header_of(path).keys["key"].text() == shown


def test_an_unknown_type_reaches_to_the_next_tensor(tmp_path: Path) -> None:
    """A type of a newer llama.cpp is named by its number; its size follows from the places."""
    tensors = {"a": ((5,), 99, bytes(40)), "b": ((1,), F32, bytes(4)), "c": ((7,), 99, bytes(32))}
    path = ggufs.write(tmp_path / "m.gguf", {}, tensors)
    header = header_of(path)
    assert [(t.type, t.nbytes) for t in header.tensors] == [
        ("type 99", 64),
        ("f32", 4),
        ("type 99", 32),
    ]


def test_alignment(tmp_path: Path) -> None:
    """Tensors begin where general.alignment says."""
    keys = {"general.alignment": u32(128)}
    path = ggufs.write(tmp_path / "m.gguf", keys, TENSORS, alignment=128)
    assert [t.offset % 128 for t in header_of(path).tensors] == [0, 0]
    for wrong in (u32(0), u32(33), string("32"), array(4, [32])):
        path = ggufs.write(tmp_path / "m.gguf", {"general.alignment": wrong}, TENSORS)
        with pytest.raises(FormatError, match="alignment"):
            header_of(path)


@pytest.mark.linux
def test_only_the_header_is_read(tmp_path: Path) -> None:
    """Of a file of 1 TiB, nearly all a hole, some pieces."""
    data = build({"general.architecture": string("tiny")}, {"a": ((1,), F32, bytes(4))})
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    os.truncate(path, 1 << 40)
    before = bytes_read()
    assert len(header_of(path).tensors) == 1
    assert bytes_read() - before < 8 << 20


# -- damage


def test_every_truncation(file: Path) -> None:
    """A file that is cut anywhere says so, but for the padding behind the last tensor."""
    whole = file.read_bytes()
    end = max(tensor.offset + tensor.nbytes for tensor in header_of(file).tensors)
    for length in range(end):
        file.write_bytes(whole[:length])
        with pytest.raises(TruncatedError):
            header_of(file)
    file.write_bytes(whole[:end])
    assert len(header_of(file).tensors) == 2


def test_flipped_bits(file: Path) -> None:
    """A damaged header is read as another one or refused, with an error of ours."""
    whole = file.read_bytes()
    rng = random.Random(7)
    refused = 0
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            for value in header_of(file).keys.values():
                value.text()
        except REFUSED:
            refused += 1
    assert 50 < refused < 600


@pytest.mark.parametrize(
    "field", ["tensors", "keys", "string", "array", "array of strings", "shape", "offset"]
)
@pytest.mark.parametrize("count", [2**31, 2**40, 2**63, 2**64 - 1])
def test_huge_counts(field: str, count: int, tmp_path: Path) -> None:
    """A length is compared with the file before anything is reserved for it."""
    huge = struct.pack("<Q", count)
    start = b"GGUF" + struct.pack("<I", 3)
    one, none = struct.pack("<Q", 1), struct.pack("<Q", 0)
    key = ggufs.text("k")
    files = {
        "tensors": start + huge + none,
        "keys": start + none + huge,
        "string": start + none + one + key + struct.pack("<I", STRING) + huge,
        "array": start + none + one + key + struct.pack("<II", ARRAY, 4) + huge,
        "array of strings": start + none + one + key + struct.pack("<II", ARRAY, STRING) + huge,
        "shape": start + one + none + key + struct.pack("<I", 1) + huge + struct.pack("<IQ", 0, 0),
        "offset": start + one + none + key + struct.pack("<IQI", 1, 4, F32) + huge,
    }
    path = tmp_path / "m.gguf"
    path.write_bytes(files[field] + bytes(200))
    with pytest.raises(FormatError):
        header_of(path)


def test_a_header_that_does_not_end(tmp_path: Path) -> None:
    """However long the file is, no more than MAX_HEADER bytes are taken for its header."""
    path = tmp_path / "m.gguf"
    start = build({"key": string("")})[:-8]
    path.write_bytes(start + struct.pack("<Q", 1 << 33))
    os.truncate(path, 1 << 34)
    with pytest.raises(FormatError, match="a header of more than"):
        header_of(path)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", TruncatedError, "magic"),
        (b"GGML" + bytes(40), FormatError, "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), VersionError, "expected 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), UnsupportedError, "big-endian"),
        (build({"k": string("v")}) + b"", None, ""),
        (build({"k": Typed(4, 1)}).replace(b"\x04\0\0\0", b"\x2a\0\0\0"), FormatError, "type 42"),
        (build({"k": array(4, [])}).replace(b"\x04\0\0\0", b"\x09\0\0\0"), FormatError, "type 9"),
        (build({"k1": u32(1), "k2": u32(2)}).replace(b"k2", b"k1"), FormatError, "twice"),
        (build({"k": u32(1)}).replace(b"k", b"\xff"), FormatError, "not UTF-8"),
        (build({"k" * 2000: u32(1)}), FormatError, "key of 2000 bytes"),
        (build({}, {"t": ((1,) * 5, F32, bytes(4))}), FormatError, "5 dimensions"),
        (build({}, {"t": ((33,), 8, bytes(34))}), FormatError, "not whole q8_0"),
        (build({}, {"t": ((9,), F32, bytes(32))}), TruncatedError, "'t'"),
    ],
)
def test_what_is_wrong_is_said(
    data: bytes, error: type[Exception] | None, message: str, tmp_path: Path
) -> None:
    """The error names what was found."""
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    if error is None:
        assert list(header_of(path).keys) == ["k"]
        return
    with pytest.raises(error, match=message):
        header_of(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    """A folder, a pipe and nothing at all are OSErrors, and none is waited for."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing"):
        with pytest.raises(OSError, match=r"\["):
            header_of(tmp_path / name)


# -- split models


PARTS = [{"first.weight": TENSORS["first.weight"]}, {}, {"second.weight": TENSORS["second.weight"]}]


def test_all_parts_of_a_split_model_are_read(tmp_path: Path) -> None:
    """Any part names all of them; keys are those of the first."""
    paths = ggufs.split(tmp_path, KEYS, PARTS)
    for path in paths:
        header = header_of(path)
        assert header.keys["general.architecture"].text() == "tiny"
        assert [(t.name, t.part) for t in header.tensors] == [
            ("first.weight", 0),
            ("second.weight", 2),
        ]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    """The error says which file is not there."""
    paths = ggufs.split(tmp_path, KEYS, PARTS)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.gguf"):
        header_of(paths[0])


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    """Names, counts and what the parts say of themselves must agree."""
    first, second, third = ggufs.split(tmp_path, KEYS, PARTS)
    renamed = tmp_path / "whole.gguf"
    renamed.write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match="one of 3 parts"):
        header_of(renamed)
    kept = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(FormatError, match=r"model-00002-of-00003\.gguf: part 2"):
        header_of(first)
    second.write_bytes(build(KEYS, TENSORS))
    with pytest.raises(FormatError, match="one of 1 parts"):
        header_of(first)
    second.write_bytes(kept)
    ggufs.split(tmp_path, KEYS, [*PARTS[:2], PARTS[0]])
    with pytest.raises(FormatError, match=r"'first\.weight' occurs twice"):
        header_of(first)


def test_a_part_without_a_tensor_that_was_promised(tmp_path: Path) -> None:
    """The number of tensors of all parts is compared."""
    first, _, third = ggufs.split(tmp_path, KEYS, PARTS)
    ggufs.split(tmp_path, KEYS, [{}, {}, PARTS[2]])
    kept = third.read_bytes()
    first, _, third = ggufs.split(tmp_path, KEYS, PARTS)
    third.write_bytes(kept.replace(b"second", b"sec0nd"))
    assert len(header_of(first).tensors) == 2
    ggufs.write(
        third,
        {"split.no": Typed(2, 2), "split.count": Typed(2, 3), "split.tensors.count": Typed(5, 2)},
    )
    with pytest.raises(FormatError, match="1 tensors instead of 2"):
        header_of(first)
