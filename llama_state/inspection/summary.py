"""The description of a state file as plain data, for JSON and for display."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.container import HEAD_PARTS, HEADER
from ..errors import FormatError, StateError
from ..layout import (
    TYPES,
    UNKNOWN_ID,
    Block,
    Cache,
    Cells,
    Compressed,
    Compressor,
    KVCache,
    Layout,
    RecurrentCache,
    Traits,
    is_known,
)
from ..layout.appended import packed_size
from .rows import positions_by_sequence
from .statefile import Digests, StateFile
from .words import problem_text, ranges

Data: TypeAlias = "dict[str, Any]"

LETTERS = {"k": "K", "v": "V", "r": "R", "p": "P", "s": "S", "score": "score"}


def describe(file: StateFile) -> Data:
    """Return the description of a file as dictionaries, lists, strings and numbers."""
    return {
        "path": file.path,
        "nbytes": file.nbytes,
        "kind": file.kind,
        "version": file.version,
        "session_versions": list(file.session_versions),
        "tokens": _tokens(file),
        "state": None if file.layout is None else describe_layout(file.layout),
        "leading_cells": _leading_cells(file.leading_cells),
        "restore_points": [
            {
                "n_tokens": point.n_tokens,
                "pos_min": point.span.first,
                "pos_max": point.span.last,
                "nbytes": point.nbytes,
            }
            for point in file.restore_points
        ],
        "bytes": bytes_by_part(file),
        "logits": describe_logits(file.checkpoint),
        "fingerprint": file.checkpoint.fingerprint.to_json() if file.checkpoint else None,
        "meta": file.checkpoint.meta if file.checkpoint else None,
        "digests": describe_digests(file.digests),
        "notes": list(_notes(file)),
        "problem": describe_problem(file.problem),
    }


def describe_layout(layout: Layout) -> Data:
    """Return a :class:`~llama_state.layout.Layout` as plain data."""
    return {
        "architecture": layout.arch,
        "module": layout.module,
        "alternatives": [traits_text(traits) for traits in layout.alternatives],
        "partial": layout.partial,
        "sequence": layout.source,
        "sequences": [_sequence(layout, seq_id) for seq_id in layout.sequences],
        "caches": [_cache(cache) for cache in layout.caches],
    }


def describe_problem(problem: StateError | None) -> Data | None:
    """Return an error as plain data."""
    if problem is None:
        return None
    offset = problem.offset if isinstance(problem, FormatError) else None
    return {"error": type(problem).__name__, "text": problem_text(problem), "offset": offset}


def describe_logits(checkpoint: Checkpoint | None) -> Data | None:
    """Return the sequence and the number of a checkpoint's logits."""
    if checkpoint is None or checkpoint.logits is None:
        return None
    return {"sequence": checkpoint.logits_of, "count": len(checkpoint.logits)}


def describe_digests(digests: Digests | None) -> Data | None:
    """Return the digests of a checkpoint as plain data."""
    if digests is None:
        return None
    return {
        "kind": "HMAC-SHA256" if digests.keyed else "XXH3-128",
        "keyed": digests.keyed,
        "compressed": digests.compressed,
        "count": len(digests.parts),
        "damaged": [
            {"name": part.name, "offset": part.offset, "nbytes": part.stored}
            for part in digests.damaged
        ],
    }


def bytes_by_part(file: StateFile) -> dict[str, int]:
    """Return how many bytes each part of a file takes; their sum is the size of the file."""
    parts: dict[str, int] = {}
    if file.digests:
        parts["metadata"] = file.digests.parts[0].stored - HEADER.size
        parts["tokens"] = 4 * _n_words(file)
        if file.checkpoint and file.checkpoint.logits is not None:
            parts["logits"] = file.checkpoint.logits.nbytes
        if file.digests.compressed:
            stored = sum(part.stored for part in file.digests.parts[len(HEAD_PARTS) :])
            parts["state, compressed"] = stored
    elif file.state_offset:
        parts["tokens"] = file.state_offset - 12
    if file.layout and file.state_offset is not None:
        for name, nbytes in _tensor_bytes(file.layout):
            parts[name] = parts.get(name, 0) + nbytes
    if file.restore_points and file.state_offset is not None:
        parts["restore points"] = _points_size(file)
    rest = file.nbytes - sum(parts.values())
    if file.state_offset is None:
        return {**parts, "heads and digests": rest}
    return {"heads and cells" if file.layout else "not read": rest, **parts}


def _points_size(file: StateFile) -> int:
    """Return what restore points take: in a checkpoint their heads are metadata."""
    if file.digests:
        return sum(point.nbytes for point in file.restore_points)
    return packed_size(file.restore_points)


def _n_words(file: StateFile) -> int:
    """Return the length of the token list of a checkpoint, packed or not."""
    checkpoint = file.checkpoint
    return len(checkpoint.packed_tokens or checkpoint.tokens) if checkpoint else 0


def _tensor_bytes(layout: Layout) -> Iterator[tuple[str, int]]:
    for cache in layout.caches:
        for name, blocks in blocks_of(cache).items():
            yield LETTERS[name], sum(block.nbytes for block in blocks)


def blocks_of(cache: Cache) -> dict[str, tuple[Block, ...]]:
    """Return the blocks of a cache by kind of rows, those of all streams together."""
    if isinstance(cache, KVCache):
        k = tuple(chain.from_iterable(stream.k for stream in cache.streams))
        return {"k": k, "v": tuple(chain.from_iterable(stream.v for stream in cache.streams))}
    if isinstance(cache, RecurrentCache):
        return {"r": cache.r, "p": cache.p, "s": cache.s}
    if isinstance(cache, Compressed):
        return {"k": cache.k}
    return {"k": cache.kv, "score": cache.score}


