"""The fingerprint of a context: whatever changes what its states mean is named."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import llama_state as ls
from llama_state.checkpoint.fingerprint import model_fields
from llama_state.testing import write_model
from tests.layout import ggufs
from tests.layout.ggufs import F32, adapter, string
from tests.libllama import LIBRARY

pytestmark = pytest.mark.libllama

FROM_FILE = ("tokenizer", "tensor types", "tensor table", "weights")
Make = Callable[..., ls.Context]


@contextmanager
def context(path: Path, **options: object) -> Iterator[ls.Context]:
    """A context of a model that is closed after it."""
    with ls.Model(path, LIBRARY) as model, model.context(256, **options) as ctx:  # type: ignore[arg-type]
        yield ctx


def of_file(path: Path) -> ls.Fingerprint:
    with context(path) as ctx:
        return ctx.fingerprint


def of_pointer(path: Path) -> ls.Fingerprint:
    """Of a context whose maker says everything there is to say."""
    with context(path) as owner:
        ctx = ls.attach(owner.pointer, LIBRARY, model_path=path)
        ctx.declare(adapters=[], rope={})
        return ctx.fingerprint


def names(differences: list[ls.Difference]) -> list[str]:
    return [difference.name for difference in differences]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.gguf", text=True)


# -- the model


def test_hyperparameters_are_llama_cpps_own_texts(model: ls.Model) -> None:
    """Of every kind of model: what the file says is what llama.cpp says, but for lists."""
    fields = model_fields(model.path)
    own = {name: text for name, text in fields.items() if name.startswith(f"{model.arch}.")}
    told = {name: model.metadata(name) for name in own}
    assert len(own) > 5
    assert {name: own[name] for name, text in told.items() if text is not None} == {
        name: text for name, text in told.items() if text is not None
    }
    assert all(own[name].startswith("[") for name, text in told.items() if text is None)


def test_everything_is_known_of_a_context_of_ours(model: ls.Model) -> None:
    """Of every kind of model, and the same each time."""
    with model.context(256) as ctx, model.context(512, n_seq_max=2) as other:
        assert ctx.fingerprint.unknown == {}
        assert ctx.fingerprint.model == model_fields(model.path)
        assert ctx.fingerprint == ctx.fingerprint
        assert ctx.fingerprint.differences(other.fingerprint) == []
        assert ctx.fingerprint.context["adapters"] == "none"
        assert ctx.fingerprint.context["rope"] == "the model's own"
        assert ls.Fingerprint.from_json(ctx.fingerprint.to_json()) == ctx.fingerprint


def test_a_bare_pointer_tells_hyperparameters_and_sums(model: ls.Model) -> None:
    """Of every kind of model; the rest is unknown, with what to do about it."""
    with model.context(256) as ctx:
        bare = ls.attach(ctx.pointer, LIBRARY)
        told = bare.fingerprint
        assert told.model.items() >= {"architecture": model.arch}.items()
        assert {"parameters", "tensor bytes"} <= set(told.model)
        assert not set(FROM_FILE) & set(told.model)
        assert set(told.unknown) == {"model file", "adapters", "rope"}
        again = ls.attach(ctx.pointer, LIBRARY).fingerprint
        assert names(told.differences(again)) == ["model file", "adapters", "rope"]
        found = ctx.fingerprint.differences(told)
        assert {*FROM_FILE, "adapters", "rope"} <= set(names(found))
        assert all(str(difference.current).startswith("not known: ") for difference in found)
        named = ls.attach(ctx.pointer, LIBRARY, model_path=model.path)
        named.declare(adapters=[], rope={})
        assert ctx.fingerprint.differences(named.fingerprint) == []
        assert named.fingerprint.unknown == {}


@pytest.mark.parametrize("of", [of_file, of_pointer])
def test_the_same_file_elsewhere(
    of: Callable[[Path], ls.Fingerprint], base: Path, tmp_path: Path
) -> None:
    """A copy under another name, and a split copy, are the same model."""
    copy = Path(shutil.copy(base, tmp_path / "copy.gguf"))
    assert of(base).differences(of(copy)) == []
    keys, tensors = ggufs.parts_of(base)
    halves: list[dict[str, tuple[tuple[int, ...], int, bytes]]] = [{}, {}]
    for i, (name, tensor) in enumerate(tensors.items()):
        halves[i % 2][name] = tensor
    first, _ = ggufs.split(tmp_path, keys, halves)
    assert of(first).unknown == {}
    assert of(base).differences(of(first)) == []


@pytest.mark.parametrize("of", [of_file, of_pointer])
def test_what_makes_another_model_is_named(
    of: Callable[[Path], ls.Fingerprint], base: Path, tmp_path: Path
) -> None:
    """Other weights, other precision, another rope base, another tokenizer."""
    seed = write_model(tmp_path / "seed.gguf", text=True, seed=1)
    assert names(of(base).differences(of(seed))) == ["weights"]
    found = of(base).differences(of(ggufs.half(base, tmp_path / "half.gguf")))
    assert names(found) == ["tensor types", "tensor table", "weights"]
    assert "f16 x " in str(found[0].current)
    rope = {"rope.freq_base": 5000.0}
    path = write_model(tmp_path / "rope.gguf", text=True, overrides=rope)
    [difference] = of(base).differences(of(path))
    assert difference == ("llama.rope.freq_base", "not recorded", "5000.000000")
    other = write_model(
        tmp_path / "other.gguf", text=True, overrides={**rope, "rope.freq_base": 1e6}
    )
    assert of(path).differences(of(other)) == [
        ("llama.rope.freq_base", "5000.000000", "1000000.000000")
    ]
    keys, tensors = ggufs.parts_of(base)
    keys["tokenizer.ggml.tokens"].value = [
        *reversed(keys["tokenizer.ggml.tokens"].value)  # type: ignore[call-overload]
    ]
    turned = ggufs.write(tmp_path / "turned.gguf", keys, tensors)
    assert names(of(base).differences(of(turned))) == ["tokenizer"]


def test_the_file_was_replaced_after_loading(base: Path, tmp_path: Path) -> None:
    """What is on the disk now is not what the context computes with."""
    before = of_file(base)
    seed = write_model(tmp_path / "seed.gguf", text=True, seed=1)
    with context(base) as ctx:
        seed.replace(base)
        after = ctx.fingerprint
    assert "no longer" in after.unknown["model file"]
    assert after.model["llama.block_count"] == "2"
    found = before.differences(after)
    assert names(found) == [*FROM_FILE]
    assert str(found[0].current) == f"not known: {after.unknown['model file']}"


def test_a_model_path_of_another_model(base: Path, tmp_path: Path) -> None:
    """Hyperparameters and sums of a file that is said to be the model's are compared."""
    other = write_model(tmp_path / "other.gguf", text=True, overrides={"rope.freq_base": 5000.0})
    layers = write_model(tmp_path / "layers.gguf", text=True, overrides={"block_count": 3})
    bits = ggufs.half(base, tmp_path / "half.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(base.read_bytes()[:-1000])
    with context(base) as owner:
        for path in (other, layers, bits):
            ctx = ls.attach(owner.pointer, LIBRARY, model_path=path)
            assert "is not" in ctx.fingerprint.unknown["model file"]
            assert not set(FROM_FILE) & set(ctx.fingerprint.model)
        missing = ls.attach(owner.pointer, LIBRARY, model_path=tmp_path / "missing.gguf")
        reason = missing.fingerprint.unknown["model file"]
        assert reason == "the file cannot be read: No such file or directory"
        cut = ls.attach(owner.pointer, LIBRARY, model_path=damaged)
        assert "need" in cut.fingerprint.unknown["model file"]


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("change", ["touched", "deleted", "written"])
def test_a_checkpoint_warns_of_a_file_that_changed(
    change: str, attached: bool, base: Path, tmp_path: Path
) -> None:
    """Since it was loaded, or attached: what its state belongs to can no longer be learned."""
    with context(base) as owner:
        owner.decode([1, 2, 3])
        ctx = ls.attach(owner.pointer, LIBRARY, model_path=base) if attached else owner
        ctx.declare(adapters=[], rope={})
        if change == "touched":
            os.utime(base, ns=(1, 1))
        elif change == "deleted":
            base.unlink()
        else:
            shutil.copy(write_model(tmp_path / "seed.gguf", text=True, seed=1), base)
        with pytest.warns(
            ls.IdentityWarning, match=r"refuses it: model file \(the file "
        ) as warned:
            checkpoint = ctx.checkpoint(0)
        assert [warning.filename for warning in warned] == [__file__]
        assert set(checkpoint.fingerprint.unknown) == {"model file"}
        with pytest.raises(ls.MismatchError, match="model file"):
            ctx.resume(checkpoint)


def test_a_model_path_that_comes_later(base: Path, tmp_path: Path) -> None:
    """A file that was not there when it was named is not what was loaded."""
    late = tmp_path / "late.gguf"
    with context(base) as owner:
        ctx = ls.attach(owner.pointer, LIBRARY, model_path=late)
        shutil.copy(base, late)
        assert "is not" in ctx.fingerprint.unknown["model file"]


def test_a_checkpoint_says_what_was_not_declared(base: Path) -> None:
    """Once it was, there is no warning."""
    with context(base) as owner:
        owner.decode([1, 2, 3])
        ctx = ls.attach(owner.pointer, LIBRARY, model_path=base)
        with pytest.warns(ls.IdentityWarning, match=r"adapters \(say with declare.*rope \(say"):
            ctx.checkpoint(0)
        ctx.declare(adapters=[], rope={})
        assert ctx.checkpoint(0).fingerprint.unknown == {}


def test_a_relative_path(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is still found when the process has gone elsewhere."""
    monkeypatch.chdir(base.parent)
    with ls.Model(base.name, LIBRARY) as model, model.context(256) as ctx:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert ctx.fingerprint.unknown == {}


def test_factors_that_depend_on_the_length(base: Path, tmp_path: Path) -> None:
    """A model with two sets of rope factors takes the long ones in a long context."""
    keys, tensors = ggufs.parts_of(base)
    keys["llama.rope.scaling.type"] = string("longrope")
    keys["llama.rope.scaling.original_context_length"] = ggufs.u32(256)
    tensors.pop("rope_freqs.weight", None)  # they would come before both
    for name, factor in (("long", 2), ("short", 1)):
        factors = np.full(64, factor, "<f4").tobytes()
        tensors[f"rope_factors_{name}.weight"] = ((64,), F32, factors)
    path = ggufs.write(tmp_path / "long.gguf", keys, tensors)
    with ls.Model(path, LIBRARY) as model, model.context(256) as one, model.context(512) as two:
        for ctx in (one, two):
            ctx.decode([1, 2, 3])
        assert one.seq_snapshot() != two.seq_snapshot()
        differences = one.fingerprint.differences(two.fingerprint)
    assert differences == [("rope factors", "short", "long")]


def retrained(path: Path, to: Path) -> Path:
    """A copy in which bytes of one tensor, between the samples, are others."""
    keys, tensors = ggufs.parts_of(path)
    name, (shape, kind, data) = max(tensors.items(), key=lambda item: len(item[1][2]))
    assert len(data) > 16 << 10
    tensors[name] = (shape, kind, data[:5000] + bytes(64) + data[5064:])
    return ggufs.write(to, keys, tensors)


@pytest.mark.parametrize("full", [False, True])
def test_weights_between_the_samples(full: bool, base: Path, tmp_path: Path) -> None:
    """Only a checkpoint that was taken with all bytes is refused by the other model."""
    other = retrained(base, tmp_path / "other.gguf")
    with context(base) as one, context(other) as two, context(base) as three:
        one.decode([1, 2, 3])
        one.declare(full=full)
        one.declare(rope={})  # which does not take it back
        checkpoint = one.checkpoint(0)
        assert ("all weights" in checkpoint.fingerprint.model) == full
        three.resume(checkpoint)
        three.declare(full=True)
        three.resume(checkpoint)
        if not full:
            two.resume(checkpoint)
            return
        with pytest.raises(ls.MismatchError) as caught:
            two.resume(checkpoint)
        assert names([*caught.value.differences]) == ["all weights"]


def test_all_bytes_of_a_file_that_is_gone(base: Path) -> None:
    """It was sampled when it was there; the rest can no longer be read."""
    with context(base) as ctx:
        ctx.decode([1, 2, 3])
        sampled = ctx.fingerprint
        base.unlink()
        assert ctx.fingerprint == sampled
        ctx.declare(full=True)
        with pytest.warns(ls.IdentityWarning, match=r"all weights \(the file cannot be read"):
            checkpoint = ctx.checkpoint(0)
        with pytest.raises(ls.MismatchError, match="all weights"):
            ctx.resume(checkpoint)


# -- every field: the same, different, unknown here or there, unknown on both sides

NEVER_COMPARED = {"module", "llama.cpp build"}
# What a state records itself is compared where it is known.
RECORDED = {"session version", "type_k", "type_v", *NEVER_COMPARED}
# What a restore makes another where it must.
FORM = {"session version", "streams", "flash attention"}
SECTIONS = [field.name for field in dataclasses.fields(ls.Fingerprint) if field.name != "unknown"]


def without(known: ls.Fingerprint, section: str, name: str) -> ls.Fingerprint:
    rest = {key: text for key, text in getattr(known, section).items() if key != name}
    return dataclasses.replace(known, **{section: rest}, unknown={name: "nobody said"})


def test_every_field(base: Path) -> None:
    """Of a real fingerprint, so that a field that is added is in this table too."""
    with context(base) as ctx:
        ctx.decode([1, 2, 3])
        known, checkpoint = ctx.fingerprint, ctx.checkpoint(0)
        table = [(section, name) for section in SECTIONS for name in getattr(known, section)]
        assert len(table) > 15
        assert set(known.context) > RECORDED - {"llama.cpp build"}  # old builds do not say it
        for section, name in table:
            lacking = without(known, section, name)
            changed = {**getattr(known, section), name: "another"}
            other = dataclasses.replace(known, **{section: changed})
            expected = [] if name in NEVER_COMPARED else [name]
            assert names(known.differences(other)) == expected
            for saved, current in ((lacking, known), (known, lacking), (lacking, lacking)):
                assert names(saved.differences(current)) == expected, name
            for fingerprint in (other, lacking) if expected else ():
                strange = ls.Checkpoint(
                    checkpoint.payload,
                    kind="sequence",
                    source=0,
                    session_version=checkpoint.session_version,
                    fingerprint=fingerprint,
                )
                if name in FORM:
                    assert ctx.resume(strange).converted is None
                    continue
                with pytest.raises(ls.MismatchError, match=re.escape(name)):
                    ctx.resume(strange)
        for name in RECORDED:  # not said to be unknown, just not there
            rest = without(known, "context", name).context
            assert known.differences(ls.Fingerprint(known.model, rest)) == []


def test_two_bare_pointers_of_other_weights(base: Path, tmp_path: Path) -> None:
    """Models of one shape, and nobody said what they are: a strict resume refuses."""
    seed = write_model(tmp_path / "seed.gguf", text=True, seed=1)
    with context(base) as one, context(seed) as two:
        one.decode([1, 2, 3])
        with pytest.warns(ls.IdentityWarning, match="model file"):
            checkpoint = ls.attach(one.pointer, LIBRARY).checkpoint(0)
        bare = ls.attach(two.pointer, LIBRARY)
        with pytest.raises(ls.MismatchError, match="model_path") as caught:
            bare.resume(checkpoint)
        assert names([*caught.value.differences]) == ["model file", "adapters", "rope"]
        assert two.n_past() == 0


# -- the context


def test_adapters(base: Path, tmp_path: Path) -> None:
    """By content and scale; those of scale 0 do nothing, and their order is nothing either."""
    one, two = adapter(tmp_path / "1.gguf"), adapter(tmp_path / "2.gguf", seed=1)
    copy = shutil.copy(one, tmp_path / "copy.gguf")
    with context(base) as ctx:
        plain = ctx.fingerprint

        def declared(*adapters: tuple[os.PathLike[str] | str, float]) -> ls.Fingerprint:
            ctx.declare(adapters=adapters)
            return ctx.fingerprint

        assert declared((one, 0.0)) == plain
        first = declared((one, 1.0))
        assert names(plain.differences(first)) == ["adapters"]
        assert first.differences(declared((copy, 1.0))) == []
        assert names(first.differences(declared((one, 0.5)))) == ["adapters"]
        assert names(first.differences(declared((two, 1.0)))) == ["adapters"]
        assert declared((one, 1.0), (two, 0.5)) == declared((two, 0.5), (one, 1.0))
        alpha = adapter(tmp_path / "3.gguf", alpha=8.0)
        assert names(first.differences(declared((alpha, 1.0)))) == ["adapters"]
        kept = ctx.fingerprint
        with pytest.raises(FileNotFoundError):
            ctx.declare(adapters=[(tmp_path / "missing.gguf", 1.0)], rope={"rope_freq_base": 1})
        assert ctx.fingerprint == kept


def test_rope_settings(base: Path) -> None:
    """Those that are not the model's own, whichever way that is said."""
    own = {
        "rope_scaling_type": -1,
        "rope_freq_base": 0.0,
        "rope_freq_scale": 0.0,
        "yarn_ext_factor": -1.0,
        "yarn_attn_factor": 1.0,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": -1.0,
        "yarn_orig_ctx": 0,
    }
    with context(base) as ctx:
        plain = ctx.fingerprint
        ctx.declare(rope=own)
        assert ctx.fingerprint == plain
        ctx.declare(
            rope={**own, "rope_freq_base": 5e4, "yarn_orig_ctx": 64, "rope_scaling_type": 2}
        )
        assert plain.differences(ctx.fingerprint) == [
            (
                "rope",
                "the model's own",
                "rope_scaling_type yarn, rope_freq_base 50000.000000, yarn_orig_ctx 64",
            )
        ]
        ctx.declare(rope={})
        assert ctx.fingerprint == plain
        with pytest.raises(ls.UnsupportedError, match="'freq_base' is not one of rope_"):
            ctx.declare(rope={"freq_base": 1.0})


def test_a_value_that_is_the_models_own(tmp_path: Path) -> None:
    """Giving what the model has anyway changes nothing."""
    path = write_model(tmp_path / "m.gguf", overrides={"rope.freq_base": 5000.0})
    with context(path) as ctx:
        ctx.declare(rope={"rope_freq_base": 5000.0})
        assert ctx.fingerprint.context["rope"] == "the model's own"


def test_what_was_learned_of_the_caches(make: Make) -> None:
    """Asked types at first; what a state has shown once one was seen."""
    ctx = make(n_seq_max=2)
    before = ctx.fingerprint.context
    assert (before["module"], before["type_k"], before["type_v"]) == ("kv", "f16", "f16")
    assert before["session version"] == str(LIBRARY.session_version)
    assert before.get("llama.cpp build", "") == LIBRARY.build
    ctx.decode([1, 2, 3])
    ctx.restore(ctx.snapshot())
    after = ctx.fingerprint.context
    assert after["streams"] == "2"
    assert after["flash attention"] in ("on", "off")
    quantized = make(type_k="q8_0", flash_attn=True).fingerprint
    assert ("type_k", "f16", "q8_0") in ctx.fingerprint.differences(quantized)


def test_a_closed_context_has_none(make: Make) -> None:
    ctx = make()
    ctx.close()
    with pytest.raises(ls.ClosedError):
        _ = ctx.fingerprint
    with pytest.raises(ls.ClosedError):
        ctx.declare(rope={})
