"""The contact page and contact links in a real browser, with scripts and without."""

from __future__ import annotations

from tests.pages.browsers import Browsers
from tests.people import until
from tests.town import Town

CLOSED = "contact: {invites_from: shared_rooms}\n"


async def test_a_performer_decides_who_reaches_her(town: Town, browsers: Browsers) -> None:
    await town.relay("one", CLOSED)
    eve, hostile, nice, third = await town.users("eve@one", "hostile@two", "nice@two", "third@two")
    rooms = {person: await person.creates_room(name="<script>alert(1)</script>") for person in (hostile, nice, third)}
    for person, room in rooms.items():
        await person.invites_to(room, eve)
    reader = await browsers.open(scripts=False)
    await reader.signs_in(eve, "/_relay/contact")
    assert await until(lambda: _shows(reader, third.id)), "she is led to the page that she wanted, and sees who waits"
    assert not await reader.reads("alert(1)"), "no word of a stranger is shown"
    await reader.shows("contact")
    await reader.presses(f"Let in the invite of {nice.id}")
    assert await eve.notices(lambda: rooms[nice] in eve.invites)
    await reader.presses(f"Drop the invite of {hostile.id}")
    assert (await hostile.members(rooms[hostile]))[eve.id] == "leave"
    await reader.presses("New link for one person")
    address = await reader.page.locator("code").first.inner_text()

    guest = await browsers.open()
    await guest.goes_to(address)
    await guest.shows("contact-link")
    await guest.page.get_by_label("Your Matrix user ID").fill(third.id)
    await guest.presses("Let me invite them")
    assert await guest.reads("The way is open")
    await guest.shows("contact-link-used")
    await guest.is_content()
    assert await eve.notices(lambda: rooms[third] in eve.invites), "what waited comes through at once"
    assert await guest.goes_to(address) == 404 and await guest.reads("is not valid any more")
    await reader.page.reload()
    await reader.page.get_by_label("Nobody").check()
    await reader.presses("Save")
    assert await reader.page.get_by_label("Nobody").is_checked()
    assert await reader.reads("Nothing waits") and await reader.reads("1 used up")
    await reader.is_content()


async def _shows(reader, words: str) -> bool:  # type: ignore[no-untyped-def]
    await reader.page.reload()
    return bool(await reader.reads(words))
