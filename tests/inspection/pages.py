"""What is in a page, as a browser would see it: elements, texts, and the data of the script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link"}
ELEMENTS = {
    *("html", "head", "meta", "link", "title", "style", "body", "header", "h1", "h2", "p", "main"),
    *("section", "table", "caption", "thead", "tbody", "tr", "th", "td", "noscript", "figure"),
    *("figcaption", "canvas", "div", "button", "output", "details", "summary", "script"),
}
"""Those of our own making: any other came from the text of a file."""


class Page(HTMLParser):
    """A page whose elements are all closed, all ours, and load nothing."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page.decode())
        self.close()
        assert not self.open
        self._check_policy()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Add an element."""
        given = dict(attrs)
        assert tag in ELEMENTS, tag
        assert not any(name.startswith("on") or name in ("src", "style") for name in given)
        assert given.get("href", "data:,") == "data:,"
        self.found.append((tag, given))
        if tag == "script":
            self.scripts.append((given, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Add a text."""
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            given, text = self.scripts[-1]
            self.scripts[-1] = given, text + data
        elif inside == "style":
            self.styles.append(data)
        elif data.strip():
            self.texts.append(data)

    def _check_policy(self) -> None:
        """The one script and the one style are allowed, by their digests, and nothing else."""
        (policy,) = (given["content"] or "" for tag, given in self.found if "http-equiv" in given)
        (data, script) = self.scripts
        assert data[0] == {"type": "application/json", "id": "data"}
        assert script[0] == {}
        assert "default-src 'none'" in policy
        (style,) = self.styles
        for name, text in (("script-src", script[1]), ("style-src", style)):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert re.search(rf"{name} '(.*?)'", policy)[1] == f"sha256-{digest}"  # type: ignore[index]

    @property
    def data(self) -> Any:
        """What the script draws."""
        return json.loads(self.scripts[0][1])

    @property
    def text(self) -> str:
        """All that can be read without the script."""
        return "\n".join(self.texts)

    def figures(self) -> list[tuple[str, int]]:
        """Return kind and index of each picture."""
        return [
            (str(given["data-kind"]), int(given["data-index"] or ""))
            for tag, given in self.found
            if tag == "figure"
        ]
