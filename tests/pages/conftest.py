"""What the stories about pages share: a town, and a real browser in it. Without a Chromium they are skipped, with a reason."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import async_playwright

from tests.pages.browsers import Browsers, find_chromium
from tests.town import Town


@pytest.fixture
async def browsers(tmp_path: Path, town: Town) -> AsyncIterator[Browsers]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield Browsers(browser, town)
        await browser.close()
