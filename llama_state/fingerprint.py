"""What a state belongs to; documented name of :mod:`llama_state.checkpoint.fingerprint`."""

from .checkpoint.fingerprint import *  # noqa: F403
