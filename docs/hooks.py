"""What mkdocs.yml cannot say.

The home page is the README. References in docstrings become links. A public name that has no place
on the pages of the API fails the build.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    {
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
)
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.is_file())

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?\.?([\w.]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the home page, and the examples that a page links to."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))
    for example in EXAMPLES:
        place = f"examples/{example.name}"
        files.append(File.generated(config, place, abs_src_path=str(example)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to the examples to their copies in the site."""
    return markdown.replace("](../examples/", "](examples/")


@event_priority(-100)
def on_post_build(config: MkDocsConfig) -> None:
    """Fail where the inventory of the API lacks a name that a module exports."""
    inventory = (Path(config.site_dir) / "objects.inv").read_bytes()
    body = zlib.decompress(inventory.split(b"\n", 4)[4]).decode()
    listed = {line.split(" ")[0] for line in body.splitlines()}
    package = griffe.load("llama_state", search_paths=[ROOT], resolve_aliases=True)
    missing = []
    for module in MODULES:
        path = module.partition(".")[2]
        found = package[path] if path else package
        # A module that only hands on the names of another has no __all__.
        exported = found.exports or list(found.members)
        missing += [name for n in exported if (name := f"{module}.{n}") not in listed]
    if missing:
        raise PluginError(f"without a docstring, so not on the API pages: {', '.join(missing)}")


class References(griffe.Extension):
    """Turn the references of docstrings, such as :meth:`Context.restore`, into links."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite all docstrings of the package."""
        pending: list[griffe.Object] = [pkg]
        while pending:
            obj = pending.pop()
            pending += [member for member in obj.members.values() if not member.is_alias]
            if obj.docstring:
                scopes = list(scopes_of(obj))
                obj.docstring.value = ROLE.sub(
                    lambda role, scopes=scopes: link(role[1], scopes), obj.docstring.value
                )


def scopes_of(obj: griffe.Object) -> Iterator[griffe.Object]:
    """Yield what a name in the docstring of *obj* can be relative to, the nearest first."""
    scope: griffe.Object | None = obj
    while scope is not None:
        yield scope
        scope = scope.parent


def link(name: str, scopes: list[griffe.Object]) -> str:
    """Write a reference as Markdown: a link where the site has the name, else as code."""
    path = name
    for scope in scopes:
        with suppress(KeyError, griffe.AliasResolutionError):
            path = scope.get_member(name).canonical_path
            break
    return f'<autoref identifier="{path}" optional>`{name}`</autoref>'
