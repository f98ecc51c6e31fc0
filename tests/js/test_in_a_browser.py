"""matrix-js-sdk in a real headless Chromium: two people at two browsers on two relays sign in and talk encrypted.

One of them uses sliding sync. The page is `chat.html` with `chat.mjs`; a small server on loopback hands it out, so that what
a browser asks of a relay (CORS, its preflights, secure contexts) is asked here as well. With the environment variable
RELAY_SCREENSHOTS naming a folder, pictures are left there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, expect

from tests.js.conftest import bundled, serving
from tests.people import Person
from tests.town import Town

HERE = Path(__file__).parent
WASM = Path("node_modules/@matrix-org/matrix-sdk-crypto-wasm/pkg/matrix_sdk_crypto_wasm_bg.wasm")
PATIENCE_MS = 60_000


@pytest.fixture
async def page_url(workshop: Path) -> AsyncIterator[str]:
    """The page, bundled and served."""
    served = await bundled(workshop, "chat.mjs")
    (served / "pkg").mkdir(exist_ok=True)
    shutil.copy(workshop / WASM, served / "pkg")
    shutil.copy(HERE / "chat.html", served)
    async with serving(served) as url:
        yield f"{url}/chat.html"


class Reader:
    """A person at a browser of her own."""

    def __init__(self, person: Person, page: Page) -> None:
        self.person = person
        self.page = page
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    async def signs_in(self, url: str) -> None:
        await self.page.goto(url)
        await self.page.get_by_label("Server").fill(self.person.url)
        await self.page.get_by_label("User name").fill(self.person.name)
        await self.page.get_by_label("Password").fill(self.person.password)
        await self.page.get_by_role("button", name="Sign in").click()
        await expect(self.page.locator("#who")).to_contain_text(self.person.id, timeout=PATIENCE_MS)

    async def says(self, text: str) -> None:
        await self.page.get_by_label("Message").fill(text)
        await self.page.get_by_role("button", name="Send").click()

    async def reads(self, text: str) -> None:
        await expect(self.page.locator("#messages")).to_contain_text(text, timeout=PATIENCE_MS)

    async def is_content(self) -> None:
        await expect(self.page.locator("#trouble")).to_be_empty()
        await expect(self.page.locator("#messages")).not_to_contain_text("unreadable")
        assert not self.complaints, f"the page complains: {self.complaints}"

    async def shows(self, name: str) -> None:
        folder = os.environ.get("RELAY_SCREENSHOTS")
        if folder:
            await self.page.screenshot(path=Path(folder) / f"{name}.png")


async def test_two_people_talk_encrypted_in_their_browsers(
    town: Town, workshop: Path, page_url: str, browser: Browser
) -> None:
    people = await town.users("alice@one", "bob@two")
    contexts = [await browser.new_context(viewport={"width": 900, "height": 560}) for _ in people]
    alice, bob = [Reader(p, await c.new_page()) for p, c in zip(people, contexts, strict=True)]
    await alice.signs_in(page_url)
    await bob.signs_in(f"{page_url}?sliding")
    await alice.page.get_by_label("Write to").fill(bob.person.id)
    await alice.page.get_by_role("button", name="New conversation").click()
    await expect(alice.page.locator("#sealed")).to_have_text("encrypted", timeout=PATIENCE_MS)
    await bob.page.get_by_role("button", name="Join").click(timeout=PATIENCE_MS)
    await expect(bob.page.locator("#sealed")).to_have_text("encrypted", timeout=PATIENCE_MS)
    await alice.page.get_by_role("button", name=bob.person.name).wait_for(timeout=PATIENCE_MS)

    await alice.says("good evening, are you there?")
    await bob.reads("good evening, are you there?")
    await bob.page.get_by_label("Message").fill("just a mo")
    await expect(alice.page.locator("#typing")).to_contain_text("is typing", timeout=PATIENCE_MS)
    await bob.says("yes, and this is between us")
    await alice.reads("yes, and this is between us")
    await alice.shows("alice")
    await bob.shows("bob")

    await bob.page.reload()
    await bob.page.get_by_role("button", name=alice.person.name).click(timeout=PATIENCE_MS)
    await bob.reads("good evening, are you there?")
    await bob.says("back after a reload")
    await alice.reads("back after a reload")
    for reader in (alice, bob):
        await reader.is_content()
    written = b"".join(file.read_bytes() for house in town.houses.values() for file in house.files())
    for text in (b"good evening", b"between us", b"after a reload"):
        assert text not in written, "nothing of it is readable on a relay's disk"
