"""Checkpoints: a state with all that is needed to trust it later, on another machine."""

from __future__ import annotations

from .checkpoint import Checkpoint
from .fingerprint import Fingerprint, model_fields

__all__ = ["Checkpoint", "Fingerprint", "model_fields"]
