"""Fingerprints: by content, field by field, and nothing that was not compared is called equal."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from llama_state import Fingerprint, layout
from llama_state.checkpoint import fingerprint
from llama_state.checkpoint.fingerprint import adapter_digest, model_fields, state_fields
from llama_state.errors import Difference, FormatError, TruncatedError
from llama_state.testing import KINDS, write_model
from tests.layout import ggufs
from tests.layout.blobs import State, text
from tests.layout.ggufs import F16, F32, STRING, Typed, array, string, u32

KEYS = {
    "general.architecture": string("tiny"),
    "general.name": string("Tiny 1"),
    "tiny.rope.freq_base": Typed(6, 10000.0),
    "tiny.layers": array(5, [1, 2, 3]),
    "tokenizer.ggml.tokens": array(STRING, ["a", "b"]),
    "tokenizer.chat_template": string("{{ a }}"),
}
LARGE = os.urandom(64 << 10)
TENSORS = {"a.weight": ((2, 4), F32, bytes(range(32))), "b.weight": ((32 << 10,), F16, LARGE)}


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.fixture
def base(tmp_path: Path) -> dict[str, str]:
    return model_fields(ggufs.write(tmp_path / "base.gguf", KEYS, TENSORS))


def differing(a: dict[str, str], b: dict[str, str]) -> set[str]:
    return {name for name in {**a, **b} if a.get(name) != b.get(name)}


# -- of a model file


def test_fields_of_a_model(base: dict[str, str]) -> None:
    """Hyperparameters are readable and in llama.cpp's own words; the rest is digests."""
    digests = {name: base.pop(name) for name in ("tokenizer", "tensor table", "weights")}
    assert base == {
        "architecture": "tiny",
        "tiny.layers": "[1, 2, 3]",
        "tiny.rope.freq_base": "10000.000000",
        "tensor types": "f16 x 1, f32 x 1",
    }
    assert all(len(text) == 32 and int(text, 16) for text in digests.values())


@pytest.mark.parametrize(
    ("keys", "tensors", "names"),
    [
        ({"tiny.rope.freq_base": Typed(6, 5000.0)}, {}, {"tiny.rope.freq_base"}),
        ({"tiny.new": Typed(7, False)}, {}, {"tiny.new"}),
        ({"tiny.layers": array(5, [1, 2, 4])}, {}, {"tiny.layers"}),
        ({"tokenizer.ggml.tokens": array(STRING, ["a", "c"])}, {}, {"tokenizer"}),
        ({"tokenizer.ggml.bos_token_id": u32(1)}, {}, {"tokenizer"}),
        ({"general.architecture": string("tony")}, {}, {"architecture", *list(KEYS)[2:4]}),
        ({"general.name": string("Tiny 2"), "general.url": string("u")}, {}, set()),
        ({"tokenizer.chat_template": string("{{ b }}")}, {}, set()),
        ({}, {"a.weight": ((2, 4), F32, bytes(32))}, {"weights"}),
        ({}, {"a.weight": ((4, 2), F32, bytes(range(32)))}, {"tensor table"}),
        ({}, {"b.weight": ((32 << 10,), F16, changed(LARGE, 0))}, {"weights"}),
        ({}, {"b.weight": ((32 << 10,), F16, changed(LARGE, (64 << 10) - 1))}, {"weights"}),
        ({}, {"b.weight": ((32 << 10,), F16, changed(LARGE, 5000))}, set()),  # between samples
        (
            {},
            {"a.weight": ((2, 4), F16, bytes(16))},
            {"weights", "tensor table", "tensor types"},
        ),
        ({}, {"c.weight": ((1,), F32, bytes(4))}, {"weights", "tensor table", "tensor types"}),
    ],
)
def test_what_differs_is_named(
    keys: dict[str, Typed],
    tensors: dict[str, Any],
    names: set[str],
    base: dict[str, str],
    tmp_path: Path,
) -> None:
    """Each change shows in the field that is called so, and what changes no state in none."""
    path = ggufs.write(tmp_path / "other.gguf", {**KEYS, **keys}, {**TENSORS, **tensors})
    assert differing(base, model_fields(path)) == names


