"""A headless Chromium for tests of the console; what needs it is skipped where there is none."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_MS = 30_000
"""Longest that a page may take for one thing that a test waits for."""


def chromium() -> str:
    """Path of an installed browser; skips the test without one."""
    named = os.environ.get("CHROMIUM")
    found = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs Chromium: install the package chromium, or name one in CHROMIUM")
    return found


@asynccontextmanager
async def browser_page(**context: Any) -> AsyncIterator[tuple[Any, list[str]]]:
    """A page of a fresh browser, and what went wrong in it: errors, and requests to elsewhere.

    Args:
        context: settings of playwright's browser context.
    """
    playwright = pytest.importorskip("playwright.async_api")
    executable = chromium()
    wrong: list[str] = []
    async with playwright.async_playwright() as driver:
        # Tests may run as root, under which Chromium's own sandbox can't.
        browser = await driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            opened = await browser.new_context(**context)
            opened.set_default_timeout(WAIT_MS)
            page = await opened.new_page()
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on(
                "console",
                lambda message: wrong.append(message.text) if message.type == "error" else None,
            )
            yield page, wrong
        finally:
            await browser.close()
