"""A checkpoint shown: as a line of text, and as a table in notebooks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .._io.markup import table

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


def line(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint holds as a line."""
    arch = checkpoint.fingerprint.model.get("architecture", "an unknown model")
    extras = [f"{_n_token(checkpoint)} tokens", f"{len(checkpoint)} bytes"]
    if checkpoint.media:
        extras[0] += f" with {len(checkpoint.media)} media"
    if checkpoint.logits is not None:
        extras.append("logits")
    if checkpoint.restore_points:
        extras.append(f"{len(checkpoint.restore_points)} restore points")
    return (
        f"<Checkpoint of {_what(checkpoint)} of {arch}: {', '.join(extras)}, "
        f"session version {checkpoint.session_version}>"
    )


def as_table(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint holds as HTML."""
    known = checkpoint.fingerprint
    meta = checkpoint.meta
    logits = checkpoint.logits
    rows: list[tuple[str, object]] = [
        ("state of", _what(checkpoint)),
        ("bytes", f"{len(checkpoint):,}"),
        ("session version", checkpoint.session_version),
        ("tokens", f"{_n_token(checkpoint):,}"),
        ("images and sounds", len(checkpoint.media)),
        ("logits", "" if logits is None else f"{len(logits):,}"),
        ("restore points", len(checkpoint.restore_points)),
        ("meta", json.dumps(meta, ensure_ascii=False) if meta else ""),
    ]
    for title, fields in (
        ("model", known.model),
        ("context", known.context),
        ("not known", known.unknown),
    ):
        rows += [(f"{title}: {name}", text) for name, text in fields.items()]
    return table([row for row in rows if row[1]], caption="Checkpoint")


def _what(checkpoint: Checkpoint) -> str:
    if checkpoint.kind == "whole":
        return "the whole context"
    return f"sequence {checkpoint.source}"


def _n_token(checkpoint: Checkpoint) -> int:
    return len(checkpoint.slot.tokens if checkpoint.slot else checkpoint.tokens)
