"""Measures at the desk without scripts: each is asked about once more, holds at once, is lifted again, and stands in the log."""

from __future__ import annotations

from tests.pages.browsers import Browsers
from tests.pages.desk_people import makes_moderator
from tests.town import Town


async def test_measures_are_taken_and_lifted(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, mallory = await town.users("alice@one", "mallory@one")
    await makes_moderator(house, alice)
    reader = await browsers.open(scripts=False)
    page = reader.page
    await reader.signs_in(alice, "/_relay/desk/measures")
    assert await reader.reads("Nothing is blocked")

    async def asks_for(measure: str, target: str, reason: str = "Harassment") -> None:
        await page.locator("select[name=measure]").select_option(measure)
        await page.locator("input[name=target]:not([type=hidden])").fill(target)
        await page.locator("select[name=reason]").select_option(label=reason)
        await reader.presses("Go on …")

    await asks_for("suspend", mallory.id)
    assert await reader.reads("Suspend?") and await reader.reads("can read, leave rooms")
    await reader.shows("desk-sure")
    room = await mallory.creates_room()
    await reader.follows("No, back")
    assert await reader.reads("Nothing is blocked"), "it was only asked about"
    await asks_for("suspend", mallory.id)
    await reader.presses("Yes, do it")
    assert (await mallory.is_refused(mallory.sends(room))).errcode == "M_USER_SUSPENDED", "it holds at once"
    await asks_for("block_server", "*.evil.example")
    await reader.presses("Yes, do it")
    await asks_for("quarantine", "mxc://evil.example/abc")
    await reader.presses("Yes, do it")
    await asks_for("deactivate", mallory.id)
    assert await reader.reads("This can't be undone")
    await reader.presses("Yes, do it")
    assert await reader.reads("Waiting for a second person")
    await reader.shows("desk-measures")
    await reader.presses("Cancel")
    await asks_for("suspend", "not a user", "Spam")
    await reader.presses("Yes, do it")
    assert await reader.reads("The target is a user ID"), "a refusal says what to do"
    await reader.goes_to("/_relay/desk/measures")
    await reader.presses(f"Lift: Suspended, {mallory.id}")
    await reader.presses("Yes, take it back")
    await mallory.sends(room)
    await asks_for("warn", mallory.id, "Spam")
    await reader.presses("Yes, do it")
    await reader.goes_to("/_relay/desk/person?user=mallory")
    assert await reader.reads("Counts until")
    await reader.shows("desk-person")
    await reader.goes_to("/_relay/desk/log")
    for words in ("Suspend", "Took back: suspend", "Block a server", "Cancelled: close the account", "Warn"):
        assert await reader.reads(words), f"the log says: {words}"
    await reader.is_content()
