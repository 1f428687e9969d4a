"""The description of a state file as text for a terminal of 80 columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from .._io.arguments import checked
from ..layout import Module
from .statefile import StateFile
from .summary import LETTERS, Data, describe
from .words import Fact, count, fact, first_few, ranges_text, size

_NAMED = ("architecture", "tensor types", "weights")
_LONG = 400
_MOST_DAMAGED = 20
_MEMORY: Mapping[Module, str] = {
    "none": "none (encoders have none)",
    "kv": "one KV cache",
    "iswa": "a KV cache, and one of sliding windows",
    "recurrent": "recurrent states",
    "hybrid": "a KV cache and recurrent states",
    "hybrid-iswa": "a KV cache, one of sliding windows, and recurrent states",
    "hybrid-idx": "a KV cache, recurrent states, and an indexer's cache",
    "dsa": "a KV cache and an indexer's cache",
    "dsa-iswa": "a KV cache, an indexer's, and one of sliding windows",
    "msa": "a KV cache and an indexer's cache",
    "dsv4": "KV caches, compressed ones, and their compressors",
}


@checked
def text(file: StateFile) -> str:
    """Return the description of a file as text."""
    about = describe(file)
    lines = (fact(key, told, indent=indent) for key, told, indent in facts(about))
    return "\n".join([about["path"], *chain.from_iterable(lines)])


def facts(about: Data) -> Iterator[Fact]:
    """Yield what a description says, fact by fact, but for the path of the file."""
    yield from _head(about)
    if about["state"]:
        yield from _memory(about["state"])
    yield from _points(about["restore_points"])
    yield from _salvaged(about["leading_cells"])
    yield from _tail(about)


def _head(about: Data) -> Iterator[Fact]:
    version = about["version"]
    kind = about["kind"] if version is None else f"{about['kind']}, version {version}"
    if about["kind"] == "checkpoint" and about["session_versions"]:
        kind += f" (of a state of session version {about['session_versions'][0]})"
    yield Fact("kind", f"{kind}, {size(about['nbytes'])}")
    tokens = about["tokens"]
    if tokens is None:
        return
    if tokens["packed"] and tokens["packed_version"] is None:
        yield Fact("tokens", "packed by llama-server, not readable")
        return
    listed = first_few([t if t >= 0 else "media" for t in tokens["first"]])
    summary = f"{tokens['count']:,}"
    if tokens["packed"]:
        summary += ", packed by llama-server"
    yield Fact("tokens", f"{summary}: {listed}" if listed else summary)
    for chunk in tokens["media"]:
        grid = "" if chunk["grid"] is None else f" ({chunk['grid'][0]} x {chunk['grid'][1]})"
        name = "" if not chunk["id"] else f", id {chunk['id'][:24]}"
        where = f"from token {chunk['start']:,}: {count(chunk['n_tokens'], 'token')}{grid}{name}"
        yield Fact("", f"{chunk['kind'] or 'media'} {where}")


def _points(points: list[Data]) -> Iterator[Fact]:
    for i, point in enumerate(points):
        held = f"positions {point['pos_min']:,} to {point['pos_max']:,}"
        yield Fact(
            "" if i else "restore points",
            f"after {count(point['n_tokens'], 'token')}: {held}, {size(point['nbytes'])}",
        )


def _memory(state: Data) -> Iterator[Fact]:
    if state["architecture"]:
        yield Fact("architecture", state["architecture"])
    partial = ", partial" if state["partial"] else ""
    yield Fact("memory", f"{state['module']}{partial}: {_MEMORY[state['module']]}")
    for cache in state["caches"]:
        yield Fact(f"cache {cache['name']}", "; ".join(_cache_facts(cache)))
        for name, runs in cache["rows"].items():
            yield Fact(LETTERS[name], _rows_text(runs), indent=2)
    if not state["sequences"]:
        yield Fact("sequences", "none: the state is empty")
    for sequence in state["sequences"]:
        name = "not named" if sequence["id"] is None else f"sequence {sequence['id']}"
        yield Fact(name, "; ".join(_sequence_facts(sequence)))


def _cache_facts(cache: Data) -> Iterator[str]:
    yield size(cache["nbytes"])
    if "cells" in cache:
        cells = sum(cache["cells"])
        shared = f", {cache['shared_cells']:,} shared" if cache["shared_cells"] else ""
        yield count(cells, "cell") + shared
        if len(cache["cells"]) > 1:
            listed = first_few([f"{number:,}" for number in cache["cells"]], most=8)
            yield f"{len(cache['cells'])} streams ({listed})"
    else:
        yield count(cache["streams"], "stream")
        if "n_rows" in cache:
            yield count(cache["n_rows"], "row")
    if cache["n_layer"] is not None:
        yield count(cache["n_layer"], "layer")
    if cache.get("m_rope"):
        yield "M-RoPE"
    if cache.get("v_trans"):
        yield "V transposed (flash attention off)"
    rotated = [name for name in "kv" if cache.get(f"n_rot_{name}")]
    if rotated:
        yield " and ".join(map(str.upper, rotated)) + " recorded as rotated"


def _rows_text(runs: Sequence[Data]) -> str:
    if len(runs) == 1:
        return _row_text(runs[0])
    texts = [f"{ranges_text([(run['first'], run['last'])])}: {_row_text(run)}" for run in runs]
    return "layers " + "; ".join(texts[:6]) + ("; ..." if len(texts) > 6 else "")


def _row_text(run: Data) -> str:
    return f"{run['type']}, {run['values']:,} values ({run['nbytes']:,} bytes) a row"


def _salvaged(sequences: Sequence[Data]) -> Iterator[Fact]:
    for held in sequences:
        text = f"{_cells_text(held)}; tensors damaged or cut off"
        yield Fact(f"sequence {held['id']}", text)


def _cells_text(held: Data) -> str:
    runs = [tuple(run) for run in held["positions"]]
    words = "positions" if runs[0] != runs[-1] or runs[0][0] != runs[0][1] else "position"
    return f"{count(held['cells'], 'cell')}, {words} {ranges_text(runs)}"


def _sequence_facts(sequence: Data) -> Iterator[str]:
    """Yield the cells of a sequence, one text for all caches in which they are the same."""
    caches: dict[str, list[str]] = {}
    for name, held in sequence["caches"].items():
        caches.setdefault(_cells_text(held), []).append(name)
    for cells, names in caches.items():
        yield cells if len(caches) == 1 else f"{', '.join(names)}: {cells}"


def _tail(about: Data) -> Iterator[Fact]:
    parts = [f"{name} {size(nbytes)}" for name, nbytes in about["bytes"].items() if nbytes]
    yield Fact("bytes", ", ".join(parts))
    yield from _trust(about)
    for note in about["notes"]:
        yield Fact("note", note)
    if about["problem"]:
        yield Fact("PROBLEM", about["problem"]["text"])


def _trust(about: Data) -> Iterator[Fact]:
    """Yield what the state belongs to and what its digests show."""
    if about["logits"]:
        yield Fact("logits", f"{about['logits']['count']:,}, of sequence {_of(about)}")
    if about["meta"]:
        yield Fact("meta", json.dumps(about["meta"], ensure_ascii=False)[:_LONG])
    if about["kind"] != "checkpoint":
        yield Fact("fingerprint", "none: native states do not name their model")
        yield Fact("digests", "none: native states have no checksums")
        return
    if about["fingerprint"]:
        yield from _fingerprint(about["fingerprint"])
    if digests := about["digests"]:
        state = f"{len(digests['damaged'])} DAMAGED" if digests["damaged"] else "all sound"
        keyed = ", authenticated with the key" if digests["keyed"] else ", without a key"
        yield Fact("digests", f"{digests['count']:,} {digests['kind']}{keyed}: {state}")
        for part in digests["damaged"][:_MOST_DAMAGED]:
            where = f"{part['name']}: {size(part['nbytes'])} at byte {part['offset']:,}"
            yield Fact("", where)


def _of(about: Data) -> str:
    seq_id = about["logits"]["sequence"]
    return "unknown" if seq_id is None else str(seq_id)


def _fingerprint(fingerprint: Data) -> Iterator[Fact]:
    model, context, unknown = (fingerprint[name] for name in ("model", "context", "unknown"))
    if not (model or context):
        yield Fact("fingerprint", "empty: it does not record the model")
        return
    named = [f"{name} {model[name]}" for name in _NAMED if name in model]
    rest = len(model) - len(named)
    if rest:
        named.append(f"and {count(rest, 'more field')} of the model")
    yield Fact("fingerprint", "; ".join(named))
    if context:
        yield Fact("settings", "; ".join(f"{name} {text}" for name, text in context.items()))
    for name, why in unknown.items():
        yield Fact("not known", f"{name}: {why}")
