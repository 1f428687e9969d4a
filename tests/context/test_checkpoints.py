"""Checkpoints of real contexts: what belongs comes back, what does not is refused untouched."""

from __future__ import annotations

import shutil
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

import llama_state as ls
from llama_state.checkpoint.conversion import converted
from llama_state.layout import SEQUENCE_VERSION
from llama_state.testing.conformance import nmse
from llama_state.testing.models import write_model
from tests.context.c_files import Native
from tests.layout import ggufs
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama

TOKENS = (1, 2, 3, 5, 8, 13, 21, 34)
SESSION = LIBRARY.session_version
BOUND = 1e-5


def filled(ctx: ls.Context) -> ls.Context:
    ctx.decode(TOKENS, 0)
    ctx.decode(TOKENS[::-1], 1)
    return ctx


def context(model: ls.Model, **options: Any) -> ls.Context:
    return model.context(**{"n_ctx": 512, "n_seq_max": 2, **options})


def saved(checkpoint: ls.Checkpoint, path: Path) -> ls.Checkpoint:
    checkpoint.save(path)
    return ls.Checkpoint.load(path)


def rebuilt(checkpoint: ls.Checkpoint, **changes: Any) -> ls.Checkpoint:
    """The same checkpoint but for *changes*."""
    parts = {
        "kind": checkpoint.kind,
        "session_version": checkpoint.session_version,
        "source": checkpoint.source,
        "tokens": checkpoint.tokens,
        "fingerprint": checkpoint.fingerprint,
        "meta": checkpoint.meta,
    }
    return ls.Checkpoint(checkpoint.payload, **{**parts, **changes})


@pytest.mark.parametrize("unified", [False, True], ids=["split", "unified"])
def test_the_whole_context_goes_on(model: ls.Model, unified: bool, tmp_path: Path) -> None:
    """Every kind, through a file into another context: positions, tokens, next logits."""
    with context(model, kv_unified=unified) as one, context(model, kv_unified=unified) as two:
        filled(one)
        checkpoint = saved(one.checkpoint(tokens=TOKENS, meta={"a": [1]}), tmp_path / "a.llst")
        assert checkpoint.payload == one.snapshot()
        assert (checkpoint.kind, checkpoint.session_version) == ("whole", SESSION)
        assert checkpoint.meta == {"a": [1]}
        assert checkpoint.layout.arch == model.arch
        two.decode([7] * 20, 1)
        restored = two.resume(checkpoint)
        assert restored.tokens == TOKENS
        assert {i: span.n_past for i, span in restored.sequences.items()} == {0: 8, 1: 8}
        assert two.snapshot() == checkpoint.payload
        for ctx in (one, two):
            ctx.decode([4], 1)
        assert nmse(one.logits(), two.logits()) < BOUND


def test_one_sequence_goes_on(model: ls.Model, tmp_path: Path) -> None:
    """Into the sequence it was taken from, or another one; the others stay."""
    with context(model) as one, context(model) as two:
        filled(one)
        checkpoint = saved(one.checkpoint(1, tokens=TOKENS[::-1]), tmp_path / "a.llst")
        assert (checkpoint.kind, checkpoint.source) == ("sequence", 1)
        two.decode([7] * 3, 0)
        assert set(two.resume(checkpoint).sequences) == {1}
        assert (two.n_past(0), two.n_past(1)) == (3, 8)
        assert two.seq_snapshot(1) == checkpoint.payload
        assert set(two.resume(checkpoint, 0).sequences) == {0}
        assert (two.n_past(0), two.n_past(1)) == (8, 8)
        for ctx, seq_id in ((one, 1), (two, 0)):
            ctx.decode([4], seq_id)
        assert nmse(one.logits(), two.logits()) < BOUND


def test_the_buffer_of_the_caller(make: Callable[..., ls.Context]) -> None:
    """``out=`` is filled and referred to; one that is too small is refused."""
    ctx = filled(make(n_seq_max=2))
    out = bytearray(ctx.state_size() + 10)
    checkpoint = ctx.checkpoint(out=out)
    assert checkpoint.payload == ctx.snapshot()
    assert checkpoint.payload.obj is out
    with pytest.raises(ls.CapacityError):
        ctx.checkpoint(out=bytearray(3))


# -- logits


