"""The commands that need a libllama: ``demo`` and ``doctor``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._llama.library import Library
    from . import Commands

DEMO_CONFIGURATIONS = {
    "one sequence": {},
    "three, split": {"n_seq_max": 3},
    "three, unified": {"n_seq_max": 3, "kv_unified": True},
}


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    demo = commands.add_parser("demo", help="save and restore every way there is, and compare")
    demo.add_argument("--model", metavar="M.gguf", help="use this model instead of a tiny one")
    demo.add_argument("--json", action="store_true", help="print the rows as JSON")
    demo.set_defaults(trouble=1, run=lambda options: run_demo(options.model, as_json=options.json))
    doctor = commands.add_parser("doctor", help="which libllama is used, and why")
    doctor.set_defaults(trouble=1, run=lambda options: run_doctor())


def run_demo(path: str | None, *, as_json: bool) -> int:
    """Round trips on the model at *path*, or on a tiny one made for the purpose."""
    from .._llama.discovery import load_library
    from ..context.model import Model
    from ..testing.conformance import check_model
    from ..testing.models import write_model

    library = load_library()
    with tempfile.TemporaryDirectory(prefix="llama_state-demo-") as folder:
        model = Path(path) if path else write_model(Path(folder) / "llama-dense.gguf")
        with Model(model, library) as opened:
            report = check_model(opened, configurations=DEMO_CONFIGURATIONS)
    print(json.dumps(report.as_dict(), indent=1) if as_json else report)
    if not as_json:
        print("every round trip is equal" if report.ok else "A ROUND TRIP IS NOT EQUAL")
    return 0 if report.ok else 1


def run_doctor() -> int:
    """Say which libllama is used, what it can do, and what else is there."""
    from .._llama.discovery import candidates, load_library

    looked_for = list(candidates())  # before ours is in the process too
    library = load_library()
    print("\n".join(_describe(library)))
    print("\nlooked for, in this order")
    used = False
    for candidate in looked_for:
        if candidate.path is None:
            why = candidate.why
        elif not used and candidate.path.resolve() == library.path:
            used, why = True, f"used: {candidate.path}"
        elif used:
            why = f"not used, the one above comes first: {candidate.path}"
        else:
            why = f"not usable: {candidate.path}"
        print(f"  {candidate.place:<34} {why}")
    return 0


def _describe(library: Library) -> Iterator[str]:
    from .._llama.library import CAPABILITIES

    head = "with" if library.sequence_head else "without"
    facts = {
        "libllama": library.path,
        "build": library.build or "does not say",
        "session files": f"version {library.session_version}",
        "sequence files": f"version {library.sequence_version}",
        "sequence blobs": f"{head} the 8-byte head",
        **{name: "yes" if name in library.capabilities else "no" for name in CAPABILITIES},
    }
    for name, fact in facts.items():
        yield f"{name:<20} {fact}"
