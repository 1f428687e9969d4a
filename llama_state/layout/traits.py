"""What the model decides about the layout of its states, and the states do not record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from .._io.arguments import checked

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
    """The positions that a sliding-window layer attends to.

    Attributes:
        kind: "standard": the last *size* positions. "chunked": positions of the same
            aligned chunk of *size* positions.
        size: Positions.
    """

    kind: Literal["standard", "chunked"]
    size: int

    def first_after(self, missing: int) -> int:
        """Return the first position after *missing* whose window does not include *missing*."""
        if self.kind == "standard":
            return missing + self.size
        return (missing // self.size + 1) * self.size


@dataclass(frozen=True, slots=True)
class Traits:
    """A layout that the states of a model can have.

    Attributes:
        arch: The GGUF's ``general.architecture``; "" if not known.
        module: The kind of memory.
        k_only: Whether the attention caches store no V. The caches of dsa and dsv4, and the
            indexer cache of hybrid-idx, store none in any model.
        ext: Whether cells carry 2-D positions (M-RoPE); those of indexer caches never do.
        ple: Whether the model has n-gram embeddings. If so, every cell carries what *ext* adds,
            of indexer caches too, and recurrent layers can have n-gram states.
        window: The window of the "swa" cache; None if there is none or it is not known.
    """

    arch: str
    module: Module
    k_only: bool = False
    ext: bool = False
    ple: bool = False
    window: Window | None = None

    def rewind_min(self, low: int, high: int) -> int:
        """Return the smallest position from which a sequence can be decoded again.

        Tokens decoded from there on attend to all that they attended to the first time. This is
        an estimate: of a windowed cache that begins at *low* > 0 it assumes that earlier
        positions were removed, also if the sequence really begins there.

        Args:
            low: Smallest position of the sequence, as llama.cpp reports it.
            high: Largest position.
        """
        if self.module in _WITHOUT_WINDOW:
            return max(low, 0)
        if not self.windowed:
            return high + 1
        return self.rewind_past(low - 1, high) if low > 0 else 0

    @property
    def windowed(self) -> bool:
        """Whether the window decides how far a sequence can be rewound."""
        return self.module in _WINDOWED

    def rewind_past(self, missing: int, high: int) -> int:
        """Return :meth:`rewind_min`, given the last position that is *missing* from the window."""
        if self.window is None:
            return high + 1
        return min(self.window.first_after(missing), high + 1)


_WITHOUT_WINDOW = frozenset({"kv", "dsa", "msa", "none"})
_WINDOWED = frozenset({"iswa", "dsa-iswa"})


@dataclass(frozen=True, slots=True)
class SubCache:
    """One sub-cache of a module.

    Attributes:
        name: Its name in this library.
        kind: The grammar of its bytes.
        k_only: True: stores no V in any model. False: stores V in every model. None: the
            model decides.
        indexer: Whether its cells carry no M-RoPE positions.
        mirrors: The cache whose cell list it repeats.
        within: The cache that has all its positions, and possibly more.
        partial: Whether partial states hold it.
        optional: Whether it can be missing at the end of a payload.
        reports: Whether llama.cpp takes the positions of a sequence from it.
        ends: Whether it takes only the last one, as the first too: what runs beside the cells
            stands there, so that none of them can be removed.
    """

    name: str
    kind: Literal["kv", "recurrent", "compressed", "compressor"] = "kv"
    k_only: bool | None = None
    indexer: bool = False
    mirrors: str | None = None
    within: str | None = None
    partial: bool = True
    optional: bool = False
    reports: bool = False
    ends: bool = False

    def is_k_only(self, traits: Traits) -> bool:
        """Return whether it stores no V in a model of *traits*."""
        return traits.k_only if self.k_only is None else self.k_only

    def has_ext(self, traits: Traits) -> bool:
        """Return whether its cells carry M-RoPE positions in a model of *traits*."""
        return traits.ple or (traits.ext and not self.indexer)


_RECURRENT = SubCache("recurrent", "recurrent", reports=True)

SUB_CACHES: Mapping[Module, tuple[SubCache, ...]] = MappingProxyType(
    {
        "none": (),
        "kv": (SubCache("kv", reports=True),),
        "iswa": (SubCache("base", partial=False), SubCache("swa", within="base", reports=True)),
        "recurrent": (_RECURRENT,),
        "hybrid": (SubCache("attn", partial=False, reports=True), _RECURRENT),
        "hybrid-iswa": (
            SubCache("base", partial=False),
            SubCache("swa", within="base", reports=True),
            _RECURRENT,
        ),
        "hybrid-idx": (
            SubCache("attn", partial=False, reports=True),
            _RECURRENT,
            SubCache(
                "idx", k_only=True, indexer=True, mirrors="attn", partial=False, optional=True
            ),
        ),
        "dsa": (
            SubCache("mla", k_only=True, reports=True),
            SubCache("lid", k_only=True, indexer=True, mirrors="mla"),
        ),
        "dsa-iswa": (
            SubCache("mla", k_only=True, partial=False),
            SubCache("lid", k_only=True, indexer=True, mirrors="mla", partial=False),
            SubCache("swa", k_only=True, within="mla", reports=True),
        ),
        "msa": (
            SubCache("base", k_only=False, reports=True),
            SubCache("idx", k_only=False, indexer=True, mirrors="base"),
        ),
        "dsv4": (
            SubCache("base", k_only=True, partial=False),
            SubCache("swa", k_only=True, within="base", reports=True, ends=True),
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


@checked
def has_partial(module: Module) -> bool:
    """Return whether a partial state of *module* differs from a full one."""
    return not all(sub_cache.partial for sub_cache in SUB_CACHES[module])


def can_be_left_out(module: Module) -> bool:
    """Return whether a partial state of *module* can be a head alone.

    llama.cpp b11739 leaves out every cache that can be cut back as it is; before, it left out only
    those beside one that cannot.
    """
    caches = SUB_CACHES[module]
    return bool(caches) and not has_partial(module) and all(one.kind == "kv" for one in caches)


def sub_caches(module: Module, *, partial: bool = False) -> tuple[SubCache, ...]:
    """Return the sub-caches that a state of *module* holds, or a *partial* state."""
    return tuple(sub_cache for sub_cache in SUB_CACHES[module] if sub_cache.partial or not partial)
