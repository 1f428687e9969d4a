"""Checkpoints: a state with everything that must be known to trust it later, elsewhere."""

from __future__ import annotations

from .checkpoint import Checkpoint
from .fingerprint import Fingerprint, model_fields

__all__ = ["Checkpoint", "Fingerprint", "model_fields"]
