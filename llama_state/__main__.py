"""``python -m llama_state``: see :mod:`llama_state.cli`."""

import sys

from .cli import main

sys.exit(main())
