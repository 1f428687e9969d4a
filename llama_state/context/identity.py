"""The fingerprint of a live context: from its model's file, from llama.cpp, from the caller.

llama.cpp does not say where a model came from, nor which adapters and rope settings a context
has. Only the code that created the context knows. What was not declared is unknown, and the
fingerprint says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from .. import layout
from .._io import StrPath
from .._llama._llama_cffi import lib
from .._llama.facts import Facts, hyperparameters
from .._llama.handles import Call
from .._llama.library import Library
from ..checkpoint.fingerprint import (
    ALL_WEIGHTS,
    MODEL_FILE,
    PLAIN,
    Fingerprint,
    ModelFile,
    Stamp,
    adapter_digest,
    all_weights,
    file_stamp,
    geometry_fields,
    read_model,
    shortened,
)
from ..errors import FormatError, UnsupportedError

Rope: TypeAlias = "Mapping[str, float | str]"
"""Settings by their names in ``llama_context_params``; what is not there is the model's own."""

Adapters: TypeAlias = "Sequence[tuple[StrPath, float]]"
"""(GGUF file, scale) of each adapter."""

_SCALING = ("none", "linear", "yarn", "longrope")
# Name -> the key that has the model's own value, and what llama.cpp takes where there is none.
_ROPE: Mapping[str, tuple[str, str | None]] = {
    "rope_scaling_type": ("rope.scaling.type", None),
    "rope_freq_base": ("rope.freq_base", None),
    "rope_freq_scale": ("", None),  # the inverse of a key: never taken for the model's own
    "yarn_ext_factor": ("rope.scaling.yarn_ext_factor", None),
    "yarn_attn_factor": ("rope.scaling.yarn_attn_factor", "1.000000"),
    "yarn_beta_fast": ("rope.scaling.yarn_beta_fast", "32.000000"),
    "yarn_beta_slow": ("rope.scaling.yarn_beta_slow", "1.000000"),
    "yarn_orig_ctx": ("rope.scaling.original_context_length", None),
}
ROPE_SETTINGS: Final = tuple(_ROPE)
_ANOTHER_FILE = "the file is not, or no longer, the one that the model was loaded from"
# Of other kinds of memory llama.cpp makes some caches of other types than requested.
_AS_REQUESTED = frozenset({"kv", "iswa", "hybrid", "hybrid-iswa"})


class Reading(NamedTuple):
    """What can be read of the adapters of a context.

    Attributes:
        key: Differs when they were changed, as far as that can be seen.
        adapters: Which they are; None if that is not known.
        why: Why it is not, or what to do about it.
    """

    key: object
    adapters: Adapters | None
    why: str = ""


def undeclared() -> Reading:
    """Return what can be read of a context of which nobody says anything."""
    return Reading(None, None, "say with declare(adapters=[...]) which ones the context uses")


@dataclass(frozen=True, slots=True)
class Origin:
    """What only the code that created a context knows; None: not declared.

    Attributes:
        model_path: The model's file, absolute.
        loaded: That file's stamp when it was loaded, or as soon after as we were told of it.
        overrides: Hyperparameters that were set instead of those in the file.
        rope: Rope settings.
        adapters: Reads which LoRA adapters and control vectors are in use now, at each call.
    """

    model_path: str | None = None
    loaded: Stamp | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    rope: Rope | None = None
    adapters: Callable[[], Reading] = undeclared


UNKNOWN: Final = Origin()


def origin_of_file(path: str) -> Origin:
    """Return the origin of contexts of the file that is about to be loaded: nothing else is set."""
    return Origin(*stamped(path), rope={}, adapters=lambda: Reading((), ()))


def stamped(path: StrPath) -> tuple[str, Stamp]:
    """Return a path, absolute, and the stamp of now: one of no files where it is not there."""
    found = Path(path).absolute()
    try:
        return str(found), file_stamp(found)
    except OSError:  # llama.cpp, or the fingerprint, says why
        return str(found), ()


