"""The prompt cache of a ``llama_cpp.Llama`` with a real model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llama_state.adapters.llama_cpp import PromptCache
from tests.real.conftest import TEXT

pytestmark = [pytest.mark.real_model, pytest.mark.llama_cpp]

# More than a sliding window of 512 tokens, for which a state cannot be cut.
PREFIX = TEXT.read_text(encoding="utf-8")[:3000]
# What follows is beyond doubt: rounding, which is another in other pieces, changes no token.
QUESTIONS = [
    f"{PREFIX}\n\n{', '.join(map(str, range(start, start + 20)))}," for start in (1, 21, 41)
]


@pytest.fixture
def llm(real_path: Path) -> Iterator[Any]:
    import llama_cpp  # the module is collected where it is not installed

    options = {"n_ctx": 2048, "n_threads": 1, "verbose": False, "flash_attn": True}
    with closing(llama_cpp.Llama(str(real_path), **options)) as made:
        yield made


def test_answers_stay_and_evaluation_goes(llm: Any) -> None:
    """With the cache a known prompt is not evaluated again, and the answers are those without."""
    from tests.adapters.llamas import answer

    expected = []
    for prompt in QUESTIONS:
        llm.reset()
        expected.append(answer(llm, prompt))
    llm.set_cache(PromptCache(llm))
    for again in (False, True):
        for prompt, (text, evaluated) in zip(QUESTIONS, expected, strict=True):
            llm.reset()
            got, now = answer(llm, prompt)
            assert got == text
            assert now < evaluated / 4 or not again
