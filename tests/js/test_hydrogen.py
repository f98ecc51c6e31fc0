"""Hydrogen, a whole web client of Element's makers, unmodified in a real Chromium: two people on two relays talk encrypted.

Everything is done as a person does it, by buttons and fields; only the invitation is sent beside, as Hydrogen has no form for
it. With the environment variable RELAY_SCREENSHOTS naming a folder, pictures are left there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, expect

from tests.js.conftest import bundled, serving
from tests.people import Person, until
from tests.town import Town

HERE = Path(__file__).parent
PATIENCE_MS = 60_000
# Olm's script is for Node too, and asks for these only there.
OF_NODE = ("--external:crypto", "--external:path", "--external:fs")


@pytest.fixture
async def hydrogen(workshop: Path) -> AsyncIterator[str]:
    """Its address."""
    served, packages = await bundled(workshop, "hydrogen.mjs", *OF_NODE), workshop / "node_modules"
    built = packages / "hydrogen-view-sdk"
    shutil.copytree(built / "asset-build" / "assets", served / "assets", dirs_exist_ok=True)
    shutil.copy(built / "lib-build" / "sw.js", served)
    (served / "olm").mkdir(exist_ok=True)
    for file in (packages / "@matrix-org" / "olm").glob("olm*"):
        shutil.copy(file, served / "olm")
    shutil.copy(HERE / "hydrogen.html", served)
    async with serving(served) as url:
        yield f"{url}/hydrogen.html"


class Reader:
    """A person at a browser of her own."""

    def __init__(self, person: Person, page: Page) -> None:
        self.person = person
        self.page = page
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", self._complained)

    def _complained(self, error: object) -> None:
        # After its form for a new room Hydrogen looks for a room called "true" in its own database: no relay is asked.
        if "archivedRoomSummary" not in str(error):
            self.complaints.append(str(error))

    async def signs_in(self, url: str) -> None:
        await self.page.goto(f"{url}?server={self.person.url}")
        await self.page.get_by_label("Username").fill(self.person.name)
        await self.page.get_by_label("Password").fill(self.person.password)
        await self.page.get_by_role("button", name="Log In").click()
        await self.page.get_by_label("Create room").wait_for()

    async def creates_room(self, name: str) -> None:
        await self.page.get_by_label("Create room").click()
        await self.page.locator(".menu button", has_text="Create Room").click()
        await self.page.locator("#name").fill(name)
        await self.page.locator("form .primary").click()

    async def opens(self, name: str) -> None:
        await self.page.locator(".RoomList a", has_text=name).click()

    async def says(self, text: str) -> None:
        field = self.page.get_by_placeholder("Send an encrypted message…")
        await field.fill(text)
        await field.press("Enter")

    async def reads(self, text: str) -> None:
        await expect(self.page.locator(".RoomView")).to_contain_text(text, timeout=PATIENCE_MS)

    async def shows(self, name: str) -> None:
        folder = os.environ.get("RELAY_SCREENSHOTS")
        if folder:
            await self.page.screenshot(path=Path(folder) / f"{name}.png")


async def _rooms_of(person: Person) -> list[str]:
    rooms: list[str] = (await person.calls("GET", "joined_rooms"))["joined_rooms"]
    return rooms


async def test_two_people_talk_encrypted_in_hydrogen(town: Town, hydrogen: str, browser: Browser) -> None:
    people = await town.users("alice@one", "bob@two")
    contexts = [await browser.new_context(viewport={"width": 1100, "height": 700}) for _ in people]
    alice, bob = [Reader(p, await c.new_page()) for p, c in zip(people, contexts, strict=True)]
    for reader in (alice, bob):
        await reader.signs_in(hydrogen)
    await alice.creates_room("Between us")
    await alice.page.locator(".RoomList a", has_text="Between us").wait_for()
    # Hydrogen shows the room before the relay has made it.
    assert await until(lambda: _rooms_of(alice.person), PATIENCE_MS / 1000), "the room is made"
    (room,) = await _rooms_of(alice.person)
    await alice.person.invites_to(room, bob.person)
    await bob.opens("Between us")
    await bob.page.get_by_role("button", name="Accept").click()
    await bob.reads("joined the room")
    await alice.opens("Between us")
    await alice.reads(f"{bob.person.id} joined the room")

    await alice.says("good evening, are you there?")
    await bob.reads("good evening, are you there?")
    await bob.says("yes, and this is between us")
    await alice.reads("yes, and this is between us")
    for reader, name in ((alice, "hydrogen-alice"), (bob, "hydrogen-bob")):
        await reader.shows(name)
        assert not reader.complaints, f"the page complains: {reader.complaints}"
    written = b"".join(file.read_bytes() for house in town.houses.values() for file in house.files())
    for text in (b"good evening", b"between us"):
        assert text not in written, "nothing of it is readable on a relay's disk"
