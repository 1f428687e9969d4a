"""Check what a caller passes, before anything else sees it.

:func:`checked` reads the annotations of a function, or of all public methods of a class, and puts a
gate before it: each argument must be what its annotation says, and a number must be in the range
that belongs to its name. So an annotation is the one place that says what is taken.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import os
import reprlib
import typing
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeAlias, TypeVar

__all__ = ["RANGES", "check_positions", "checked"]

T = TypeVar("T")
Rule: TypeAlias = "Callable[[str, Any], Any]"
"""Takes an argument's name and value; returns the value to use, or raises."""

# The largest number of a position, and of a sequence id, in llama.cpp.
_INT32: Final = 2**31 - 1
# GGML_MAX_N_THREADS: beyond it ggml aborts, or the system kills the process.
_MAX_THREADS: Final = 512
_INTEGER_CODES: Final = "bBhHiIlLqQ"
_FROM_THE_END: Final = "positions count from 0; to mean the end of a sequence leave end out"

RANGES: Final[Mapping[str, tuple[int, int, str]]] = {
    "start": (0, _INT32, _FROM_THE_END),
    "end": (0, _INT32, _FROM_THE_END),
    "first": (0, _INT32, ""),
    "last": (0, _INT32, ""),
    "memory_limit": (0, 2**63 - 1, "it is in bytes"),
    "max_size": (0, 2**63 - 1, "it is in bytes"),
    "capacity_bytes": (0, 2**63 - 1, ""),
    "to_bytes": (0, 2**63 - 1, ""),
    "chunk_tokens": (1, _INT32, ""),
    "shared_tokens": (0, _INT32, ""),
    "pending_bytes": (0, 2**63 - 1, ""),
    "source": (0, _INT32, "it is a sequence id"),
    "logits_of": (0, _INT32, "it is a sequence id"),
    "version": (0, 2**32 - 1, ""),
    "size": (0, 2**63 - 1, "it is in bytes"),
    "n_ctx": (0, _INT32, "0 is what the model was trained with"),
    "n_batch": (1, _INT32, ""),
    "n_seq_max": (1, 256, ""),
    "n_threads": (1, _MAX_THREADS, ""),
    "n_gpu_layers": (-1, _INT32, "-1 is all of them"),
    "n_tokens": (1, _INT32, ""),
    "n_layer": (1, 512, ""),
    "n_head_kv": (1, 2**12, ""),
    "head_dim": (1, 2**12, ""),
    "n_embd": (1, 2**16, ""),
    "n_swa": (0, _INT32, ""),
}
"""Argument -> its smallest value, its largest, and what else to say to who gave another one."""

# What to do instead, for mistakes that are easy to make: by annotation and type of the value.
_ADVICE: Final[Mapping[tuple[str, type | tuple[type, ...]], str]] = {
    ("Iterable[int]", str): "turn text into tokens with Model.tokenize()",
    ("Iterable[int]", bytes): "turn text into tokens with Model.tokenize()",
    ("Buffer", str): "a file is restored with load_state(), or read it first",
    ("Buffer", os.PathLike): "a file is restored with load_state(), or read it first",
    ("Checkpoint", str): "load it with Checkpoint.load(path)",
    ("Checkpoint", os.PathLike): "load it with Checkpoint.load(path)",
    ("Checkpoint", bytes): "read it with Checkpoint.from_bytes(data), or restore() a snapshot",
    ("int", (list, tuple)): "give what is not a number by its name, such as tokens=...",
    ("str", bytes): "decode it first",
    ("Handle", object): "make a context with Model.context(), or with attach()",
}
# Methods without a plain name that take what a caller passes.
_DUNDERS: Final = ("__init__", "__contains__", "__getitem__")


def checked(target: T) -> T:
    """Put a gate before a function, or before every public method of a class.

    The gate raises a TypeError for an argument that is not what its annotation says, and a
    ValueError for a number out of its range; both name it. Iterables of integers arrive as lists,
    and whatever counts as an integer as an int.
    """
    if not isinstance(target, type):
        gate: T = _gate(target)
        return gate
    for name, member in list(vars(target).items()):
        if name.startswith("_") and name not in _DUNDERS:
            continue
        if isinstance(member, classmethod):
            setattr(target, name, classmethod(_gate(member.__func__)))
        elif inspect.isfunction(member) and not inspect.iscoroutinefunction(member):
            setattr(target, name, _gate(member))
    return target