class Identity:
    """What one context computes with. Used under the context's lock."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._rope = None if origin.rope is None else _settings(origin.rope)
        # The adapters as text, with the key of what was read when they were declared, or read.
        self._declared: tuple[object, str] | None = None
        self._read: tuple[object, str] | None = None
        self._model: Fingerprint | None = None
        self._full = False

    def declare(
        self, adapters: Adapters | None, rope: Rope | None = None, *, full: bool = False
    ) -> None:
        """Take over what the caller declares; None and False leave what is known."""
        # Both are looked at before either is kept.
        declared = self._declared
        if adapters is not None:
            declared = self._origin.adapters().key, adapters_text(adapters)
        self._rope = self._rope if rope is None else _settings(rope)
        self._declared = declared
        self._full = self._full or full

    def fingerprint(
        self,
        call: Call,
        library: Library,
        facts: Facts,
        known: layout.Geometry | None,
        *,
        full: bool = False,
    ) -> Fingerprint:
        """Return all that is known now.

        Args:
            call: An open call on the context.
            known: What has been learned of its caches.
            full: Also of all bytes of the weights, as if that were declared.
        """
        if self._model is None:
            self._model = _of_model(call, facts.arch, facts.n_ctx_seq, self._origin)
        model = _with_all_weights(self._model, self._origin) if full or self._full else self._model
        unknown = dict(model.unknown)
        context = {**_of_context(library, facts, known), **model.context}
        try:
            context["adapters"] = self._named(self._origin.adapters())
        except (OSError, FormatError, UnsupportedError, _UndeclaredError) as error:
            unknown["adapters"] = _why(error)
        if self._rope is None:
            unknown["rope"] = (
                "say with declare(rope={...}) which settings the context was made with"
            )
        else:
            context["rope"] = rope_text(self._rope, facts.arch, model.model)
        return Fingerprint(model.model, context, unknown)

    def adapters_key(self) -> str:
        """Return what tells the adapters of now from others, also where they are not known."""
        reading = self._origin.adapters()
        try:
            return self._named(reading)
        except (OSError, FormatError, UnsupportedError, _UndeclaredError):
            return f"not known: {reading.key!r}, declared: {self._declared!r}"

    def _named(self, reading: Reading) -> str:
        """Return the adapters as text: those declared, unless they were changed since."""
        if self._declared is not None:
            key, named = self._declared
            if key != reading.key:
                raise _UndeclaredError("they were changed since declare(): declare them again")
            return named
        if reading.adapters is None:
            raise _UndeclaredError(reading.why)
        if self._read is None or self._read[0] != reading.key:
            self._read = reading.key, adapters_text(reading.adapters)
        return self._read[1]


class _UndeclaredError(Exception):
    """Something that only the caller knows was not declared."""


def adapters_text(adapters: Adapters) -> str:
    """Return adapters by content and scale, sorted; those of scale 0 do nothing."""
    named = sorted(f"{adapter_digest(path)} x {scale:g}" for path, scale in adapters if scale)
    return ", ".join(named) or PLAIN["adapters"]


def rope_text(rope: Mapping[str, str | None], arch: str, model: Mapping[str, str]) -> str:
    """Return the settings that are not the model's own.

    Args:
        rope: What was given, as texts; None for what was not set.
        model: The hyperparameters.
    """
    own = {name: model.get(f"{arch}.{key}", absent) for name, (key, absent) in _ROPE.items()}
    changed = (f"{name} {rope[name]}" for name in own if rope.get(name) not in (None, own[name]))
    return ", ".join(changed) or PLAIN["rope"]


def scalar_text(value: bool | float | str) -> str:
    """Return a value of a model's metadata as llama.cpp shows it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:f}" if isinstance(value, float) else str(value)


def _settings(rope: Rope) -> dict[str, str | None]:
    """Return rope settings as texts like those in a model's metadata, None for "not set"."""
    if unknown := set(rope) - set(_ROPE):
        raise UnsupportedError(f"rope setting {min(unknown)!r} is not one of {', '.join(_ROPE)}")
    return {name: _setting(name, value) for name, value in rope.items()}


