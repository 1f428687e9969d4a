"""Files of an older llama_state come back, and saved again they are the same bytes.

The files in ``golden`` were made once and must not be made anew: what they are of is in its README.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state.testing import write_model, write_probe
from llama_state.testing.conformance import NMSE_LIMIT, nmse
from tests.layout.statefiles import GOLDEN

STORES = {"v11-lfm2": None, "v11-keyed": b"golden" * 3}
KEYS = {"v10": None, "v11-keyed": b"golden" * 3}


@pytest.mark.parametrize("name", KEYS)
def test_a_checkpoint_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    """Container, metadata and digests have not changed, plain and with a key."""
    path, key = GOLDEN / f"{name}.checkpoint", KEYS[name]
    checkpoint = ls.Checkpoint.load(path, key=key)
    checkpoint.save(tmp_path / "again", key=key)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_compressed_checkpoint_is_read_as_it_was() -> None:
    """Its frames are of the bytes as they are, not of byte planes as today's."""
    compressed, plain = (
        ls.Checkpoint.load(GOLDEN / f"{name}.checkpoint") for name in ("v10-compressed", "v10")
    )
    assert compressed == plain
    assert compressed.payload == plain.payload


@pytest.fixture(params=["", "-lfm2"], ids=["plain", "hybrid"])
def ctx_and_name(
    request: pytest.FixtureRequest, library: ls.Library, tmp_path: Path
) -> Iterator[tuple[ls.Context, str]]:
    """A context like the one that was saved, and how its files begin on this libllama."""
    path, options = tmp_path / "model.gguf", {}
    if request.param:
        write_model(path, "lfm2-dense")
    else:
        write_probe(path)
        options = {"n_seq_max": 2, "kv_unified": True}
    with ls.Model(path, library) as model, _context(model, **options) as ctx:
        yield ctx, f"v{library.session_version}{request.param}"


def _context(model: ls.Model, **options: Any) -> ls.Context:
    return model.context(n_ctx=256, n_threads=1, **options)


@pytest.mark.libllama
def test_a_session_file_is_saved_as_it_was(
    ctx_and_name: tuple[ls.Context, str], tmp_path: Path
) -> None:
    """A whole state, loaded and saved again: the file, and as bytes its end."""
    ctx, name = ctx_and_name
    golden = (GOLDEN / f"{name}.session").read_bytes()
    tokens = ctx.load_state(GOLDEN / f"{name}.session").tokens
    ctx.save_state(tmp_path / "again", tokens)
    assert (tmp_path / "again").read_bytes() == golden
    assert ctx.snapshot() == golden[12 + 4 * len(tokens) :]


@pytest.mark.libllama
def test_a_sequence_file_is_saved_as_it_was(
    ctx_and_name: tuple[ls.Context, str], tmp_path: Path
) -> None:
    """A sequence, loaded and saved again."""
    ctx, name = ctx_and_name
    tokens = ctx.seq_load_state(GOLDEN / f"{name}.sequence").tokens
    ctx.seq_save_state(tmp_path / "again", 0, tokens)
    assert (tmp_path / "again").read_bytes() == (GOLDEN / f"{name}.sequence").read_bytes()


@pytest.mark.libllama
@pytest.mark.parametrize("name", STORES)
def test_a_prefix_store_is_read_as_it_was(name: str, library: ls.Library, tmp_path: Path) -> None:
    """A prompt is found, with its logits; on a build of its version it is remembered as it was."""
    tokens, key = [1, 2, 3], STORES[name]
    path = write_model(tmp_path / "model.gguf", "lfm2-dense")
    shutil.copytree(GOLDEN / f"{name}.store", tmp_path / "old")
    with (
        ls.Model(path, library) as model,
        _context(model) as ctx,
        _context(model) as fresh,
        ls.PrefixStore(tmp_path / "old", capacity_bytes=1 << 20, key=key) as old,
        ls.PrefixStore(tmp_path / "new", capacity_bytes=1 << 20, key=key) as new,
    ):
        assert old.prefill(ctx, tokens).n_past == len(tokens)
        fresh.decode(tokens)
        assert nmse(ctx.logits(), fresh.logits()) < NMSE_LIMIT
        new.remember(ctx, tokens)
        files, again = (
            {path.name: path.read_bytes() for path in (tmp_path / place).glob("??/*")}
            for place in ("old", "new")
        )
        assert files.keys() == again.keys()
        assert files == again or library.session_version != 11
        for each in (ctx, fresh):
            each.decode([4])
        assert nmse(ctx.logits(), fresh.logits()) < NMSE_LIMIT


@pytest.mark.libllama
def test_a_model_is_known_by_what_it_was_known_by(library: ls.Library, tmp_path: Path) -> None:
    """The model of an old checkpoint is told from its file as it was: no field is new or other."""
    golden = ls.Checkpoint.load(GOLDEN / "v10.checkpoint")
    path = write_model(tmp_path / "model.gguf", "lfm2-dense")
    with ls.Model(path, library) as model, _context(model) as ctx:
        assert ctx.fingerprint.model == golden.fingerprint.model
