"""The checkpoint container's bytes; documented name of :mod:`llama_state.checkpoint.container`."""

from .checkpoint.container import *  # noqa: F403