def _setting(name: str, value: float | str) -> str | None:
    if name == "rope_scaling_type":
        if isinstance(value, str):
            return value
        return _SCALING[int(value)] if 0 <= value < len(_SCALING) else None
    number = float(value)
    if name == "yarn_orig_ctx":
        return f"{number:.0f}" if number else None
    is_set = number >= 0 if name.startswith("yarn") else number != 0
    return f"{number:f}" if is_set else None


def _of_context(library: Library, facts: Facts, known: layout.Geometry | None) -> dict[str, str]:
    """Return the fields of library and context that are known without reading a state."""
    fields = {"session version": str(library.session_version)}
    if library.build:
        fields["llama.cpp build"] = library.build
    if len(facts.traits) == 1:
        fields["module"] = facts.traits[0].module
        if facts.traits[0].module in _AS_REQUESTED:
            fields |= facts.options.types
    return {**fields, **(geometry_fields(known) if known else {})}


def _of_model(call: Call, arch: str, n_ctx_seq: int, origin: Origin) -> Fingerprint:
    """Return what the file says, where it is the one that was loaded; else what llama.cpp says."""
    reported = _reported(call, arch)
    changed = {key: text for key, text in origin.overrides.items() if key.startswith(f"{arch}.")}
    try:
        file = _loaded_file(origin, reported)
    except (OSError, FormatError, UnsupportedError, _UndeclaredError) as error:
        return Fingerprint({**reported, **changed}, {}, {MODEL_FILE: _why(error)})
    model = {**file.fields, **changed}
    return Fingerprint(model, _rope_factors(model, arch, n_ctx_seq) if file.long_rope else {})


def _rope_factors(model: Mapping[str, str], arch: str, n_ctx_seq: int) -> dict[str, str]:
    """Return which of a model's two sets of factors llama.cpp takes for a context."""
    original = model.get(f"{arch}.rope.scaling.original_context_length")
    length = original or model.get(f"{arch}.context_length", "")
    if not length.isdecimal():
        return {}
    return {"rope factors": "long" if n_ctx_seq > int(length) else "short"}


def _reported(call: Call, arch: str) -> dict[str, str]:
    """Return what llama.cpp says of the loaded model: hyperparameters, sums over its tensors."""
    model = lib.llama_get_model(call.api, call.ptr)
    values = hyperparameters(call.api, model, f"{arch}.")
    return {
        "architecture": arch,
        **{key: shortened(text) for key, text in sorted(values.items())},
        "parameters": str(lib.llama_model_n_params(call.api, model)),
        "tensor bytes": str(lib.llama_model_size(call.api, model)),
    }


def _with_all_weights(model: Fingerprint, origin: Origin) -> Fingerprint:
    """Return *model* with a digest of all bytes, or why there is none."""
    if MODEL_FILE in model.unknown:
        return model
    try:
        digest = all_weights(_loaded_stamp(origin))
    except (OSError, FormatError, _UndeclaredError) as error:
        return Fingerprint(model.model, model.context, {ALL_WEIGHTS: _why(error)})
    return Fingerprint({**model.model, ALL_WEIGHTS: digest}, model.context)


def _loaded_file(origin: Origin, reported: Mapping[str, str]) -> ModelFile:
    """Return the file that the loaded model is of."""
    file = read_model(_loaded_stamp(origin))
    if file.reported != reported:
        raise _UndeclaredError(_ANOTHER_FILE)
    _loaded_stamp(origin)  # what was read while the file was replaced is of neither
    return file


def _loaded_stamp(origin: Origin) -> Stamp:
    """Return the stamp of the file that the loaded model is of, if it is still there."""
    if origin.model_path is None:
        raise _UndeclaredError("attach() was given no model_path")
    stamp = file_stamp(origin.model_path)
    if origin.loaded != stamp:
        raise _UndeclaredError(_ANOTHER_FILE)
    return stamp


def _why(error: Exception) -> str:
    """Return why something is not known, without the paths of this machine."""
    if isinstance(error, OSError):
        return f"the file cannot be read: {error.strerror}"
    return str(error)
