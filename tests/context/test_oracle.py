"""The oracle of the state machine: that it sees one stale cell, which the logits need not show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.inspection import StateFile, inspect_file
from llama_state.inspection.rows import Tensor, layers, places, row_bytes
from tests.context.oracle import DEPENDS_ON_CELLS, Text, check, length, piece

pytestmark = pytest.mark.libllama

# Pieces as the machine makes them; together as long as any sequence there.
SIZES = (40, 37, 1, 2)


def text_of(model: ls.Model, first: int) -> Text:
    """A text with all tokens different from those of other *first* tokens."""
    text: Text = ()
    for size in SIZES:
        start = first + length(text)
        text += piece(*(7 * (start + i) % model.n_vocab for i in range(size)))
    return text


def opened(model: ls.Model) -> ls.Context:
    return model.context(n_ctx=256, flash_attn=True, n_threads=1)


def saved(model: ls.Model, text: Text, path: Path) -> StateFile:
    with opened(model) as context:
        for part in text:
            context.decode(part.tokens)
        context.seq_save_state(path, durable=False)
    return inspect_file(path, model=model.path)


def stale_files(sound: StateFile, other: StateFile, folder: Path) -> Iterator[tuple[str, Path]]:
    """For each cache: a file in which one cell has what other tokens left there."""
    assert sound.layout is not None
    assert other.layout is not None
    for cache, left in zip(sound.layout.caches, other.layout.caches, strict=True):
        pairs = [
            (layer.streams[0], source.streams[0])
            for layer, source in zip(layers(cache), layers(left), strict=True)
        ]
        rows = [
            row
            for _, row in sorted(places(cache, alone=True).values())
            if any(there(sound, one, row) != there(other, stale, row) for one, stale in pairs)
        ]
        if not rows:  # no layer of this model is in this cache
            continue
        row = rows[len(rows) // 2]
        changed = bytearray(Path(sound.path).read_bytes())
        for tensor, stale in pairs:
            assert tensor is not None
            at = (sound.state_offset or 0) + tensor.offset + tensor.row * row
            changed[at : at + tensor.row] = there(other, stale, row)
        path = folder / f"stale {cache.name}"
        path.write_bytes(changed)
        yield cache.name, path


def there(file: StateFile, tensor: Tensor | None, row: int) -> bytes:
    assert tensor is not None
    assert not tensor.transposed
    return row_bytes(file.state, tensor, row)


def test_it_sees_one_stale_cell_of_eighty(model: ls.Model, tmp_path: Path) -> None:
    """In each cache of each kind, whether the next logits depend on it or not."""
    text = text_of(model, 1)
    sound = saved(model, text, tmp_path / "sound")
    other = saved(model, text_of(model, 8), tmp_path / "other")
    with opened(model) as context, opened(model) as oracle:
        context.seq_load_state(sound.path)
        check(oracle, context, 0, text, model, tmp_path)
    stale = dict(stale_files(sound, other, tmp_path))
    assert stale
    for cache, path in stale.items():
        if (model.arch, cache) in DEPENDS_ON_CELLS:
            continue
        with opened(model) as context, opened(model) as oracle:
            context.seq_load_state(path)
            with pytest.raises(AssertionError, match=f"cache='{cache}'"):
                check(oracle, context, 0, text, model, tmp_path)