def test_sampling_goes_on_without_decoding(model: ls.Model, tmp_path: Path) -> None:
    """With logits, those of the last token are there at once, and the same bits."""
    with context(model) as one, context(model) as two:
        filled(one)
        row = bytes(one.logits())
        checkpoint = saved(one.checkpoint(1, logits=True), tmp_path / "a.llst")
        assert checkpoint.logits_of == 1
        two.resume(checkpoint, 0)
        assert bytes(two.logits()) == row
        # They can be kept again, and are gone with the next change.
        again = two.checkpoint(0, logits=True)
        assert (bytes(again.logits or b""), again.logits_of) == (row, 0)
        for change in (two.clear, lambda: two.resume(one.checkpoint(1), 0)):
            two.resume(checkpoint, 0)
            change()
            with pytest.raises(ls.StateError, match="no logits"):
                two.logits()
        whole = one.checkpoint(logits=True)
        assert whole.logits_of == 1
        two.resume(whole)
        assert bytes(two.logits()) == row
        two.decode([4], 1)
        one.decode([4], 1)
        assert nmse(one.logits(), two.logits()) < BOUND


def test_logits_of_something_else_are_not_kept(llama: ls.Model) -> None:
    """Of another sequence, of an end that was cut off, of a sequence that was replaced."""
    with context(llama) as ctx:
        with pytest.raises(ls.StateError, match="no logits to keep"):
            ctx.checkpoint(0, logits=True)
        filled(ctx)
        with pytest.raises(ls.StateError, match="of sequence 1"):
            ctx.checkpoint(0, logits=True)
        ctx.checkpoint(1, logits=True)
        ctx.seq_rm(1, 6)
        for seq_id in (1, None):
            with pytest.raises(ls.StateError, match="position 7"):
                ctx.checkpoint(seq_id, logits=True)
        filled(ctx)
        ctx.seq_cp(0, 1)
        with pytest.raises(ls.StateError, match="no logits to keep"):
            ctx.checkpoint(1, logits=True)


@pytest.mark.parametrize("check", ["strict", "warn", "off"])
def test_logits_of_another_vocabulary(llama: ls.Model, check: Any) -> None:
    """Three values where the model has 128 tokens: nothing could sample from them."""
    with context(llama) as ctx:
        filled(ctx)
        row = array("f", [1.0, 2.0, 3.0])
        short = rebuilt(ctx.checkpoint(0), logits=row, logits_of=0)
        for _ in range(2):
            assert refused(ctx, short, check=check) == ["logits"]
        long = rebuilt(short, logits=array("f", [0.0] * (llama.n_vocab + 1)), logits_of=0)
        assert refused(ctx, long, check=check) == ["logits"]


# -- what does not belong


