"""GGUF files made byte by byte: keys and tensors as a test wants them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
F32, F16 = 0, 1
SIZES = {F32: 4, F16: 2}


class Typed:
    """A value with its GGUF type; *item* makes it an array."""

    def __init__(self, kind: int, value: object, item: int | None = None) -> None:
        self.kind, self.value, self.item = kind, value, item

    def packed(self) -> bytes:
        if self.item is None:
            return struct.pack("<I", self.kind) + plain(self.kind, self.value)
        values: Sequence[object] = self.value  # type: ignore[assignment]
        head = struct.pack("<IIQ", ARRAY, self.item, len(values))
        return head + b"".join(plain(self.item, value) for value in values)


def string(value: str) -> Typed:
    return Typed(STRING, value)


def u32(value: int) -> Typed:
    return Typed(4, value)


def array(item: int, values: Sequence[object]) -> Typed:
    return Typed(ARRAY, values, item)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def plain(kind: int, value: object) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + NUMBERS[kind], value)  # type: ignore[arg-type]


def build(
    keys: Mapping[str, Typed],
    tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """Build the bytes of a file; a tensor is (shape, type, data)."""
    table, data = b"", b""
    for name, (shape, kind, own) in (tensors or {}).items():
        table += text(name) + struct.pack("<I", len(shape))
        table += b"".join(struct.pack("<Q", size) for size in shape)
        table += struct.pack("<IQ", kind, len(data))
        data += own + bytes(-len(own) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors or {}), len(keys))
    head += b"".join(text(name) + value.packed() for name, value in keys.items()) + table
    return head + (bytes(-len(head) % alignment) + data if tensors else b"")


def write(path: Path, *args: object, **options: object) -> Path:
    path.write_bytes(build(*args, **options))  # type: ignore[arg-type]
    return path


def split(
    folder: Path,
    keys: Mapping[str, Typed],
    parts: Sequence[Mapping[str, tuple[tuple[int, ...], int, bytes]]],
) -> list[Path]:
    """Write the files of a split model, as llama.cpp's gguf-split does."""
    total = sum(map(len, parts))
    paths = []
    for index, tensors in enumerate(parts):
        own = {
            "split.no": Typed(2, index),
            "split.count": Typed(2, len(parts)),
            "split.tensors.count": Typed(5, total),
        }
        path = folder / f"model-{index + 1:05}-of-{len(parts):05}.gguf"
        paths.append(write(path, {**(keys if index == 0 else {}), **own}, tensors))
    return paths


def parts_of(path: Path) -> tuple[dict[str, Typed], dict[str, tuple[tuple[int, ...], int, bytes]]]:
    """Read the keys and tensors of a file, to be changed and built again."""
    reader = gguf.GGUFReader(path)
    keys = {
        name: Typed(int(field.types[0]), field.contents(), *map(int, field.types[1:]))
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {
        tensor.name: (tuple(map(int, tensor.shape)), int(tensor.tensor_type), tensor.data.tobytes())
        for tensor in reader.tensors
    }
    return keys, tensors


def adapter(path: Path, seed: int = 0, alpha: float = 16.0) -> Path:
    """Write a LoRA adapter for the first query matrix of the plain model."""
    values = np.random.default_rng(seed).standard_normal(256, np.float32).tobytes()
    keys = {
        "general.architecture": string("llama"),
        "general.type": string("adapter"),
        "adapter.type": string("lora"),
        "adapter.lora.alpha": Typed(6, alpha),
    }
    name = "blk.0.attn_q.weight"
    tensors = {
        f"{name}.lora_{end}": ((256, 1)[:: 1 - 2 * (end == "b")], F32, values) for end in "ab"
    }
    return write(path, keys, tensors)


def half(path: Path, target: Path) -> Path:
    """Write the same weights with matrices as f16."""
    keys, tensors = parts_of(path)
    narrow = {
        name: (shape, F16, np.frombuffer(data, "<f4").astype("<f2").tobytes())
        if len(shape) == 2 and kind == F32
        else (shape, kind, data)
        for name, (shape, kind, data) in tensors.items()
    }
    return write(target, keys, narrow)
