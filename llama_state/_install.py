"""How llama_state is installed: the one place that says so, for all messages.

It is in no package index. A message that named it there would make its readers install whatever
somebody else puts under that name, so all of them lead to a checkout.
"""

from __future__ import annotations


def pip_install(*extras: str) -> str:
    """Return the command that installs the package with *extras*, and where to run it."""
    what = f"'.[{','.join(extras)}]'" if extras else "."
    return f"pip install -e {what} in a checkout of llama_state"
