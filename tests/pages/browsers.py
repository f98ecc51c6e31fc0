"""People at a real browser: each has a context of her own. Whatever a page logs as an error or asks of elsewhere is kept.

With the environment variable RELAY_SCREENSHOTS naming a folder, `shows` leaves pictures there, in four ways.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, BrowserContext, Page

from tests.people import Person
from tests.town import Town

PATIENCE_MS = 20_000
DESKTOP, PHONE = {"width": 1180, "height": 850}, {"width": 390, "height": 844}


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browsers:
    def __init__(self, browser: Browser, town: Town) -> None:
        self._browser = browser
        self._town = town

    async def open(self, nickname: str = "one", *, scripts: bool = True, **how: Any) -> Reader:
        house = self._town.houses[nickname]
        how.setdefault("viewport", DESKTOP)
        context = await self._browser.new_context(base_url=house.url, java_script_enabled=scripts, **how)
        context.set_default_timeout(PATIENCE_MS)
        return Reader(context, await context.new_page(), house.url)


class Reader:
    """Somebody at a browser."""

    def __init__(self, context: BrowserContext, page: Page, url: str) -> None:
        self.context = context
        self.page = page
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        page.on("console", self._hears)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        own = (url, "data:", "blob:", "about:")
        page.on("request", lambda asked: None if asked.url.startswith(own) else self.strangers.append(asked.url))

    def _hears(self, said: Any) -> None:
        # A page that is a refusal has a status above 400, which the browser notes as an error.
        if said.type == "error" and not said.text.startswith("Failed to load resource: the server responded"):
            self.complaints.append(said.text)

    async def goes_to(self, path: str) -> int:
        answer = await self.page.goto(path)
        return answer.status if answer is not None else 0

    async def signs_in(self, person: Person, to: str = "/_relay/") -> None:
        await self.goes_to(to)
        await self.page.get_by_label("User name").fill(person.name)
        await self.page.get_by_label("Password").fill(person.password)
        await self.presses("Sign in")

    async def presses(self, name: str, within: Any = None) -> None:
        """A button, by its words; until the page that follows is there."""
        async with self.page.expect_navigation():
            await (within or self.page).get_by_role("button", name=name, exact=True).click()

    async def follows(self, name: str) -> None:
        async with self.page.expect_navigation():
            await self.page.get_by_role("link", name=name).first.click()

    async def text(self) -> str:
        return await self.page.locator("body").inner_text()

    async def reads(self, words: str) -> bool:
        return words in await self.text()

    async def is_content(self) -> None:
        """Nothing came from elsewhere, and no script or policy complained."""
        assert not self.strangers, f"asked of elsewhere: {self.strangers}"
        assert not self.complaints, f"the page complains: {self.complaints}"

    async def shows(self, name: str) -> None:
        """Leaves pictures of the page, where somebody wants to look at them."""
        folder = os.environ.get("RELAY_SCREENSHOTS")
        if not folder:
            return
        for size, form in (("desktop", DESKTOP), ("phone", PHONE)):
            for scheme in ("light", "dark"):
                await self.page.set_viewport_size(form)  # type: ignore[arg-type]
                await self.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                await self.page.screenshot(
                    path=Path(folder) / f"{name}-{size}-{scheme}.png", full_page=True, animations="disabled"
                )
        await self.page.set_viewport_size(DESKTOP)  # type: ignore[arg-type]
        await self.page.emulate_media(color_scheme="light")
