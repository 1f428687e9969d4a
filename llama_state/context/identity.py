"""The fingerprint of a live context: from its model's file, from llama.cpp, from the caller.

llama.cpp does not say where a model came from, nor which adapters and rope settings a context
has. Only the code that created the context knows. What was not declared is unknown, and the
fingerprint says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from .. import layout
from .._io import StrPath
from .._llama._llama_cffi import lib
from .._llama.facts import Facts, hyperparameters
from .._llama.handles import Call
from .._llama.library import Library
from ..checkpoint.fingerprint import (
    MODEL_FILE,
    PLAIN,
    Fingerprint,
    ModelFile,
    Stamp,
    adapter_digest,
    file_stamp,
    geometry_fields,
    read_model,
    shortened,
)
from ..errors import FormatError, UnsupportedError

Rope: TypeAlias = "Mapping[str, float | str]"
"""Settings by their names in ``llama_context_params``; what is not there is the model's own."""

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
# Of other kinds of memory llama.cpp makes some caches of other types than requested.
_AS_REQUESTED = frozenset({"kv", "iswa", "hybrid", "hybrid-iswa"})


@dataclass(frozen=True, slots=True)
class Origin:
    """What only the code that created a context knows; None: not declared.

    Attributes:
        model_path: The model's file, absolute.
        loaded: That file's stamp when it was loaded.
        overrides: Hyperparameters that were set instead of those in the file.
        rope: Rope settings.
        adapters: (path, scale) of LoRA adapters and control vectors.
    """

    model_path: str | None = None
    loaded: Stamp | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    rope: Rope | None = None
    adapters: Sequence[tuple[StrPath, float]] | None = None


UNKNOWN: Final = Origin()


def origin_of_file(path: str) -> Origin:
    """Return the origin of contexts of the file that is about to be loaded: nothing else is set."""
    try:
        loaded = file_stamp(path)
    except OSError:  # llama.cpp says why
        loaded = None
    return Origin(str(Path(path).absolute()), loaded, rope={}, adapters=())


class Identity:
    """What one context computes with. Used under the context's lock."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._rope = None if origin.rope is None else _settings(origin.rope)
        self._adapters: str | None = None
        self._model: Fingerprint | None = None

    def declare(self, adapters: Sequence[tuple[StrPath, float]] | None, rope: Rope | None) -> None:
        """Take over what the caller declares; None leaves what is known."""
        # Both are looked at before either is kept.
        named = self._adapters if adapters is None else adapters_text(adapters)
        self._rope = self._rope if rope is None else _settings(rope)
        self._adapters = named

    def fingerprint(
        self, call: Call, library: Library, facts: Facts, known: layout.Geometry | None
    ) -> Fingerprint:
        """Return all that is known now.

        Args:
            call: An open call on the context.
            known: What has been learned of its caches.
        """
        if self._model is None:
            self._model = _of_model(call, facts.arch, facts.n_ctx_seq, self._origin)
        model = self._model
        unknown = dict(model.unknown)
        context = {**_of_context(library, facts, known), **model.context}
        try:
            context["adapters"] = self._named_adapters()
        except (OSError, FormatError, UnsupportedError, _UndeclaredError) as error:
            unknown["adapters"] = _why(error)
        if self._rope is None:
            unknown["rope"] = (
                "say with declare(rope={...}) which settings the context was made with"
            )
        else:
            context["rope"] = rope_text(self._rope, facts.arch, model.model)
        return Fingerprint(model.model, context, unknown)

    def _named_adapters(self) -> str:
        if self._adapters is None:
            if self._origin.adapters is None:
                reason = "say with declare(adapters=[...]) which ones the context uses"
                raise _UndeclaredError(reason)
            self._adapters = adapters_text(self._origin.adapters)
        return self._adapters


class _UndeclaredError(Exception):
    """Something that only the caller knows was not declared."""


def adapters_text(adapters: Sequence[tuple[StrPath, float]]) -> str:
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


def _loaded_file(origin: Origin, reported: Mapping[str, str]) -> ModelFile:
    """Return the file that the loaded model is of."""
    if origin.model_path is None:
        raise _UndeclaredError("attach() was given no model_path")
    stamp = file_stamp(origin.model_path)
    if origin.loaded in (None, stamp):
        file = read_model(stamp)
        if file.reported == reported:
            return file
    raise _UndeclaredError("the file is not, or no longer, the one that the model was loaded from")


def _why(error: Exception) -> str:
    """Return why something is not known, without the paths of this machine."""
    if isinstance(error, OSError):
        return f"the file cannot be read: {error.strerror}"
    return str(error)