def traits_text(traits: Traits) -> str:
    """Return the kind of memory and its special properties."""
    flags = {"K only": traits.k_only, "M-RoPE": traits.ext, "n-grams": traits.ple}
    return ", ".join([traits.module, *(name for name, is_set in flags.items() if is_set)])


def _tokens(file: StateFile) -> Data | None:
    if not file.has_tokens:
        return None
    media = [
        {
            "start": chunk.start,
            "n_tokens": chunk.n_tokens,
            "kind": chunk.kind,
            "grid": None if chunk.grid is None else list(chunk.grid),
            "id": chunk.id,
        }
        for chunk in file.media
    ]
    return {
        "count": len(file.tokens),
        "first": list(file.tokens[:16]),
        "packed": _is_packed(file),
        "packed_version": file.slot.version if file.slot else None,
        "media": media,
    }


def _is_packed(file: StateFile) -> bool:
    return file.kind == "slot file" or bool(file.checkpoint and file.checkpoint.packed_tokens)


def _leading_cells(streams: Sequence[Cells]) -> list[Data]:
    """Return the positions of each sequence in the cells that could be read."""
    held = positions_by_sequence(streams)
    return [{"id": seq_id, **_held(positions)} for seq_id, positions in held.items()]


def _held(positions: Sequence[int]) -> Data:
    return {"cells": len(positions), "positions": [list(run) for run in ranges(positions)]}


def _sequence(layout: Layout, seq_id: int) -> Data:
    caches: Data = {}
    for cache in layout.caches:
        if positions := [p for cells in cache.cells for p in cells.positions_of(seq_id)]:
            caches[cache.name] = _held(positions)
    span = layout.spans[seq_id]
    return {
        "id": None if seq_id == UNKNOWN_ID else seq_id,
        "pos_min": span.first,
        "pos_max": span.last,
        "rewind_min": layout.rewind_min(seq_id),
        "caches": caches,
    }


def _cache(cache: Cache) -> Data:
    about: Data = {"name": cache.name, "offset": cache.offset, "nbytes": cache.nbytes}
    if isinstance(cache, KVCache):
        stream = next((stream for stream in cache.streams if len(stream.cells)), cache.streams[0])
        about |= {
            "kind": "kv",
            "n_layer": stream.n_layer,
            "v_trans": stream.v_trans,
            "n_rot_k": stream.n_rot_k,
            "n_rot_v": stream.n_rot_v,
            "m_rope": stream.cells.ext_words > 0,
        }
        rows = {"k": stream.k, "v": stream.v}
    elif isinstance(cache, RecurrentCache):
        about |= {"kind": "recurrent", "n_layer": len(cache.r)}
        rows = blocks_of(cache)
    elif isinstance(cache, Compressed):
        about |= {"kind": "compressed", "n_layer": len(cache.layers), "n_rows": cache.n_rows}
        rows = blocks_of(cache)
    else:
        about |= {"kind": "compressor", "n_layer": len(cache.layers), "ratio": cache.ratio}
        rows = blocks_of(cache)
    if isinstance(cache, (Compressed, Compressor)):
        about |= {"layers": list(cache.layers), "streams": cache.n_stream}
    else:
        about["cells"] = [len(cells) for cells in cache.cells]
        about["shared_cells"] = sum(_shared(cache))
    about["rows"] = {name: _rows(blocks) for name, blocks in rows.items() if blocks}
    return about


def _shared(cache: Cache) -> Iterator[int]:
    """Yield the number of cells with several owners in each stream."""
    for cells in cache.cells:
        owned = sum(map(len, cells.owners.values()))
        if owned == len(cells):
            yield 0
            continue
        seen: dict[int, int] = {}
        for index in chain.from_iterable(cells.owners.values()):
            seen[index] = seen.get(index, 0) + 1
        yield sum(owners > 1 for owners in seen.values())


def _rows(blocks: Sequence[Block]) -> list[Data]:
    """Return type and size of the rows, one entry for consecutive layers that are alike."""
    runs: list[Data] = []
    for layer, block in enumerate(blocks):
        kind = TYPES[block.type_id]
        row = {"type": kind.name, "values": kind.values(block.row), "nbytes": block.row}
        if runs and {name: runs[-1][name] for name in row} == row:
            runs[-1]["last"] = layer
        else:
            runs.append({"first": layer, "last": layer, **row})
    return runs


def _notes(file: StateFile) -> Iterator[str]:
    """Yield what the bytes leave open."""
    layout = file.layout
    if layout is None:
        return
    if file.kind in ("whole blob", "sequence blob"):
        versions = " or ".join(map(str, file.session_versions))
        yield f"a blob records no version: it reads as session version {versions}"
    if not layout.arch and not layout.traits.arch:
        yield "the state of a sequence names no architecture: the kind of memory is what fits it"
    if layout.module == "none" and not layout.arch:
        yield "it is empty: of a model without memory, or cut off after its tokens"
    if layout.arch and not is_known(layout.arch):
        yield "the architecture is not known: the kind of memory is what fits the state"
    if file.doubt:
        yield file.doubt
    if layout.alternatives:
        others = "; ".join(map(traits_text, layout.alternatives))
        yield f"the bytes can also be read as: {others}"
    if file.kind == "sequence blob" and layout.module in ("kv", "recurrent"):
        yield "a partial state of a model with more caches would read the same"
