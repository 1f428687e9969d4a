"""Print the public API as Markdown: ``python docs/make_api.py > docs/api.md``."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

MODULES = (
    "",
    ".adapters.llama_cpp",
    ".aio",
    ".container",
    ".fingerprint",
    ".inspection",
    ".layout",
    ".testing",
    ".testing.conformance",
    ".testing.strategies",
)
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
ITEM = re.compile(r" {4}(?P<names>\S[^:]*): (?P<text>.*)")
ROLE = re.compile(r":\w+:`[~.]*(?:llama_state\.)?([^`]+)`")
NOISE = (
    (r"\(self(, )?", "("),
    (r"ForwardRef\('([^']*)'\)|hypothesis\.strategies\.", r"\1"),
    (r"(: |-> )(['\"])(.*?)\2", r"\1\3"),
    (r"= (\{.*\}|<factory>)(?=[,)])", "= ..."),
)


def markdown(thing: object) -> Iterator[str]:
    """Yield the docstring of *thing* as Markdown: its sections become lists."""
    listed = False
    doc = ROLE.sub(r"`\1`", inspect.getdoc(thing) or "").replace("``", "`")
    for line in doc.splitlines():
        if match := SECTION.fullmatch(line):
            listed = match[1] not in ("Returns", "Yields")
            yield from (f"*{match[1]}*", "")
        elif listed and (match := ITEM.fullmatch(line)):
            names = ", ".join(f"`{name}`" for name in match["names"].split(", "))
            yield f"- {names}: {match['text']}"
        else:
            yield ("  " if listed else "") + line.strip()
    yield ""


def signature(name: str, thing: Callable[..., Any]) -> str:
    """The call of *thing* as code: no self, no quotes around types, no long defaults."""
    text = name + str(inspect.signature(thing))
    for pattern, new in NOISE:
        text = re.sub(pattern, new, text)
    if inspect.isclass(thing):
        text = text.removesuffix(" -> None")
    return f"```python\n{textwrap.fill(text, 100, subsequent_indent='    ')}\n```\n"


def is_hidden(base: type) -> bool:
    """Whether a reader can not look a base up: what it has is listed with the class itself."""
    modules = (import_module(f"llama_state{name}") for name in MODULES)
    public = any(base.__name__ in module.__all__ for module in modules)
    return base.__module__.startswith("llama_state") and not public


def bases(thing: type) -> list[type]:
    """The bases that a reader can look up."""
    found = []
    for base in thing.__bases__:
        found += bases(base) if is_hidden(base) else [base] if base is not object else []
    return found


def members(thing: type) -> dict[str, Any]:
    """What a class has itself, and what it has of bases that are hidden."""
    found = dict(vars(thing))
    for base in filter(is_hidden, thing.__bases__):
        found = {**members(base), **found}
    return found


def described(name: str, thing: Any) -> Iterator[str]:
    """Yield the lines of anything public, and of what a class adds to its bases."""
    yield f"{'####' if '.' in name else '###'} `{name}`\n"
    if isinstance(thing, property):
        yield from markdown(thing)
    elif inspect.isfunction(thing):
        yield from (signature(name.rpartition(".")[2], thing), *markdown(thing))
    elif inspect.isclass(thing) and not hasattr(thing, "__origin__"):
        if listed := [f"`{base.__name__}`" for base in bases(thing)]:
            yield f"Derives from {', '.join(listed)}.\n"
        data = dataclasses.is_dataclass(thing) or issubclass(thing, tuple)
        if data or "\nArgs:" in (inspect.getdoc(thing) or ""):
            yield signature(name, thing)
        yield from markdown(thing)
        for own, value in members(thing).items():
            if own[0] != "_" and (isinstance(value, property) or inspect.isfunction(value)):
                yield from described(f"{name}.{own}", value)
    else:
        short = len(repr(thing)) <= 160 and " object at " not in repr(thing)
        yield f"`{repr(thing) if short else type(thing).__name__}`\n"


def render() -> str:
    """The whole page."""
    lines = ["# API\n", "Made by `python docs/make_api.py` from signatures and docstrings.\n"]
    for module in (import_module(f"llama_state{name}") for name in MODULES):
        lines += [f"## {module.__name__}\n", *markdown(module)]
        for name in module.__all__:
            lines += described(name, getattr(module, name))
    text = "\n".join(line.rstrip(" ") for line in lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    print(render(), end="")