@pytest.mark.parametrize("at", [4096, 5000, 30_000, (64 << 10) - 4097])
def test_all_bytes_of_the_weights(at: int, base: dict[str, str], tmp_path: Path) -> None:
    """Between the samples nothing is seen, unless all is asked for."""
    other = {**TENSORS, "b.weight": ((32 << 10,), F16, changed(LARGE, at))}
    path = ggufs.write(tmp_path / "other.gguf", KEYS, other)
    assert model_fields(path) == base
    assert adapter_digest(path) == adapter_digest(tmp_path / "base.gguf")
    full = model_fields(tmp_path / "base.gguf", full=True)
    assert {name: full[name] for name in base} == base
    assert differing(full, model_fields(path, full=True)) == {"all weights"}
    one, two = (adapter_digest(gguf, full=True) for gguf in (path, tmp_path / "base.gguf"))
    assert one != two


def test_all_bytes_by_hand(tmp_path: Path) -> None:
    """The digest of the names and the SHA-256 of each tensor, as the samples' is."""
    large = bytes(range(256)) * (12 << 10)  # three pieces
    tensors = {"b.weight": ((len(large) // 2,), F16, large), "a.weight": ((1,), F32, bytes(4))}
    path = ggufs.write(tmp_path / "m.gguf", KEYS, tensors)
    expected = hashlib.sha256()
    for name in sorted(tensors):
        expected.update(struct.pack("<Q", len(name)) + name.encode())
        expected.update(hashlib.sha256(tensors[name][2]).digest())
    assert model_fields(path, full=True)["all weights"] == expected.hexdigest()[:32]


def test_the_same_content_elsewhere(base: dict[str, str], tmp_path: Path) -> None:
    """Path, order of keys and tensors, alignment, version and split do not count."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    copy = shutil.copy(tmp_path / "base.gguf", folder / "copy.gguf")
    assert model_fields(copy) == base
    (folder / "link.gguf").symlink_to(copy)
    assert model_fields(folder / "link.gguf") == base
    turned = dict(reversed(KEYS.items())), dict(reversed(TENSORS.items()))
    assert model_fields(ggufs.write(folder / "turned.gguf", *turned, version=2)) == base
    aligned = {**KEYS, "general.alignment": u32(64)}
    path = ggufs.write(folder / "aligned.gguf", aligned, TENSORS, alignment=64)
    assert model_fields(path) == base
    parts = ggufs.split(folder, KEYS, [{name: TENSORS[name]} for name in reversed(TENSORS)])
    assert [model_fields(part) for part in parts] == [base, base]


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_in_the_docs(kind: str, tmp_path: Path) -> None:
    """Another program, with another reader, computes the same digests."""
    path = write_model(tmp_path / "m.gguf", kind, text=True)
    fields, reader = model_fields(path), gguf.GGUFReader(path)

    def packed(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    tokenizer, table, weights = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for name in sorted(name for name in reader.fields if name.startswith("tokenizer.ggml.")):
        # The parts of a field: length and bytes of the key, then the value from its type on.
        tokenizer.update(
            packed(name) + b"".join(p.tobytes() for p in reader.fields[name].parts[2:])
        )
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name):
        shape = [int(size) for size in tensor.shape]
        table.update(packed(tensor.name))
        table.update(struct.pack(f"<II{len(shape)}Q", tensor.tensor_type, len(shape), *shape))
        data, last = tensor.data.tobytes(), int(tensor.n_bytes) - 4096
        pieces = [data[i * last // 3 :][:4096] for i in range(4)] if len(data) > 16384 else [data]
        weights.update(packed(tensor.name) + hashlib.sha256(b"".join(pieces)).digest())
    for name, hashed in (("tokenizer", tokenizer), ("tensor table", table), ("weights", weights)):
        assert fields[name] == hashed.hexdigest()[:32], name


def test_a_long_value_is_a_digest(tmp_path: Path) -> None:
    """Neither a long text nor a long list makes a fingerprint long."""
    keys = {"a.text": string("x" * 5000), "a.list": array(0, [7] * 1025)}
    path = ggufs.write(tmp_path / "m.gguf", {"general.architecture": string("a"), **keys})
    fields = model_fields(path)
    assert fields["a.text"] == "sha256 " + hashlib.sha256(b"x" * 5000).hexdigest()[:32]
    expected = hashlib.sha256(b"\7" * 1025).hexdigest()[:32]
    assert fields["a.list"] == f"1025 values, sha256 {expected}"
    Fingerprint.from_json(Fingerprint(fields).to_json())


def test_a_model_without_an_architecture(tmp_path: Path) -> None:
    """It is read all the same; llama.cpp will say that it is none."""
    assert model_fields(ggufs.write(tmp_path / "m.gguf", {"a.b": u32(1)}))["architecture"] == ""


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    """The same file is not read again, a new one at the same path is."""
    path = ggufs.write(tmp_path / "m.gguf", KEYS, TENSORS)
    before = model_fields(path)
    read = fingerprint.read_model.cache_info().misses
    assert model_fields(path) == before
    assert fingerprint.read_model.cache_info().misses == read
    other = {**TENSORS, "a.weight": ((2, 4), F32, bytes(32))}
    ggufs.write(tmp_path / "new.gguf", KEYS, other).replace(path)
    assert differing(model_fields(path), before) == {"weights"}


def test_a_tensor_that_ends_early(tmp_path: Path) -> None:
    """A truncated download has no fingerprint."""
    path = ggufs.write(tmp_path / "m.gguf", KEYS, TENSORS)
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(TruncatedError, match=r"b\.weight"):
        model_fields(path)


def test_adapters_are_known_by_content(tmp_path: Path) -> None:
    """Weights and settings count, name and path do not."""
    keys = {"general.architecture": string("tiny"), "adapter.lora.alpha": Typed(6, 16.0)}
    tensors = {"a.weight.lora_a": ((2,), F32, bytes(8)), "a.weight.lora_b": ((2,), F32, bytes(8))}
    one = adapter_digest(ggufs.write(tmp_path / "1.gguf", keys, tensors))
    renamed = {**keys, "general.name": string("other")}
    assert adapter_digest(ggufs.write(tmp_path / "2.gguf", renamed, tensors)) == one
    alpha = {**keys, "adapter.lora.alpha": Typed(6, 32.0)}
    assert adapter_digest(ggufs.write(tmp_path / "3.gguf", alpha, tensors)) != one
    weights = {**tensors, "a.weight.lora_b": ((2,), F32, bytes(7) + b"\1")}
    assert adapter_digest(ggufs.write(tmp_path / "4.gguf", keys, weights)) != one


# -- of a state


def test_what_a_state_records() -> None:
    """The kind of memory, and the settings of its caches."""
    state = State("kv", version=11, cells=text(4, 0))
    parsed = layout.parse_whole(state.blob(), version=11)
    assert state_fields(parsed) == {
        "module": "kv",
        "session version": "11",
        "streams": "1",
        "flash attention": "on",
        "type_k": "f16",
        "type_v": "f16",
    }


def test_an_empty_state_records_little() -> None:
    """No cell, no types."""
    parsed = layout.parse_whole(State("kv", version=10, cells=[]).blob(), version=10)
    assert state_fields(parsed) == {"module": "kv", "session version": "10", "streams": "1"}


# -- comparing


SAVED = Fingerprint(
    {
        "architecture": "llama",
        "llama.rope.freq_base": "10000.000000",
        **dict.fromkeys(("tokenizer", "tensor types", "tensor table", "weights"), "ab"),
    },
    {"rope": "the model's own", "adapters": "none", "type_k": "f16", "llama.cpp build": "b1"},
)


def side(drop: str = "", **fields: str) -> Fingerprint:
    """Return *SAVED* with other fields of the context, or without one."""
    context = {name: text for name, text in SAVED.context.items() if name != drop}
    model = {name: text for name, text in SAVED.model.items() if name != drop}
    return Fingerprint(model, {**context, **fields})


def names(differences: list[Difference]) -> list[str]:
    return [difference.name for difference in differences]


def test_the_same_has_no_differences() -> None:
    assert SAVED.differences(SAVED) == []


def test_differences_of_the_model_come_first() -> None:
    """By name, with both values."""
    other = Fingerprint({**SAVED.model, "weights": "cd"}, {**SAVED.context, "type_k": "q8_0"})
    assert SAVED.differences(other) == [("weights", "ab", "cd"), ("type_k", "f16", "q8_0")]


@pytest.mark.parametrize("name", ["weights", "llama.rope.freq_base", "rope", "adapters"])
def test_what_one_side_does_not_know_is_a_difference(name: str) -> None:
    """Either side; and the reason is given where there is one."""
    lacking = side(drop=name)
    value = {**SAVED.model, **SAVED.context}[name]
    assert SAVED.differences(lacking) == [Difference(name, value, "not recorded")]
    assert lacking.differences(SAVED) == [Difference(name, "not recorded", value)]
    known = Fingerprint(lacking.model, lacking.context, {name: "not recorded here"})
    assert SAVED.differences(known) == [Difference(name, value, "not known: not recorded here")]


@pytest.mark.parametrize("name", ["architecture", "weights", "tokenizer", "rope", "adapters"])
def test_what_neither_side_knows_is_a_difference(name: str) -> None:
    """Two that know nothing of it are not the same: strict means that it was compared."""
    lacking = side(drop=name)
    assert lacking.differences(lacking) == [Difference(name, "not recorded", "not recorded")]


def test_two_of_which_nothing_is_known() -> None:
    """With or without hyperparameters, which other models of that shape have too."""
    assert names(Fingerprint().differences(Fingerprint())) == ["model"]
    why = {"model file": "no path", "adapters": "say which", "rope": "say which"}
    bare = Fingerprint({"architecture": "llama"}, {}, why)
    found = bare.differences(bare)
    assert names(found) == ["model file", "adapters", "rope"]
    assert [found.saved for found in found] == [f"not known: {text}" for text in why.values()]


def test_one_reason_for_all_that_is_in_the_file() -> None:
    """Fields of the model that have no reason of their own take that of its file."""
    bare = Fingerprint({"architecture": "llama"}, SAVED.context, {"model file": "no path"})
    assert [str(found.current) for found in SAVED.differences(bare)] == ["not known: no path"] * 5
    no_rope = Fingerprint(SAVED.model, side(drop="rope").context, {"model file": "no path"})
    assert SAVED.differences(no_rope) == [("rope", "the model's own", "not recorded")]


@pytest.mark.parametrize("name", ["type_k", "llama.cpp build"])
def test_what_need_not_be_known(name: str) -> None:
    """What a state records itself, and what does not change its meaning."""
    assert SAVED.differences(side(drop=name)) == side(drop=name).differences(SAVED) == []


def test_all_weights_are_compared_where_the_saved_side_has_them() -> None:
    full = [Fingerprint({**SAVED.model, "all weights": n}, SAVED.context) for n in ("1", "2")]
    assert full[0].differences(full[1]) == [("all weights", "1", "2")]
    assert full[0].differences(SAVED) == [("all weights", "1", "not recorded")]
    assert SAVED.differences(full[0]) == []


def test_the_build_is_no_difference() -> None:
    assert SAVED.differences(side(**{"llama.cpp build": "b2"})) == []


def test_sums_are_compared_where_both_are_told() -> None:
    """Without a file they are all that tells sizes apart; with one they are not needed."""
    one, two = (Fingerprint({**SAVED.model, "parameters": n}, SAVED.context) for n in ("1", "2"))
    assert one.differences(two) == [("parameters", "1", "2")]
    assert one.differences(SAVED) == SAVED.differences(one) == []


def test_nothing_recorded_is_one_difference() -> None:
    """Of a state that came without a fingerprint."""
    assert Fingerprint().differences(SAVED) == [("model", "not recorded", "llama")]
    assert SAVED.differences(Fingerprint()) == [("model", "llama", "not recorded")]


# -- JSON


def test_json_gives_it_back() -> None:
    written = json.loads(json.dumps(SAVED.to_json()))
    assert Fingerprint.from_json(written) == SAVED


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: None,
        lambda value: [value],
        lambda value: {},
        lambda value: {**value, "more": {}},
        lambda value: {**value, "model": None},
        lambda value: {**value, "model": [["a", "b"]]},
        lambda value: {**value, "context": {"a": 1}},
        lambda value: {**value, "context": {1: "a"}},
        lambda value: {**value, "unknown": {"a": None}},
        lambda value: {**value, "unknown": {"a": "x" * 20000}},
        lambda value: {**value, "model": {"x" * 20000: "a"}},
        lambda value: {**value, "model": {str(i): "" for i in range(70000)}},
    ],
)
def test_anything_else_is_refused(damage: Callable[[dict[str, object]], object]) -> None:
    """Types and sizes are checked: it may come from an untrusted file."""
    with pytest.raises(FormatError, match="fingerprint"):
        Fingerprint.from_json(damage(SAVED.to_json()))
