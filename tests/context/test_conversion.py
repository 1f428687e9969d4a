"""States of another form: of another llama.cpp, in other streams, with V the other way round."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

import llama_state as ls
from llama_state import layout
from llama_state.testing.conformance import nmse, nmse_limit
from llama_state.testing.models import KINDS
from tests import elsewhere
from tests.elsewhere import FORMS, PROMPTS, fill, next_logits
from tests.kinds import OWN_STREAMS, given
from tests.layout.statefiles import GOLDEN
from tests.libllama import LIBRARY, MODELS

pytestmark = pytest.mark.libllama

SESSION = LIBRARY.session_version
VERSIONS = sorted(layout.SEQUENCE_VERSION)
# How much more than the two runs without a restore, and than the bound of one build.
TOLERANCE = 3.0
EXT = frozenset({"qwen2vl"})
CHANGED = frozenset({"qwen4exp"})  # the rows of its indexer are longer from b11549 on
TOKENS = EXT | {"qwen4exp"}  # their cells have the token, from version 10 on


def context(model: ls.Model, form: str, begun: int = 0, **options: Any) -> ls.Context:
    """A context of a form, in which the sequences that states go to hold something."""
    ctx = elsewhere.make(model, form, **options)
    for seq_id in range(2) if begun else ():
        ctx.decode([9] * begun, seq_id)
    return ctx


@cache
def fresh(model: ls.Model, form: str, cache_type: str = "f16") -> list[memoryview[float]]:
    """The logits that a context of a form gives after each prompt."""
    with context(model, form, type_k=cache_type, type_v=cache_type) as ctx:
        fill(ctx)
        return [next_logits(ctx, seq_id) for seq_id in range(len(PROMPTS))]


def words(changes: dict[str, tuple[object, object]]) -> str | None:
    """What a restore says that it has changed."""
    return ", ".join(f"{n} {a} to {b}" for n, (a, b) in changes.items() if a != b) or None


def expected_words(arch: str, version: int, form: tuple[str, str]) -> str | None:
    """What changes between a source of a version and a form, and a context of another form."""
    if arch == "mamba2":
        return None  # its states have the same bytes everywhere
    streams = [
        FORMS[f]["n_seq_max"] if arch in OWN_STREAMS or not FORMS[f]["kv_unified"] else 1
        for f in form
    ]
    on_off = ["on" if FORMS[f]["flash_attn"] else "off" for f in form]
    return words(
        {
            "session version": (version, SESSION),
            "streams": (streams[0], streams[1]),
            "flash attention": (on_off[0], on_off[1]),
        }
    )


def of_version(blob: bytes, parsed: layout.Layout, version: int) -> bytes:
    """A state as a llama.cpp of another session version would have written it."""
    return bytes(layout.convert(blob, parsed, layout.Form(version)))


@given(
    forms=st.tuples(st.sampled_from(list(FORMS)), st.sampled_from(list(FORMS))),
    version=st.sampled_from(VERSIONS),
    cache_type=st.sampled_from(["f16", "f32", "bf16"]),
    seq_id=st.sampled_from([None, 0, 1]),
    moved=st.booleans(),
    begun=st.sampled_from([0, 3, 40]),
)
def test_every_form_in_every_other(
    model: ls.Model,
    forms: tuple[str, str],
    version: int,
    cache_type: str,
    seq_id: int | None,
    moved: bool,
    begun: int,
) -> None:
    """It is restored, says what was changed, and goes on as a run there does."""
    if model.arch == "qwen4exp" and version == 9:
        return  # that version has no n-gram embeddings
    types = {"type_k": cache_type, "type_v": cache_type}
    with context(model, forms[0], **types) as source:
        fill(source)
        made = source.checkpoint(seq_id)
    blob = of_version(made.payload, made.layout, version)
    with context(model, forms[1], begun, **types) as ctx:
        if seq_id is None:
            arrived, restored = {0: 0, 1: 1}, ctx.restore(blob)
        else:
            arrived = {seq_id: 1 - seq_id if moved else seq_id}
            restored = ctx.seq_restore(blob, arrived[seq_id])
        assert restored.nbytes == len(blob)
        if version < 11 and model.arch not in EXT:  # 9 and 10 have the same bytes
            version = SESSION if SESSION < 11 else 10
        said = expected_words(model.arch, version, forms)
        assert restored.converted == said
        for saved, there in arrived.items():
            assert restored.sequences[there].n_past == len(PROMPTS[saved])
            if seq_id == there and not (model.arch in EXT and version == 9):
                back, form = ctx.checkpoint(there), layout.form_of(made.layout)
                assert layout.convert(back.payload, back.layout, form) == made.payload
        here, there_before = fresh(model, forms[1], cache_type), fresh(model, forms[0], cache_type)
        for saved, there in arrived.items():
            control = nmse(there_before[saved], here[saved])
            bound = max(nmse_limit(model.arch), TOLERANCE * control)
            assert nmse(next_logits(ctx, there), here[saved]) < bound
        if seq_id is not None and begun:
            other = 1 - arrived[seq_id]
            assert ctx.n_past(other) == begun


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_every_build(kind: str, tmp_path: Path) -> None:
    """What any build of the matrix has written is restored, by every function.

    The logits are those of a run here, or as near as a run there is. Without the states of others
    (see ``tests/elsewhere.py``) those of this build are restored in each form.
    """
    if kind not in MODELS:
        return
    model = MODELS[kind]
    found = list(elsewhere.written(kind))
    if not found:
        for form in FORMS:
            elsewhere.write(model, form, tmp_path / form)
            found.append(("this", form, elsewhere.Written(tmp_path / form)))
    with context(model, "flash, split") as ctx:
        fill(ctx)
        own = rows(ctx.checkpoint(0))
    for (build, form, states), target in product(found, FORMS):
        same = rows(ls.Checkpoint.load(states.folder / "checkpoint0")) == own
        assert same or model.arch in CHANGED
        refused = nullcontext() if same else pytest.raises(ls.MismatchError, match="row size")
        with refused:
            restored_everywhere(model, states, target, f"{build}, {form}, {target}")


def rows(made: ls.Checkpoint) -> list[object]:
    """The types and sizes of the rows of all caches."""
    return [(cache.name, cache.k, cache.v, cache.r) for cache in made.layout.geometry.caches]


def restored_everywhere(
    model: ls.Model,
    states: elsewhere.Written,
    target: str,
    name: str,
) -> None:
    """Restore what a build has written in every way there is, into one context of a form."""
    folder, here = states.folder, fresh(model, target)
    with context(model, target) as ctx:

        def check(restored: ls.Restored, arrived: dict[int, int]) -> None:
            for saved, there in arrived.items():
                assert restored.sequences[there].n_past == len(PROMPTS[saved]), name
                control = nmse(states.logits(saved), here[saved])
                bound = max(nmse_limit(model.arch), TOLERANCE * control)
                assert nmse(next_logits(ctx, there), here[saved]) < bound, name

        def blob(seq_id: int) -> bytes:
            return (folder / f"blob{seq_id}").read_bytes()

        check(ctx.load_state(folder / "whole"), {0: 0, 1: 1})
        check(ctx.seq_load_state(folder / "sequence1", 0), {1: 0})
        check(ctx.seq_load_state(folder / "sequence0", 1), {0: 1})
        check(ctx.seq_restore(blob(1), 1), {1: 1})
        check(ctx.seq_restore(blob(0), 0), {0: 0})
        checkpoint = ls.Checkpoint.load(folder / "checkpoint0")
        check(ctx.resume(checkpoint, 1, check="strict"), {0: 1})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", VERSIONS)
def test_golden_states(form: str, version: int) -> None:
    """What builds of each version wrote long ago means the same as what one of this wrote."""
    model = MODELS["lfm2-dense"]
    with context(model, form) as ctx:
        for kind, load in (("session", ctx.load_state), ("sequence", ctx.seq_load_state)):
            load(GOLDEN / f"v{SESSION}-lfm2.{kind}")
            expected = next_logits(ctx, 0)
            restored = load(GOLDEN / f"v{version}-lfm2.{kind}")
            assert restored.tokens == (1, 2, 3)
            assert ("version" in str(restored.converted)) == (version != SESSION)
            assert nmse(next_logits(ctx, 0), expected) < nmse_limit(model.arch)


# -- what is more than form


def test_quantized_rows_of_another_version(model: ls.Model) -> None:
    """No state of before version 11 says whether they are rotated: refused, with that reason."""
    if model.arch == "mamba2":
        return  # it has none
    options = {"flash_attn": True, "type_k": "q8_0", "type_v": "q8_0"}
    with model.context(n_ctx=256, n_seq_max=2, **options) as ctx:  # type: ignore[arg-type]
        fill_short(ctx)
        made = ctx.checkpoint(0)
        for version in set(VERSIONS) - {SESSION}:
            if 9 in (version, SESSION) and model.arch in TOKENS:
                continue
            strange = relabelled(made, version)
            for target in (0, 1):
                before = ctx.snapshot()
                with pytest.raises(ls.MismatchError, match="q8_0 rows are rotated") as caught:
                    ctx.resume(strange, target, check="off")
                assert caught.value.differences[0].name == "session version"
                assert ctx.snapshot() == before


def test_quantized_rows_in_other_streams(make: Callable[..., ls.Context]) -> None:
    """A whole state of them is refused before its first sequence is touched, too."""
    options = {"flash_attn": True, "type_k": "q8_0", "type_v": "q8_0", "n_seq_max": 2}
    split, unified = make(**options), make(**options, kv_unified=True)
    for ctx in (split, unified):
        fill_short(ctx)
    unified.decode([4, 4], 1)
    before = unified.snapshot()
    for version in set(VERSIONS) - {SESSION}:
        with pytest.raises(ls.MismatchError, match="q8_0 rows are rotated"):
            unified.resume(relabelled(split.checkpoint(), version), check="off")
        assert unified.snapshot() == before
    assert unified.restore(split.snapshot()).converted == "streams 2 to 1"


def fill_short(ctx: ls.Context) -> None:
    ctx.decode(range(2, 12), 0)
    ctx.decode(range(3, 9), 1)


def relabelled(made: ls.Checkpoint, version: int) -> ls.Checkpoint:
    """A quantized state as a llama.cpp of another version writes it, rotated or not."""
    pieces, at = [], 0
    words = version >= 11, SESSION >= 11
    for part in made.layout.caches:
        for stream in getattr(part, "streams", ()):
            if len(stream.cells) and words[0] != words[1]:
                pieces += [made.payload[at : stream.tail + 8], bytes(8 * words[0])]
                at = stream.tail + 8 + 8 * words[1]
    payload = b"".join([*map(bytes, pieces), bytes(made.payload[at:])])
    return ls.Checkpoint(
        payload,
        kind=made.kind,
        session_version=version,
        source=made.source,
        fingerprint=made.fingerprint,
    )


@pytest.mark.parametrize("begun", [0, 5])
def test_other_types(model: ls.Model, begun: int) -> None:
    """Rows of another type stay refused, whatever else of them is form; nothing has changed."""
    if model.arch == "mamba2":
        return
    with context(model, "plain, split", type_k="f32", type_v="f32") as source:
        fill(source)
        blobs = source.snapshot(), source.seq_snapshot(0)
    with context(model, "flash, one stream", begun) as ctx:
        before = ctx.snapshot()
        for restore, blob in zip((ctx.restore, ctx.seq_restore), blobs, strict=True):
            with pytest.raises(ls.MismatchError) as caught:
                restore(blob)
            assert "saved f32, this context f16" in str(caught.value)
            assert ctx.snapshot() == before


def test_no_room_in_other_streams(make: Callable[..., ls.Context]) -> None:
    """A sequence that is too long for its stream; several for one. What was there is there."""
    one = make(n_ctx=768, n_seq_max=3, kv_unified=True)
    one.decode([1] * 300, 0)
    one.decode([2] * 100, 1)
    split = make(n_ctx=768, n_seq_max=3)
    for seq_id in range(3):
        split.decode([3] * 200, seq_id)
    small = make(n_ctx=512, n_seq_max=3, kv_unified=True)
    small.decode([4] * 9, 2)
    for target, source in ((split, one), (small, split)):
        before = target.snapshot()
        with pytest.raises(ls.CapacityError):
            target.restore(source.snapshot())
        assert target.snapshot() == before


def test_a_version_that_the_bytes_do_not_have(make: Callable[..., ls.Context]) -> None:
    """Damaged, cut off, or junk: as refused as ever, and with the words of this version."""
    ctx = make()
    ctx.decode(range(2, 30))
    before = ctx.snapshot()
    for version in VERSIONS:
        made = ctx.checkpoint(0)
        blob = of_version(made.payload, made.layout, version)
        for damaged in (blob[:-1], blob + b"\0", blob[: len(blob) // 2], blob[:40]):
            with pytest.raises(ls.FormatError):
                ctx.seq_restore(damaged)
            assert ctx.snapshot() == before


def test_partial_states(model: ls.Model) -> None:
    """A rewind to a partial state that another version wrote."""
    if "state-flags" not in LIBRARY.capabilities:
        return
    for version, form in zip(VERSIONS, cycle(FORMS)):
        if model.arch == "qwen4exp" and version == 9:
            continue
        with context(model, form) as ctx:
            fill(ctx)
            partial = ctx.seq_snapshot(0, partial=True)
            parsed = layout.parse_sequence(
                partial,
                version=SESSION,
                headed=LIBRARY.sequence_head,
                partial=True,
                traits=ctx._facts.traits,
            )
            expected = next_logits(ctx, 0)
            ctx.decode([8, 9], 0)
            restored = ctx.seq_restore(of_version(partial, parsed, version), 0, partial=True)
            assert restored.sequences[0].n_past == len(PROMPTS[0])
            assert nmse(next_logits(ctx, 0), expected) < nmse_limit(model.arch)


def test_without_validation(make: Callable[..., ls.Context], tmp_path: Path) -> None:
    """Nothing is known of the state then, so nothing is rewritten."""
    source, ctx = make(flash_attn=False), make(flash_attn=True)
    source.decode([1, 2, 3])
    with pytest.raises(ls.StateError):
        ctx.restore(source.snapshot(), validate=False)
    assert ctx.n_past() == 0
    assert ctx.restore(source.snapshot()).converted == "flash attention off to on"
    assert "converted='flash" in repr(ctx.restore(source.snapshot()))
    assert ctx.restore(ctx.snapshot()).converted is None
    assert "converted" not in repr(ctx.restore(ctx.snapshot()))
