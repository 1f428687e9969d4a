"""Pages of states in a headless Chromium, which Playwright drives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDE = {"width": 1200, "height": 900}


def find_chromium() -> str | None:
    """Return the path of a Chromium; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launched(program: str) -> Iterator[Browser]:
    """Yield a browser that ends with the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox of Chromium does not start for root.
        yield playwright.chromium.launch(
            executable_path=program,
            chromium_sandbox=os.geteuid() != 0,
            args=["--disable-dev-shm-usage", "--hide-scrollbars"],
        )


class Shown:
    """A page in a window of its own, and what went wrong or was asked for since it was opened."""

    def __init__(self, browser: Browser, **window: Any) -> None:
        self.page: Page = browser.new_context(**{"viewport": WIDE, **window}).new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def close(self) -> None:
        """Close the window."""
        self.page.context.close()

    def open(self, path: Path) -> None:
        """Open a file, and wait until it is loaded."""
        self.page.goto(path.as_uri())

    def value(self, expression: str) -> Any:
        """Return the value of an expression in the page; frames are drawn before."""
        drawn = "await new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)));"
        return self.page.evaluate(f"async () => {{ {drawn} return {expression}; }}")

    def accessible(self) -> list[dict[str, Any]]:
        """Return the nodes that a screen reader finds."""
        found = self.page.context.new_cdp_session(self.page).send("Accessibility.getFullAXTree")
        return [node for node in found["nodes"] if not node["ignored"]]
