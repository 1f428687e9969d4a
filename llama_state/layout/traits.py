"""What a model decides about the layout of its states and a state does not record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Module = Literal[
    "none",
    "kv",
    "iswa",
    "recurrent",
    "hybrid",
    "hybrid-iswa",
    "hybrid-idx",
    "dsa",
    "dsa-iswa",
    "msa",
    "dsv4",
]
"""The kinds of memory; ``docs/formats.md`` has the payload of each."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a sliding-window layer still attends to.

    Attributes:
        kind: "standard": the last *size* positions. "chunked": positions of the same
            aligned chunk of *size* positions.
        size: Positions.
    """

    kind: Literal["standard", "chunked"]
    size: int

    def first_after(self, missing: int) -> int:
        """Return the smallest position whose window does not reach back to *missing*."""
        if self.kind == "standard":
            return missing + self.size
        return (missing // self.size + 1) * self.size


@dataclass(frozen=True, slots=True)
class Traits:
    """One way in which the states of a model can be laid out.

    Attributes:
        arch: The GGUF's ``general.architecture``; "" where not known.
        module: The kind of memory.
        k_only: The attention caches store no V. Caches of which this is true in any
            model (those of dsa and dsv4, the indexer of hybrid-idx) do not depend on it.
        ext: Cells carry 2-D positions (M-RoPE); indexer caches do not.
        ple: The model has n-gram embeddings: every cell, of indexer caches too, carries what
            *ext* says, and recurrent layers may have n-gram states.
        window: The window of the "swa" cache; None where there is none or it is not known.
    """

    arch: str
    module: Module
    k_only: bool = False
    ext: bool = False
    ple: bool = False
    window: Window | None = None

    def rewind_min(self, low: int, high: int) -> int:
        """Return the smallest position to which a sequence can truthfully be cut back.

        That is: from which tokens decoded anew see all that they saw the first time. Where a
        windowed cache begins at *low* > 0, what came before may be missing from it; a sequence
        that really begins there can be cut back further than this says.

        Args:
            low: Smallest position of the sequence as llama.cpp reports it.
            high: Largest one.
        """
        if self.module in _UNCUT:
            return max(low, 0)
        if not self.windowed:
            return high + 1
        return self.rewind_past(low - 1, high) if low > 0 else 0

    @property
    def windowed(self) -> bool:
        """True when it takes a window to say how far a sequence can be cut back."""
        return self.module in _WINDOWED

    def rewind_past(self, missing: int, high: int) -> int:
        """Return :meth:`rewind_min` where *missing* is the last position that "swa" lacks."""
        if self.window is None:
            return high + 1
        return min(self.window.first_after(missing), high + 1)


_UNCUT = frozenset({"kv", "dsa", "msa", "none"})
_WINDOWED = frozenset({"iswa", "dsa-iswa"})


@dataclass(frozen=True, slots=True)
class SubCache:
    """One sub-cache of a module.

    Attributes:
        name: How this library calls it.
        kind: Its grammar.
        k_only: True: stores no V in any model. False: stores V in any model. None: the
            model decides.
        indexer: Its cells are not M-RoPE cells.
        mirrors: The cache whose cell list it repeats.
        within: The cache that has all its positions and possibly more.
        partial: It is in partial states too.
        optional: It may be missing at the end of a payload.
        answers: llama.cpp asks it for the positions of a sequence.
    """

    name: str
    kind: Literal["kv", "recurrent", "compressed", "compressor"] = "kv"
    k_only: bool | None = None
    indexer: bool = False
    mirrors: str | None = None
    within: str | None = None
    partial: bool = True
    optional: bool = False
    answers: bool = False


_RECURRENT = SubCache("recurrent", "recurrent", answers=True)

SUB_CACHES: Mapping[Module, tuple[SubCache, ...]] = MappingProxyType(
    {
        "none": (),
        "kv": (SubCache("kv", answers=True),),
        "iswa": (SubCache("base", partial=False), SubCache("swa", within="base", answers=True)),
        "recurrent": (_RECURRENT,),
        "hybrid": (SubCache("attn", partial=False, answers=True), _RECURRENT),
        "hybrid-iswa": (
            SubCache("base", partial=False),
            SubCache("swa", within="base", answers=True),
            _RECURRENT,
        ),
        "hybrid-idx": (
            SubCache("attn", partial=False, answers=True),
            _RECURRENT,
            SubCache(
                "idx", k_only=True, indexer=True, mirrors="attn", partial=False, optional=True
            ),
        ),
        "dsa": (
            SubCache("mla", k_only=True, answers=True),
            SubCache("lid", k_only=True, indexer=True, mirrors="mla"),
        ),
        "dsa-iswa": (
            SubCache("mla", k_only=True, partial=False),
            SubCache("lid", k_only=True, indexer=True, mirrors="mla", partial=False),
            SubCache("swa", k_only=True, within="mla", answers=True),
        ),
        "msa": (
            SubCache("base", k_only=False, answers=True),
            SubCache("idx", k_only=False, indexer=True, mirrors="base"),
        ),
        "dsv4": (
            SubCache("base", k_only=True, partial=False),
            SubCache("swa", k_only=True, within="base", answers=True),
            SubCache("csa", "compressed", partial=False),
            SubCache("hca", "compressed", partial=False),
            SubCache("lid", "compressed", partial=False),
            SubCache("csa state", "compressor"),
            SubCache("hca state", "compressor"),
            SubCache("lid state", "compressor"),
        ),
    }
)
"""The sub-caches of each kind of memory, in the order of their payloads."""


def has_partial(module: Module) -> bool:
    """Return whether a partial state of *module* is another than the full one."""
    return not all(sub_cache.partial for sub_cache in SUB_CACHES[module])


def sub_caches(module: Module, *, partial: bool = False) -> tuple[SubCache, ...]:
    """Return the sub-caches that a full, or a *partial*, state of *module* holds."""
    return tuple(sub_cache for sub_cache in SUB_CACHES[module] if sub_cache.partial or not partial)
