"""Of the younger kinds of model the slow tests try few examples, of the others all."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st

import llama_state as ls
from tests.fuzz.__main__ import spread
from tests.kinds import SAMPLED, SHARE, SLOWEST_SHARE, examples, given
from tests.libllama import MODELS

pytestmark = pytest.mark.libllama

tried: Counter[str] = Counter()


@given(number=st.integers())
def count(model: ls.Model, number: int) -> None:
    tried[model.arch] += 1


@pytest.mark.parametrize(
    ("profile", "share", "slowest"),
    [("quick", SHARE, SLOWEST_SHARE), ("whole", 1, 1), ("soak", 1, 1)],
)
def test_examples(
    model: ls.Model, profile: str, share: int, slowest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share in the profiles of CI, each in the others: of every slow test."""
    monkeypatch.setenv("HYPOTHESIS_PROFILE", profile)
    whole = settings().max_examples
    expected = whole // share if model.arch in SAMPLED else whole
    tried.clear()
    count(model=model)
    assert tried[model.arch] == examples(model.arch).max_examples == expected
    assert examples(model.arch, slowest=True).max_examples == whole // slowest


def test_fuzz(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases of a run are spread likewise, and none is lost."""
    kinds = list(MODELS)
    sampled = {kind for kind in kinds if kind.rpartition("-")[0] in SAMPLED}
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "ci")
    shares = spread(9000, kinds)
    assert sum(shares.values()) >= 9000
    assert all(abs(SHARE * shares[kind] - shares["llama-dense"]) < SHARE for kind in sampled)
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "whole")
    assert len(set(spread(9000, kinds).values())) == 1