def check_positions(start: int, end: int | None) -> None:
    """Raise ValueError unless ``start <= end``."""
    if end is not None and start > end:
        raise ValueError(f"start is {start}, behind end, which is {end}: give the smaller first")


def _gate(function: Any) -> Any:
    rules: dict[str, functools.partial[Any]] = {}
    in_order, rest = [], None
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = parameter.annotation
        if annotation is parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
            rule: Any = _any
        else:
            rule = functools.partial(_rule(str(annotation), function.__globals__), name)
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = rule
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            in_order.append(rule)
        if parameter.kind is not parameter.POSITIONAL_ONLY:
            rules[name] = rule

    @functools.wraps(function)
    def gate(*args: Any, **kwargs: Any) -> Any:
        if rest is None and len(args) > len(in_order):
            raise _too_many(function, len(args))
        by_place = zip(
            itertools.chain(in_order, itertools.repeat(rest or _any)), args, strict=False
        )
        named = {name: rules.get(name, _any)(value) for name, value in kwargs.items()}
        return function(*(rule(value) for rule, value in by_place), **named)

    return gate


def _any(value: Any) -> Any:
    return value


# -- what an annotation says


@functools.cache
def _split(annotation: str) -> tuple[str, ...]:
    """Return the parts of a union: what stands between the bars that are not in brackets."""
    parts, depth = [""], 0
    for char in annotation:
        depth += (char == "[") - (char == "]")
        if char == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return tuple(part.strip() for part in parts)


def _rule(annotation: str, names: Mapping[str, Any]) -> Rule:
    """Return what checks a value against *annotation*, whose names are those of a module."""
    parts = [part for part in _split(annotation) if part != "None"]
    optional = len(parts) < len(_split(annotation))

    @functools.cache
    def checkers() -> list[Rule]:  # at the first call: the module has all its names then
        return [_checker(part, names) for part in parts]

    def rule(name: str, value: Any) -> Any:
        if value is None and optional:
            return None
        if len(parts) == 1:
            return checkers()[0](name, value)
        for checker in checkers():
            # An error that is kept would keep the frames, and with them what the caller passed.
            with suppress(TypeError):
                return checker(name, value)
        raise _wrong(name, value, " or ".join(parts), parts[-1])

    return rule


def _checker(part: str, names: Mapping[str, Any]) -> Rule:
    """Return the rule of one part of a union."""
    kind, _, inside = part.partition("[")
    if part in _RULES or kind in _RULES:
        return _RULES.get(part) or _RULES[kind]
    if kind == "Literal":
        return _one_of([item.strip(" '\"") for item in inside.rstrip("]").split(",")])
    first, *rest = kind.split(".")
    known = functools.reduce(getattr, rest, names[first])
    if isinstance(known, type):
        return _instance(known)
    if typing.get_origin(known) is typing.Literal:
        return _one_of(typing.get_args(known))
    return _rule(str(known), names)  # an alias of something else


def _wrong(name: str, value: object, wanted: str, annotation: str) -> TypeError:
    """Return the error for a value of the wrong type."""
    advice = "".join(
        f": {text}"
        for (of, kind), text in _ADVICE.items()
        if of == annotation and isinstance(value, kind)
    )
    return TypeError(f"{name} must be {wanted}, not {_shown(value)}{advice}")


def _too_many(function: Any, given: int) -> TypeError:
    """Return the error for more arguments than a function takes by their place."""
    by_place, by_name = [], []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            by_name.append(f"{name}=")
        elif name not in ("self", "cls"):
            by_place.append(name)
        else:
            given -= 1
    allowed = f"{len(by_place)} positional argument{'' if len(by_place) == 1 else 's'}"
    takes = f"{allowed} ({', '.join(by_place)})" if by_place else allowed
    more = f": give the rest by name, {', '.join(by_name)}" if by_name else ""
    return TypeError(f"{function.__name__}() takes {takes}, not {given}{more}")


def _shown(value: object) -> str:
    if value is None:
        return "None"
    short = reprlib.Repr()
    short.maxother = short.maxstring = 40
    return f"{type(value).__name__} {short.repr(value)}"


# -- the rules


def _integer(name: str, value: Any) -> int:
    number = _index(value)
    if number is None:
        raise _wrong(name, value, "an integer", "int")
    low, high, advice = RANGES.get(name, (number, number, ""))
    if not low <= number <= high:
        more = f": {advice}" if advice else ""
        raise ValueError(f"{name} must be {low} to {high}, not {number}{more}")
    return number


