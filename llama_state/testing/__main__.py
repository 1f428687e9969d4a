"""``python -m llama_state.testing`` is ``llama-state check``."""

from __future__ import annotations

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
