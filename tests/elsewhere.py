"""States that one build of llama.cpp writes, to be restored on the others.

    LLAMA_STATE_LIBRARY=... python -m tests.elsewhere FOLDER

writes states of every kind of tiny model that the library can load, with the logits that it
computes after them. ``LLAMA_STATE_STATES`` names a folder of such folders, one for each build, for
``tests/context/test_conversion.py``; ``.ci/matrix.py`` has all builds write theirs first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llama_state as ls

ENVIRONMENT: Final = "LLAMA_STATE_STATES"
PROMPTS: Final = (tuple(range(2, 50)), tuple(range(60, 75)))  # the first one leaves every window
NEXT: Final = 7
FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "flash, one stream": {"flash_attn": True, "kv_unified": True, "n_seq_max": 2},
    "plain, one stream": {"flash_attn": False, "kv_unified": True, "n_seq_max": 3},
    "flash, split": {"flash_attn": True, "kv_unified": False, "n_seq_max": 3},
    "plain, split": {"flash_attn": False, "kv_unified": False, "n_seq_max": 2},
}
"""Contexts that differ in nothing but how their states are written, and the order of sums."""


@dataclass(frozen=True)
class Written:
    """What a build has written of one kind of model, in one form.

    Attributes:
        folder: Has "whole", "sequence0" and "sequence1", native files, the blobs "blob0" and
            "blob1", "checkpoint0", and "logits0" and "logits1", those of :data:`NEXT` after each
            sequence.
    """

    folder: Path

    def logits(self, seq_id: int) -> memoryview[float]:
        """Return what the build that wrote it computes after a sequence."""
        return memoryview((self.folder / f"logits{seq_id}").read_bytes()).cast("f")


def make(model: ls.Model, form: str, **options: Any) -> ls.Context:
    """Return a context of a form."""
    return model.context(**{"n_ctx": 512, "n_threads": 1, **FORMS[form], **options})


def fill(ctx: ls.Context) -> None:
    """Decode the prompts."""
    for seq_id, prompt in enumerate(PROMPTS):
        ctx.decode(prompt, seq_id)


def next_logits(ctx: ls.Context, seq_id: int) -> memoryview[float]:
    """Return the logits of :data:`NEXT` after a sequence."""
    ctx.decode([NEXT], seq_id)
    return ctx.logits()


def write(model: ls.Model, form: str, folder: Path) -> None:
    """Write what :class:`Written` has."""
    folder.mkdir(parents=True)
    with make(model, form) as ctx:
        fill(ctx)
        ctx.save_state(folder / "whole", PROMPTS[0], durable=False)
        ctx.checkpoint(0, tokens=PROMPTS[0]).save(folder / "checkpoint0", durable=False)
        for seq_id, prompt in enumerate(PROMPTS):
            ctx.seq_save_state(folder / f"sequence{seq_id}", seq_id, prompt, durable=False)
            (folder / f"blob{seq_id}").write_bytes(ctx.seq_snapshot(seq_id))
        for seq_id in range(len(PROMPTS)):
            (folder / f"logits{seq_id}").write_bytes(bytes(next_logits(ctx, seq_id)))


def written(kind: str) -> Iterator[tuple[str, str, Written]]:
    """Yield (build, form, states) of a kind of model, of all builds that have written some."""
    root = os.environ.get(ENVIRONMENT)
    for build in sorted(Path(root).iterdir()) if root else ():
        for form in FORMS:
            if (folder := build / kind / form).is_dir():
                yield build.name, form, Written(folder)


def main() -> None:
    """Write all of them."""
    from tests.libllama import MODELS, close

    for kind, model in MODELS.items():
        for form in FORMS:
            write(model, form, Path(sys.argv[1]) / kind / form)
    close()


if __name__ == "__main__":
    main()