def _index(value: Any) -> int | None:
    """Return an integer as an int, None if it is something else: a bool is no number here."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _number(name: str, value: Any) -> Any:
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise _wrong(name, value, "a number", "float")
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be a finite number, not {value}")
    return value


def _flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    # 0 and 1, and numpy's own type.
    if type(value).__name__ == "bool_" or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise _wrong(name, value, "True or False", "bool")


def _path(name: str, value: Any) -> Any:
    if isinstance(value, str) or (
        isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    ):
        return value
    raise _wrong(name, value, "a path as str or os.PathLike", "StrPath")


def _buffer(name: str, value: Any) -> Any:
    try:
        readonly = memoryview(value).readonly
    except TypeError:
        raise _wrong(name, value, "a buffer of bytes", "Buffer") from None
    if name == "out" and readonly:
        raise _wrong(name, value, "a buffer that can be written to", "")
    return value


def _integers(name: str, value: Any) -> Any:
    """Take an iterable of integers: it is read once, here."""
    if isinstance(value, array) and value.typecode in _INTEGER_CODES:
        return value
    text = isinstance(value, (str, bytes, bytearray, Mapping, frozenset, set))
    if text or not isinstance(value, Iterable):
        raise _wrong(name, value, "token ids", "Iterable[int]")
    if isinstance(value, memoryview) and value.format in "Bbc":
        raise _wrong(name, value, "token ids", "Iterable[int]")
    items: Sequence[Any] = getattr(value, "tolist", lambda: list(value))()
    if not isinstance(items, list):  # an array without dimensions
        raise _wrong(name, value, "token ids", "Iterable[int]")
    return list(_each(name, items))


def _each(name: str, items: Iterable[Any]) -> Iterator[int]:
    for at, item in enumerate(items):
        number = item if type(item) is int else _index(item)
        if number is None:
            raise _wrong(f"{name}[{at}]", item, "an integer", "")
        yield number


def _paths(name: str, value: Any) -> Any:
    for at, path in enumerate(_sequence(name, value)):
        _path(f"{name}[{at}]", path)
    return value


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise _wrong(name, value, "callable", "Callable")
    return value


def _sequence(name: str, value: Any) -> Any:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise _wrong(name, value, "a list or another sequence", "Sequence")
    return value


def _scaled(name: str, value: Any) -> Any:
    """Take pairs of a file and a number."""
    for at, pair in enumerate(_sequence(name, value)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise _wrong(f"{name}[{at}]", pair, "a pair of path and scale", "")
        _path(f"{name}[{at}][0]", pair[0])
        _number(f"{name}[{at}][1]", pair[1])
    return value


def _one_of(choices: Sequence[Any]) -> Rule:
    """Return the rule of a literal type."""

    def rule(name: str, value: Any) -> Any:
        if isinstance(value, str) and value in choices:
            return value
        wanted = f"one of {', '.join(choices)}"
        if isinstance(value, str):
            raise ValueError(f"{name} must be {wanted}, not {reprlib.repr(value)}")
        raise _wrong(name, value, wanted, "")

    return rule


def _instance(kind: type) -> Rule:
    """Return the rule of a class."""
    article = "an" if kind.__name__[0] in "AEIO" else "a"
    return _one_kind(kind, f"{article} {kind.__name__}", kind.__name__)


def _one_kind(kind: type | tuple[type, ...], wanted: str, annotation: str) -> Rule:
    """Return the rule of an annotation that is known by the value's class."""

    def rule(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise _wrong(name, value, wanted, annotation)
        return value

    return rule


_mapping = _one_kind(Mapping, "a mapping", "Mapping")

_RULES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(("Any", "object", "P.args"), lambda _, value: value),
    "int": _integer,
    "float": _number,
    "bool": _flag,
    "str": _one_kind(str, "a str", "str"),
    "bytes": _one_kind((bytes, bytearray, memoryview), "bytes", "bytes"),
    "StrPath": _path,
    "Buffer": _buffer,
    "memoryview": _buffer,
    "array": _buffer,
    "Iterable[int]": _integers,
    "Sequence[int]": _integers,
    "Sequence[tuple[StrPath, float]]": _scaled,
    "Sequence[StrPath]": _paths,
    "Sequence": _sequence,
    "Mapping": _mapping,
    "identity.Rope": _mapping,
    "Metadata": _callable,
    "Progress": _callable,
    "Callable": _callable,
}
