"""Whatever is passed to what knows a ``Llama``: a named argument, and nothing has changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state.adapters.llama_cpp import LlamaContext, PromptCache

from ..context.argument_cases import BUFFER, COUNT, NAMES, NO_LIST, OBJECT, TOKENS_32

pytestmark = pytest.mark.llama_cpp

BAD: dict[str, list[Any]] = {
    "llm": OBJECT,
    "library": OBJECT,
    "capacity_bytes": COUNT,
    "store": [each for each in OBJECT if not isinstance(each, (str, Path))],
    "state": OBJECT,
    "blob": BUFFER,
    "tokens": TOKENS_32,
    "adapters": NAMES["adapters"],
    "key": [*NO_LIST, ["1"], [1.5]],
}


def calls(llm: Any, ctx: LlamaContext) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Name -> what is called, whose signature it has, and valid arguments."""
    cache = PromptCache(llm)
    return {
        "LlamaContext": (LlamaContext, LlamaContext, {"llm": llm}),
        "PromptCache": (PromptCache, PromptCache, {"llm": llm}),
        "restore_llama_state": (ctx.restore_llama_state, ctx.restore_llama_state, {}),
        "to_llama_state": (
            ctx.to_llama_state,
            ctx.to_llama_state,
            {"blob": ctx.snapshot(), "tokens": ctx.tokens},
        ),
        "declare": (cache.declare, cache.declare, {"adapters": []}),
        "in": (lambda key: key in cache, cache.__contains__, {"key": [1]}),
        "get": (lambda key: cache[key], cache.__getitem__, {"key": [1]}),
    }


def test_every_parameter_is_checked(make: Callable[..., Any]) -> None:
    """The ``Llama`` and its cache stay what they were."""
    llm = make("llama-dense")
    llm.eval([1, 2, 3])
    ctx = ls.attach(llm)
    assert isinstance(ctx, LlamaContext)
    before, found = (ctx.snapshot(), ctx.tokens), []
    for name, (call, like, given) in calls(llm, ctx).items():
        for parameter in inspect.signature(like).parameters:
            for value in BAD[parameter]:
                try:
                    call(**{**given, parameter: value})
                except (ls.StateError, ValueError, TypeError) as error:
                    if parameter.rstrip("s") not in str(error):
                        found.append(f"{name}({parameter}={value!r}): {error!r}")
                else:
                    found.append(f"{name}({parameter}={value!r}) was taken")
            assert (ctx.snapshot(), ctx.tokens) == before, f"{name}({parameter})"
    assert found == []
