"""How many modules of llama_state a restore walks through, and how deep its calls are.

    python benchmarks/call_depth.py [--limit MODULES DEPTH] [--verbose] [METHOD...]

Each method is called on a tiny context, with a profile hook that sees all frames of the package.
The rooms ``_io`` and ``layout`` know nothing of contexts: each counts as one module, and a call
into one as one call, however deep a format nests. The columns "all" count every module and frame.

Needs the extra ``testing`` and the libllama that ``load_library()`` finds. Exit status 1 where a
method is over the limit. The second call is counted: the first one imports and probes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import llama_state as ls
from llama_state.testing import write_model

PACKAGE = Path(ls.__file__).parent
METHODS = ("load_state", "seq_load_state", "restore", "resume")
TOKENS = (1, 2, 3, 5, 8)
# Frames that are no function of anybody; Python 3.12 has no frame for most of them.
_INLINE = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})
LINE = "{:<16} {:>7} {:>6} {:>8} {:>6} {:>6}"
# Rooms that count as one module.
CLOSED = ("_io", "layout")


@dataclass
class Walk:
    """What one call went through.

    Attributes:
        name: The method of ``Context``.
        files: The modules that it ran code of.
        deepest: Its deepest stack, outermost first, as "module:function".
        depth: Frames on the deepest stack up to the first of a closed room.
        calls: How many functions were called, resumed generators included.
    """

    name: str
    files: set[str]
    deepest: list[str]
    depth: int = 0
    calls: int = 0

    @property
    def modules(self) -> set[str]:
        """The modules, a closed room as one."""
        return {room if (room := file.split("/")[0]) in CLOSED else file for file in self.files}

    def see(self, stack: list[str]) -> None:
        """Compare a stack with the deepest so far."""
        if len(stack) > len(self.deepest):
            self.deepest = stack
        outside = [frame for frame in stack if frame.split("/")[0] not in CLOSED]
        self.depth = max(self.depth, len(outside) + (len(outside) < len(stack)))


def walk(name: str, function: Callable[[], object]) -> Walk:
    """Call *function* and look at every frame of the package."""
    found = Walk(name, set(), [])
    known: dict[str, str | None] = {}

    def module(frame: FrameType) -> str | None:
        file = frame.f_code.co_filename
        if file not in known:
            path = Path(file)
            inside = path.is_relative_to(PACKAGE)
            known[file] = str(path.relative_to(PACKAGE)) if inside else None
        return None if frame.f_code.co_name in _INLINE else known[file]

    def hook(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (own := module(frame)) is None:
            return
        found.files.add(own)
        found.calls += 1
        stack = []
        at: FrameType | None = frame
        while at is not None:
            if (of := module(at)) is not None:
                stack.append(f"{of}:{at.f_code.co_name}")
            at = at.f_back
        found.see(stack[::-1])

    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found


def walks(names: Sequence[str] = METHODS) -> list[Walk]:
    """Restore with each of these methods."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_model(folder / "model.gguf")
        with ls.Model(path) as model, model.context(n_ctx=256, n_threads=1) as ctx:
            ctx.decode(TOKENS)
            ctx.save_state(folder / "whole", TOKENS)
            ctx.seq_save_state(folder / "sequence", 0, TOKENS)
            blob, checkpoint = ctx.snapshot(), ctx.checkpoint(0, tokens=TOKENS)
            calls: dict[str, Callable[[], object]] = {
                "load_state": lambda: ctx.load_state(folder / "whole"),
                "seq_load_state": lambda: ctx.seq_load_state(folder / "sequence"),
                "restore": lambda: ctx.restore(blob),
                "resume": lambda: ctx.resume(checkpoint),
            }
            for method in names:
                calls[method]()
            return [walk(method, calls[method]) for method in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--limit", nargs=2, type=int, metavar=("MODULES", "DEPTH"))
    parser.add_argument("--verbose", action="store_true", help="name the modules and the stack")
    options = parser.parse_args(arguments)
    unknown = set(options.methods).difference(METHODS)
    if unknown:
        parser.error(f"no such method: {', '.join(sorted(unknown))}")
    found = walks(options.methods or METHODS)
    print(LINE.format("", "modules", "depth", "all mod.", "depth", "calls"))
    for one in found:
        every = len(one.files), len(one.deepest)
        print(LINE.format(one.name, len(one.modules), one.depth, *every, one.calls))
        if options.verbose:
            print("", *sorted(one.files), "", *one.deepest, "", sep="\n  ")
    if options.limit is None:
        return 0
    modules, depth = options.limit
    over = [one.name for one in found if len(one.modules) > modules or one.depth > depth]
    if over:
        print(f"over {modules} modules or {depth} frames: {', '.join(over)}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
