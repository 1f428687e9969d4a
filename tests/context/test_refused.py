"""What does not fit is an error that names the fact, and what was in the context is still there."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import llama_state as ls
from llama_state._llama import calls
from llama_state.layout import SEQUENCE_VERSION
from llama_state.testing.models import write_model
from tests.kinds import UNCOUNTED
from tests.libllama import MODELS

pytestmark = pytest.mark.libllama

Make = Callable[..., ls.Context]


def kept(ctx: ls.Context) -> list[bytes]:
    """What must not change: the whole state and that of each sequence, tensors included."""
    return [ctx.snapshot(), *(ctx.seq_snapshot(i) for i in range(ctx.n_seq_max))]


@contextmanager
def untouched(ctx: ls.Context) -> Iterator[None]:
    """The block changes nothing in *ctx*, and decoding goes on as it would have."""
    before = kept(ctx)
    yield
    assert kept(ctx) == before


def filled(ctx: ls.Context, n: int = 30) -> ls.Context:
    for seq_id in range(ctx.n_seq_max):
        ctx.decode([token % ctx.n_vocab for token in range(n)], seq_id)
    return ctx


SESSIONS = {version: version for version in SEQUENCE_VERSION}
SEQUENCES = {sequence: session for session, sequence in SEQUENCE_VERSION.items()}

MISMATCHES = {
    "type_k": ({"type_k": "q8_0", "flash_attn": True}, {}, "type_k: saved q8_0, this context f16"),
    "type_v": (
        {"type_v": "q8_0", "flash_attn": True},
        {"flash_attn": True},
        "type_v: saved q8_0, this context f16",
    ),
    "type_k and form": (
        {"type_k": "f32", "flash_attn": False, "n_seq_max": 2},
        {"flash_attn": True, "n_seq_max": 2, "kv_unified": True},
        "type_k: saved f32, this context f16",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
@pytest.mark.parametrize("full", [True, False], ids=["filled", "empty"])
def test_other_settings(make: Make, case: str, full: bool, tmp_path: Path) -> None:
    """A state of other settings is a MismatchError that names the setting and both values."""
    theirs, ours, words = MISMATCHES[case]
    source = filled(make(n_ctx=768, **theirs))
    target = make(n_ctx=768, **ours)
    if full:
        filled(target, 20)
    source.save_state(tmp_path / "whole")
    source.seq_save_state(tmp_path / "sequence")
    attempts: list[Callable[[], object]] = [
        lambda: target.restore(source.snapshot()),
        lambda: target.seq_restore(source.seq_snapshot()),
        lambda: target.load_state(tmp_path / "whole"),
        lambda: target.seq_load_state(tmp_path / "sequence"),
    ]
    for attempt in attempts:
        with untouched(target):
            with pytest.raises(ls.MismatchError) as caught:
                attempt()
            assert words in str(caught.value)
            assert isinstance(caught.value, ValueError)
            assert all(d.saved != d.current for d in caught.value.differences)


@pytest.mark.parametrize("full", [True, False], ids=["filled", "empty"])
def test_another_layer_count(library: ls.Library, make: Make, full: bool, tmp_path: Path) -> None:
    """A state of a model with more layers is refused, by its layer count."""
    path = write_model(tmp_path / "deep.gguf", overrides={"block_count": 3})
    with ls.Model(path, library) as deep, deep.context(n_ctx=256) as source:
        filled(source)
        target = make()
        if full:
            filled(target, 20)
        for attempt, blob in (
            (target.restore, source.snapshot()),
            (target.seq_restore, source.seq_snapshot()),
        ):
            with untouched(target), pytest.raises(ls.MismatchError, match="layer count: saved 3"):
                attempt(blob)


def test_another_architecture(make: Make) -> None:
    """A whole state names its architecture; of a sequence the kind of memory tells."""
    target = filled(make())
    for kind, model in MODELS.items():
        if kind == "llama-dense":
            continue
        with model.context(n_ctx=256) as source:
            filled(source)
            with untouched(target), pytest.raises(ls.MismatchError, match="architecture"):
                target.restore(source.snapshot())
            with untouched(target), pytest.raises(ls.StateError) as caught:
                target.seq_restore(source.seq_snapshot())
            assert isinstance(caught.value, ls.MismatchError | ls.FormatError), kind


def test_too_small_a_context(model: ls.Model) -> None:
    """More cells than the context has: CapacityError with both numbers, in a filled context too."""
    with model.context(n_ctx=1024) as source, model.context(n_ctx=256) as target:
        filled(source, 400)
        filled(target, 20)
        for attempt, blob in (
            (target.restore, source.snapshot()),
            (target.seq_restore, source.seq_snapshot()),
        ):
            if model.arch == "mamba2":
                assert attempt(blob).sequences[0].n_past == 400  # one cell, however long
                continue
            with untouched(target), pytest.raises(ls.CapacityError) as caught:
                attempt(blob)
            assert (caught.value.need, caught.value.have) == (400, 256)


def test_too_few_sequences(model: ls.Model) -> None:
    """A whole state with more sequences than the context has."""
    with (
        model.context(n_ctx=768, n_seq_max=3, kv_unified=True) as source,
        model.context(n_ctx=768, n_seq_max=1) as target,
    ):
        filled(source, 10)
        filled(target, 20)
        with untouched(target), pytest.raises(ls.CapacityError, match="need 3, have 1"):
            target.restore(source.snapshot())


def test_a_unified_cache_without_room(make: Make) -> None:
    """What fits only when the others are gone is refused, and the sequence is as it was."""
    source, target = make(n_ctx=256), make(n_ctx=256, n_seq_max=2, kv_unified=True)
    source.decode([5] * 200)
    target.decode([1] * 100, 0)
    target.decode([2] * 100, 1)
    with untouched(target), pytest.raises(ls.CapacityError, match="need 200, have 256"):
        target.seq_restore(source.seq_snapshot(), 0)
    target.seq_rm(1)
    assert target.seq_restore(source.seq_snapshot(), 0).sequences[0].n_past == 200


def test_the_wrong_kind(make: Make, tmp_path: Path) -> None:
    """Blobs and files of the other kind, headers and junk are FormatErrors that say so."""
    ctx = filled(make(n_ctx=512, n_seq_max=2))
    whole, sequence = ctx.snapshot(), ctx.seq_snapshot()
    ctx.save_state(tmp_path / "whole", [1, 2])
    ctx.seq_save_state(tmp_path / "sequence", 0, [1, 2])
    (tmp_path / "junk").write_bytes(b"\x7fELF" + bytes(100))
    (tmp_path / "empty").touch()
    with untouched(ctx):
        for attempt in (
            lambda: ctx.restore(sequence),
            lambda: ctx.seq_restore(whole),
            lambda: ctx.restore((tmp_path / "whole").read_bytes()),
            lambda: ctx.seq_restore((tmp_path / "sequence").read_bytes()),
            lambda: ctx.load_state(tmp_path / "sequence"),
            lambda: ctx.seq_load_state(tmp_path / "whole"),
            lambda: ctx.load_state(tmp_path / "junk"),
            lambda: ctx.seq_load_state(tmp_path / "empty"),
            lambda: ctx.restore(b""),
            lambda: ctx.seq_restore(b"\0" * 64),
        ):
            with pytest.raises(ls.FormatError):
                attempt()
        with pytest.raises(ls.FormatError, match="sequence"):
            ctx.load_state(tmp_path / "sequence")
        with pytest.raises(FileNotFoundError):
            ctx.load_state(tmp_path / "nothing")


def test_another_version(make: Make, library: ls.Library, tmp_path: Path) -> None:
    """A file of a version that is not known; and one that says it is of another than it is."""
    ctx = filled(make())
    for save, load, ours in (
        (ctx.save_state, ctx.load_state, library.session_version),
        (ctx.seq_save_state, ctx.seq_load_state, library.sequence_version),
    ):
        save(tmp_path / "state")
        content = bytearray((tmp_path / "state").read_bytes())
        for other in {9, 10, 11, 2, 3, 4, 77} - {ours}:
            struct.pack_into("<I", content, 4, other)
            (tmp_path / "state").write_bytes(content)
            versions = SESSIONS if load == ctx.load_state else SEQUENCES
            known = other in versions
            if known and {versions[other], versions[ours]} == {9, 10}:  # the same bytes
                assert load(tmp_path / "state").converted
                continue
            with untouched(ctx), pytest.raises(ls.FormatError) as caught:
                load(tmp_path / "state")
            if not known:
                assert isinstance(caught.value, ls.VersionError)
                assert caught.value.found == other


def test_every_truncation_and_extension(model: ls.Model, tmp_path: Path) -> None:
    """A blob or file that is cut anywhere, or has anything behind it, never reaches llama.cpp."""
    path = tmp_path / "state"
    with model.context(n_ctx=256) as ctx:
        filled(ctx, 5)
        ctx.save_state(path, range(3))
        files = [(path.read_bytes(), ctx.load_state)]
        ctx.seq_save_state(path, 0, range(3))
        files.append((path.read_bytes(), ctx.seq_load_state))
        blobs = [(ctx.snapshot(), ctx.restore), (ctx.seq_snapshot(), ctx.seq_restore)]
        before = ctx.snapshot()
        for blob, restore in blobs:
            step = max(1, len(blob) // 300)
            for end in {*range(0, len(blob), step), *range(200), len(blob) - 1}:
                # Recurrent states do not say how many layers they have: none is a reading too.
                with pytest.raises((ls.FormatError, ls.MismatchError)):
                    restore(blob[:end])
            with pytest.raises(ls.FormatError):
                restore(blob + b"\0")
        for content, load in files:
            for end in {*range(0, len(content), len(content) // 60), *range(40), len(content) - 1}:
                path.write_bytes(content[:end])
                with pytest.raises((ls.FormatError, ls.MismatchError)):
                    load(path)
            path.write_bytes(content + b"\0")
            with pytest.raises(ls.FormatError):
                load(path)
        assert ctx.snapshot() == before


def test_small_output_buffers(make: Make) -> None:
    """out= that is too small is a CapacityError with both sizes; a larger one is filled in part."""
    ctx = filled(make())
    for size, snapshot in (
        (ctx.state_size(), ctx.snapshot),
        (ctx.seq_state_size(), lambda out: ctx.seq_snapshot(0, out=out)),
    ):
        with pytest.raises(ls.CapacityError) as caught:
            snapshot(out=bytearray(size - 1))
        assert (caught.value.need, caught.value.have) == (size, size - 1)
        out = bytearray(b"\xaa" * (size + 10))
        view = snapshot(out=out)
        assert (len(view), bytes(out[size:])) == (size, b"\xaa" * 10)
        with pytest.raises((BufferError, TypeError, ValueError)):
            snapshot(out=bytes(size))


def test_tokens_that_are_none(make: Make, tmp_path: Path) -> None:
    """Token lists hold 32-bit integers."""
    ctx = make()
    for tokens, error in (([2**31], ls.FormatError), (["a"], TypeError), ([1.5], TypeError)):
        with pytest.raises(error, match="tokens"):
            ctx.save_state(tmp_path / "state", tokens)  # type: ignore[arg-type]
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("options", [{}, {"kv_unified": True}, {"flash_attn": False}])
def test_what_llama_cpp_refuses_is_undone(
    model: ls.Model, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp itself refuses a cut state, after it has destroyed what was there: it is put back.

    A newer llama.cpp's format is refused by default; validate=False gives it to llama.cpp.
    """
    with model.context(n_ctx=512, n_seq_max=2, **options) as ctx:  # type: ignore[arg-type]
        filled(ctx, 40)
        whole, sequence = ctx.snapshot(), ctx.seq_snapshot(1)
        # A cache of KV streams: not the one of purely recurrent memory.
        split = not options.get("kv_unified") and model.arch != "mamba2"
        loses_streams = ctx.library.session_version == 9 and split
        with untouched(ctx):
            for attempt, blob in ((ctx.seq_restore, sequence), (ctx.restore, whole)):
                with monkeypatch.context() as patch:
                    patch.setattr(ctx.library, "session_version", 99)
                    with pytest.raises(ls.UnsupportedError, match="99"):
                        attempt(blob)
                if loses_streams and blob is whole:
                    with pytest.raises(ls.UnsupportedError, match="validate=True"):
                        attempt(blob, validate=False)
                    continue
                for cut in (1, 100, len(blob) // 2, len(blob) - 30):
                    with pytest.raises(ls.RestoreError) as caught:
                        attempt(blob[:-cut], validate=False)
                    assert caught.value.rolled_back
                    assert caught.value.log
        ctx.decode([1, 2, 3], 1)
        assert ctx.seq_restore(sequence, 1, validate=False).sequences[1].n_past == 40
        if not loses_streams:
            assert ctx.restore(whole, validate=False).sequences.keys() == {0, 1}


def test_an_unexpected_refusal(model: ls.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was left to refuse no copy was kept: the destination is emptied, and only it.

    Where llama.cpp decides whether there is room, it is restored from its copy. llama.cpp is
    made to refuse once here, as it would when it is out of memory.
    """
    write, refusals = calls.write, [0]
    counted = model.arch not in UNCOUNTED
    with model.context(n_ctx=512, n_seq_max=2) as ctx:
        filled(ctx, 40)
        blob, other = ctx.seq_snapshot(0), ctx.seq_snapshot(1)
        ctx.seq_restore(blob, 0)  # now its geometry is known
        with monkeypatch.context() as patch, pytest.raises(ls.RestoreError) as caught:
            patch.setattr(calls, "write", lambda *a: refusals.pop() if refusals else write(*a))
            ctx.seq_restore(blob, 0)
        assert caught.value.rolled_back != counted
        assert ("emptied" in str(caught.value)) == counted
        assert (ctx.n_past(0), ctx.n_past(1)) == (0 if counted else 40, 40)
        assert ctx.seq_snapshot(1) == other
        ctx.seq_restore(blob, 0)
        assert ctx.n_past(0) == 40


def test_savepoints_in_an_unknown_format(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A savepoint needs no parser: it gives back to llama.cpp what llama.cpp wrote."""
    ctx = filled(make(n_ctx=256))
    monkeypatch.setattr(ctx.library, "session_version", 99)
    with untouched(ctx), pytest.raises(ZeroDivisionError), ctx.savepoint():
        ctx.decode([1, 2])
        1 / 0  # noqa: B018


def test_files_in_an_unknown_format(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Files of a newer llama.cpp can be written, and with a word be loaded."""
    ctx = filled(make(n_ctx=256))
    monkeypatch.setattr(ctx.library, "session_version", 99)
    monkeypatch.setattr(ctx.library, "sequence_version", 98)
    for save, load in (
        (ctx.save_state, ctx.load_state),
        (ctx.seq_save_state, ctx.seq_load_state),
    ):
        with pytest.warns(ls.VersionWarning, match="99"):
            save(tmp_path / "state", tokens=[1, 2])
        with untouched(ctx):
            with pytest.raises(ls.UnsupportedError, match=r"99.*validate=False"):
                load(tmp_path / "state")
            assert load(tmp_path / "state", validate=False).tokens == (1, 2)


def test_offsets_count_from_the_start_of_the_file(make: Make, tmp_path: Path) -> None:
    """Damage behind the header and the tokens is said to be where it is."""
    ctx = filled(make(n_ctx=256))
    size = ctx.save_state(tmp_path / "state", range(100))
    content = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(content[:-1])
    with pytest.raises(ls.TruncatedError) as caught:
        ctx.load_state(tmp_path / "state")
    assert (caught.value.need, caught.value.have) == (size, size - 1)
    assert caught.value.offset is not None
    assert caught.value.offset > 412
    assert f"need {size} bytes, have {size - 1}" in str(caught.value)