@pytest.fixture
def other(tmp_path: Path) -> Callable[..., ls.Model]:
    """Makes variants of the plain model."""

    def write(**options: Any) -> ls.Model:
        path = write_model(tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", **options)
        return ls.Model(path, LIBRARY)

    return write


def refused(ctx: ls.Context, checkpoint: ls.Checkpoint, **options: Any) -> list[str]:
    """Resume, which must be refused; the names of what differs. Nothing is touched."""
    before = filled(ctx).snapshot()
    with pytest.raises(ls.MismatchError) as caught:
        ctx.resume(checkpoint, **options)
    assert ctx.snapshot() == before
    for difference in caught.value.differences:
        assert str(difference.name) in str(caught.value)
    return [difference.name for difference in caught.value.differences]


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_other_weights_of_the_same_shape(other: Callable[..., ls.Model], kind: str) -> None:
    """What llama.cpp restores without a word, and then talks nonsense."""
    models = [other(kind=kind, seed=seed) for seed in (0, 1)]
    with models[0], models[1], context(models[0]) as one, context(models[1]) as two:
        for checkpoint in (filled(one).checkpoint(), one.checkpoint(1)):
            assert refused(two, checkpoint) == ["weights"]
            two.resume(checkpoint, check="off")


def test_another_rope_base(other: Callable[..., ls.Model]) -> None:
    """Its key is named."""
    models = other(), other(overrides={"rope.freq_base": 5000.0})
    with models[0], models[1], context(models[0]) as one, context(models[1]) as two:
        assert refused(two, filled(one).checkpoint()) == ["llama.rope.freq_base"]


def test_another_quantization_of_the_same_weights(
    other: Callable[..., ls.Model], tmp_path: Path
) -> None:
    """The types of the tensors are named."""
    a = other()
    b = ls.Model(ggufs.half(Path(a.path), tmp_path / "half.gguf"), LIBRARY)
    with a, b, context(a) as one, context(b) as two:
        names = refused(two, filled(one).checkpoint())
    assert names == ["tensor types", "tensor table", "weights"]


def test_another_cache_type(llama: ls.Model) -> None:
    """Named by the option, also for a context that is empty yet."""
    with context(llama, type_k="q8_0") as one, context(llama) as two:
        checkpoint = filled(one).checkpoint()
        assert refused(two, checkpoint) == ["type_k"]
        with context(llama) as empty, pytest.raises(ls.MismatchError, match="type_k"):
            empty.resume(checkpoint)
        # What cannot be read is refused whatever is said.
        with pytest.raises(ls.MismatchError, match="type_k"):
            two.resume(checkpoint, check="off")


@pytest.mark.parametrize("version", sorted(set(SEQUENCE_VERSION) - {SESSION}))
@pytest.mark.parametrize("seq_id", [None, 1])
def test_another_session_version(
    make: Callable[..., ls.Context], version: int, seq_id: int | None
) -> None:
    """Of another build, with other streams and V the other way round: the same to any check."""
    made = filled(make(n_seq_max=3, flash_attn=False)).checkpoint(seq_id)
    elsewhere = converted(made, version)
    assert elsewhere.payload != made.payload or {version, SESSION} == {9, 10}
    for check in ("strict", "warn", "off"):
        ctx = make(n_seq_max=3, kv_unified=True, flash_attn=True)
        restored = ctx.resume(elsewhere, check=check)  # type: ignore[arg-type]
        assert restored.converted == (
            f"session version {version} to {SESSION}, streams 3 to 1, flash attention off to on"
        )
        assert ctx.n_past(1) == made.layout.spans[1].last + 1


@pytest.mark.parametrize("version", [8, 77])
def test_a_session_version_that_is_not_known(make: Callable[..., ls.Context], version: int) -> None:
    """There is no way to read it, whatever is to be checked."""
    ctx = make(n_seq_max=2)
    checkpoint = filled(ctx).checkpoint()
    checkpoint.session_version = version
    for check in ("strict", "warn", "off"):
        assert refused(ctx, checkpoint, check=check) == ["session version"]


def test_the_same_model_elsewhere(other: Callable[..., ls.Model], tmp_path: Path) -> None:
    """A copy of the file, under another path and in another process, is the same model."""
    script = (
        "import sys, llama_state as ls\n"
        "model = ls.Model(sys.argv[1], ls.load_library(sys.argv[3]))\n"
        "ctx = model.context(n_ctx=512, n_seq_max=2)\n"
        "print(ctx.resume(ls.Checkpoint.load(sys.argv[2])).tokens)\n"
    )
    with other() as a, context(a) as one:
        filled(one).checkpoint(0, tokens=TOKENS).save(tmp_path / "a.llst")
        (tmp_path / "far").mkdir()
        copy = shutil.copyfile(a.path, tmp_path / "far" / "renamed.gguf")
    done = subprocess.run(
        [sys.executable, "-c", script, copy, tmp_path / "a.llst", str(LIBRARY.path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(TOKENS)


def test_warn_and_off(other: Callable[..., ls.Model], tmp_path: Path) -> None:
    """The caller's choices: a warning with the same text, or silence."""
    with other() as a, other(seed=1) as b, context(a) as one, context(b) as two:
        checkpoint = filled(one).checkpoint()
        with pytest.raises(ls.MismatchError) as caught:
            two.resume(checkpoint)
        with pytest.warns(ls.MismatchWarning) as warned:
            two.resume(checkpoint, check="warn")
        assert str(warned[0].message) == str(caught.value)
        assert warned[0].filename == __file__
        two.resume(checkpoint, check="off")
        assert two.snapshot() == checkpoint.payload
        with pytest.raises(ValueError, match="strict"):
            two.resume(checkpoint, check="maybe")  # type: ignore[arg-type]


def test_native_files_belong_to_nobody(llama: ls.Model, tmp_path: Path) -> None:
    """Unless the caller says to whom."""
    with context(llama) as ctx:
        filled(ctx).save_state(tmp_path / "native", TOKENS)
        checkpoint = ls.Checkpoint.from_native(tmp_path / "native")
        assert refused(ctx, checkpoint)[0] == "model"
        known = ls.Checkpoint.from_native(tmp_path / "native", fingerprint=ctx.fingerprint)
        assert ctx.resume(known).tokens == TOKENS


def test_bare_pointers_say_what_they_do_not_know(llama: ls.Model, tmp_path: Path) -> None:
    """Attached by address: refused until the caller tells, then the same."""
    with context(llama) as one:
        checkpoint = filled(one).checkpoint()
        two = ls.attach(one.pointer, library=LIBRARY)
        assert set(two.fingerprint.unknown) == {"model file", "adapters", "rope"}
        names = refused(two, checkpoint)
        assert {"weights", "adapters", "rope"} <= set(names)
        told = ls.attach(one.pointer, library=LIBRARY, model_path=llama.path)
        assert refused(told, checkpoint) == ["adapters", "rope"]
        told.declare(adapters=[], rope={})
        told.resume(checkpoint)
        assert told.checkpoint().payload == checkpoint.payload


def test_the_kind_decides_where_it_goes(make: Callable[..., ls.Context]) -> None:
    """A whole context into a sequence, or a sequence that is not there."""
    one, two = filled(make(n_seq_max=2)), make()
    with pytest.raises(ls.FormatError, match="dest_seq_id"):
        one.resume(one.checkpoint(), 0)
    before = two.snapshot()
    with pytest.raises(ls.SequenceIdError):
        two.resume(rebuilt(one.checkpoint(1)))
    for seq_id in (-1, 1, 2**31):
        with pytest.raises(ls.SequenceIdError):
            two.resume(one.checkpoint(0), seq_id)
        with pytest.raises(ls.SequenceIdError):
            two.checkpoint(seq_id)
    assert two.snapshot() == before


# -- damage


def test_damaged_files_never_reach_the_context(model: ls.Model, tmp_path: Path) -> None:
    """Flips and cuts anywhere: refused by load(), the context is what it was."""
    random = Random(3)
    path = tmp_path / "a.llst"
    with context(model) as ctx:
        size = filled(ctx).checkpoint(tokens=TOKENS, logits=True).save(path)
        sound, before = path.read_bytes(), ctx.snapshot()
        for i in range(200):
            data = bytearray(sound)
            if i % 4:
                data[random.randrange(size)] ^= 1 << random.randrange(8)
            else:
                del data[random.randrange(size) :]
            path.write_bytes(data)
            with pytest.raises(ls.FormatError):
                ctx.resume(ls.Checkpoint.load(path, mapped=bool(i % 2)))
        assert ctx.snapshot() == before
        path.write_bytes(sound)
        ctx.resume(ls.Checkpoint.load(path))


def test_a_file_that_changes_while_it_is_mapped(
    make: Callable[..., ls.Context], tmp_path: Path
) -> None:
    """What was verified is no more: refused before anything is touched."""
    ctx = filled(make(n_seq_max=2))
    path = tmp_path / "a.llst"
    ctx.checkpoint().save(path)
    checkpoint = ls.Checkpoint.load(path)
    before = ctx.snapshot()
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * 8)
    with pytest.raises(ls.ChecksumError, match="load it again"):
        ctx.resume(checkpoint)
    assert ctx.snapshot() == before


def test_payloads_of_strangers_are_still_checked(make: Callable[..., ls.Context]) -> None:
    """Digests say that bytes are what was written, not that a sound state was."""
    ctx = filled(make(n_seq_max=2))
    before = ctx.snapshot()
    payload = bytearray(before)
    payload[20:24] = b"\xff\xff\xff\x7f"
    checkpoint = rebuilt(ctx.checkpoint())
    broken = ls.Checkpoint(
        payload, kind="whole", session_version=SESSION, fingerprint=checkpoint.fingerprint
    )
    for check in ("strict", "warn", "off"):
        with pytest.raises(ls.FormatError):
            ctx.resume(ls.Checkpoint.from_bytes(broken.to_bytes()), check=check)  # type: ignore[arg-type]
    assert ctx.snapshot() == before


# -- llama.cpp's own loader


def test_llama_cpp_takes_the_converted_file(model: ls.Model, tmp_path: Path) -> None:
    """Whole and sequence: converted from a checkpoint, identical to what llama.cpp writes."""
    native = Native(LIBRARY)
    with context(model) as one, context(model) as two:
        filled(one)
        for seq_id in (None, 1):
            ours, theirs = tmp_path / f"ours{seq_id}", tmp_path / f"theirs{seq_id}"
            one.checkpoint(seq_id, tokens=TOKENS).to_native(ours)
            if seq_id is None:
                native.save(one, theirs, TOKENS)
                loaded = native.load(two, ours)
            else:
                native.seq_save(one, theirs, seq_id, TOKENS)
                loaded = native.seq_load(two, ours, seq_id)[1]
            assert ours.read_bytes() == theirs.read_bytes()
            assert loaded == TOKENS
            known = one.checkpoint(seq_id).fingerprint
            back = ls.Checkpoint.from_native(theirs, fingerprint=known, source=1)
            back.to_native(tmp_path / "again")
            assert (tmp_path / "again").read_bytes() == theirs.read_bytes()
            if LIBRARY.sequence_head:  # what comes from a file has one
                assert back.to_bytes() == one.checkpoint(seq_id, tokens=TOKENS).to_bytes()
