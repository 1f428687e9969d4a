"""What ``compress=True`` saves of the states of a real model, and how fast both ways are.

    python benchmarks/byte_planes.py MODEL.gguf [--text FILE] [--tokens N] [--rounds N]

The model reads a text, in contexts of several cache types, and the state of each is compressed
chunk by chunk as a checkpoint does it: with zstd alone, as files before byte planes were, and with
byte planes before it. One thread, in memory, each way in turns. Needs the extra ``zstd`` and the
libllama that ``load_library()`` finds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from _timing import MIB, Timing, Way, alternate

import llama_state as ls
from llama_state.checkpoint import compression
from llama_state.checkpoint.container import CHUNK, KEEP_BELOW

# (type of K and V, flash attention): without it V is transposed.
CONFIGURATIONS = (("f32", True), ("f16", True), ("f16", False), ("bf16", True), ("q8_0", True))
TEXT = Path(__file__).resolve().parents[1] / "docs" / "guide.md"
LINE = "| {:<10} | {:>10} | {:<6} | {:>6} | {:>10} | {:>10} |"
HEAD = ("cache", "state, MiB", "planes", "saved", "write, MiB/s", "read, MiB/s")

Chunks = list[bytes]
Codec = tuple[Callable[[bytes], bytes], Callable[[bytes, int], object]]


def codecs() -> dict[str, Codec]:
    """Return how a chunk is compressed and decompressed, without and with planes."""
    import zstandard

    alone = zstandard.ZstdCompressor(level=compression.LEVEL).compress
    return {
        "no": (alone, partial(compression.decompress, planes=False)),
        "yes": (compression.compress, partial(compression.decompress, planes=True)),
    }


def state_of(model: ls.Model, tokens: Sequence[int], cache_type: str, flash: bool) -> bytes:
    """Return the state of a context that has decoded *tokens*."""
    options = {"type_k": cache_type, "type_v": cache_type, "flash_attn": flash}
    with model.context(n_ctx=len(tokens) + 64, **options) as ctx:  # type: ignore[arg-type]
        ctx.decode(tokens)
        return bytes(ctx.snapshot())


def measure(state: bytes, rounds: int) -> Iterator[tuple[str, float, Timing, Timing]]:
    """Yield for each codec its name, the share that it saves, and how long both ways take."""
    chunks = [state[start : start + CHUNK] for start in range(0, len(state), CHUNK)]
    ways, saved = [], {}
    for name, (pack, unpack) in codecs().items():
        frames = [pack(chunk) for chunk in chunks]
        pairs = list(zip(frames, chunks, strict=True))
        if any(bytes(unpack(frame, len(chunk))) != chunk for frame, chunk in pairs):  # type: ignore[call-overload]
            raise ls.FormatError("a chunk does not come back")
        stored = sum(
            len(frame) if len(frame) < KEEP_BELOW * len(chunk) else len(chunk)
            for frame, chunk in pairs
        )
        saved[name] = 1 - stored / len(state)
        ways.append(Way(name, "write", partial(_write, pack, chunks)))
        ways.append(Way(name, "read", partial(_read, unpack, pairs)))
    timings = alternate(
        [(len(state), ways)], rounds, section="compression", configuration="one thread"
    )
    for write, read in zip(timings[::2], timings[1::2], strict=True):
        yield write.way, saved[write.way], write, read


def _write(pack: Callable[[bytes], bytes], chunks: Chunks) -> None:
    for chunk in chunks:
        pack(chunk)


def _read(unpack: Callable[[bytes, int], object], pairs: list[tuple[bytes, bytes]]) -> None:
    for frame, chunk in pairs:
        unpack(frame, len(chunk))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--text", type=Path, default=TEXT, help="what it reads (docs/guide.md)")
    parser.add_argument("--tokens", type=int, default=1500, help="the most of it to read (1500)")
    parser.add_argument("--rounds", type=int, default=5, help="runs that are measured (5)")
    options = parser.parse_args(arguments)
    with ls.Model(options.model) as model:
        tokens = model.tokenize(options.text.read_text(encoding="utf-8"))[: options.tokens]
        print(f"{len(tokens)} tokens\n")
        print(LINE.format(*HEAD))
        print("|---" * len(HEAD) + "|")
        for cache_type, flash in CONFIGURATIONS:
            state = state_of(model, tokens, cache_type, flash)
            name = cache_type if flash else f"{cache_type}, V^T"
            for planes, saved, write, read in measure(state, options.rounds):
                speeds = (f"{len(state) / MIB / timing.median:.0f}" for timing in (write, read))
                size = f"{len(state) / MIB:.1f}"
                print(LINE.format(name, size, planes, f"{saved:.1%}", *speeds), flush=True)


if __name__ == "__main__":
    main()
