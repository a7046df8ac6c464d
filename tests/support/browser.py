"""A visitor of the console: headless Chromium that minds what a page asks for, complains of, and keeps from people."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

# A CI artefact; git ignores the folder.
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
NAMES = ("chromium", "chromium-browser", "google-chrome")
VIEWS = (("light", 1280), ("dark", 1280), ("light", 390))


def chromium() -> str:
    """Where it is; skips the test where there is none."""
    pytest.importorskip("playwright", reason="the extra 'browser' is not installed")
    pytest.importorskip("axe_playwright_python", reason="the extra 'browser' is not installed")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here (make browser installs it, or CHROMIUM names one)")
    return found


class Visitor:
    """One browser tab. `complaints` are errors of the console, of scripts, and requests to other hosts; `streams` is
    how often the live queue was asked for."""

    def __init__(self, browser: Any, url: str) -> None:
        self.url = url
        self.complaints: list[str] = []
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))
        self.page.on("request", self._on_request)
        self.expected = 0
        self.streams = 0

    def open(self, tab: str) -> None:
        self.page.goto(f"{self.url}/console#{tab}")

    def look(self, name: str) -> None:
        """In every size and theme: nothing that axe finds, nothing wider than the window, a picture."""
        from axe_playwright_python.sync_playwright import Axe

        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        for scheme, width in VIEWS:
            self.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            self.page.set_viewport_size({"width": width, "height": 900})
            self.page.evaluate("scrollTo(0, 0)")
            self.page.wait_for_timeout(150)  # plots follow the size of their place
            self.page.screenshot(path=SCREENSHOTS / f"{name}-{scheme}-{width}.png", full_page=True)
            wider = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wider <= 0, f"{name} at {width} pixels is {wider} pixels too wide"
            found = Axe().run(self.page).response["violations"]
            told = [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found]
            assert not told, f"{name}, {scheme}, {width}: {told}"
        self.page.emulate_media(color_scheme="light")
        self.page.set_viewport_size({"width": 1280, "height": 900})

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            # A refusal that a test provokes is one line of the browser's own.
            failed = "Failed to load resource" in message.text
            if failed and "404" in message.text and "/v1/queue/" in message.location.get("url", ""):
                pass  # a request that is looked at may end just before
            elif failed and self.expected:
                self.expected -= 1
            else:
                self.complaints.append(message.text)

    def _on_request(self, request: Any) -> None:
        self.streams += request.url.endswith("/v1/queue/events")
        own = urlsplit(self.url).netloc
        if urlsplit(request.url).scheme not in ("blob", "data") and urlsplit(request.url).netloc != own:
            self.complaints.append(f"request to {request.url}")


@contextlib.contextmanager
def visiting(url: str) -> Iterator[Visitor]:
    """At the end nothing must have been complained of."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            visitor = Visitor(browser, url)
            try:
                yield visitor
            except BaseException:
                SCREENSHOTS.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(Exception):
                    visitor.page.screenshot(path=SCREENSHOTS / "failed.png", full_page=True)
                print("complaints:", visitor.complaints)
                raise
            assert not visitor.complaints, visitor.complaints
        finally:
            browser.close()
