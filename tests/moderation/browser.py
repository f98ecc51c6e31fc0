"""A real headless Chromium for pages that are files; skipped with a reason where there is none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Browser, async_playwright

from tests.pages.browsers import find_chromium


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    found = find_chromium()
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    async with async_playwright() as tools:
        browser = await tools.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            await browser.close()
