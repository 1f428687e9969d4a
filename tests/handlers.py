"""Finds where a signal would skip what a block does at its end: ``python tests/handlers.py``.

Python 3.13 and 3.14 compile a loop's jump back without the handlers of the block around it, where
a condition is just in front of it. They look for signals at that jump. So an exception of a signal
there skips ``finally`` and ``__exit__`` in that function; those of its callers are kept. Python up
to 3.12 and from 3.15 on do not. What a generator does at its end it does all the same, when the
context manager is dropped. All else has no such loop in its block: a function of its own has it.

It needs no other module, to run on any Python.
"""

from __future__ import annotations

import ast
import dis
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

PACKAGE = Path(__file__).parent.parent / "llama_state"
DROPPED = {"suppress", "TemporaryDirectory", "open"}
"""What does nothing at its end, or as well when it is dropped."""


def main() -> int:
    """Print what was found; 1 if anything was."""
    found = [f"{path}:{line}" for path, line in skipped(PACKAGE)]
    print(*found, sep="\n")
    print(f"Python {sys.version.split()[0]}: {len(found)} loops skip the end of their block")
    return bool(found)


def skipped(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the file and line of each loop in a folder from which a signal skips a block's end."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}
    dropped = DROPPED.union(*map(_generators, texts.values()))
    for path, text in texts.items():
        for line in skipped_of(text, dropped):
            yield path, line


def skipped_of(text: str, dropped: set[str]) -> Iterator[int]:
    """Yield the line of each such loop of a module."""
    blocks = [block for node in ast.walk(ast.parse(text)) for block in _ends(node, dropped)]
    for code in _codes(compile(text, "module", "exec")):
        for line in _without_handler(code):
            if any(code.co_firstlineno <= first <= line <= last for first, last in blocks):
                yield line


def _generators(text: str) -> Iterator[str]:
    """Yield the names of the context managers of a module that are generators."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            made = {ast.unparse(decorator) for decorator in node.decorator_list}
            if made & {"contextmanager", "asynccontextmanager"}:
                yield node.name


def _ends(node: ast.AST, dropped: set[str]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last line of a block that something is done at the end of."""
    match node:
        case ast.With(items, body) | ast.AsyncWith(items, body):
            ends = any(_called(item.context_expr) not in dropped for item in items)
        case ast.Try(body, handlers, _, final):
            caught = {each.type and ast.unparse(each.type) for each in handlers}
            ends = bool(final or caught & {None, "BaseException"})
        case _:
            return
    if ends:
        yield body[0].lineno, body[-1].end_lineno or 0


def _called(node: ast.expr) -> str | None:
    match node:
        case ast.Call(ast.Name(name) | ast.Attribute(attr=name)):
            return name
    return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _without_handler(code: CodeType) -> Iterator[int]:
    """Yield the lines of jumps back that lack the handler of what they jump to."""
    handled = [range(each.start, each.end) for each in dis._parse_exception_table(code)]  # type: ignore[attr-defined]

    def is_handled(offset: int) -> bool:
        return any(offset in block for block in handled)

    for each in dis.get_instructions(code):
        jumps = each.opname == "JUMP_BACKWARD" and is_handled(each.argval)
        if jumps and not is_handled(each.offset) and each.positions and each.positions.lineno:
            yield each.positions.lineno


if __name__ == "__main__":
    sys.exit(main())
