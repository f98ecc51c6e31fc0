"""Measures at the desk without scripts: each is asked about once more, holds at once, is lifted again, and stands in the log."""

from __future__ import annotations

from tests.moderation.casehouse import desk
from tests.pages.browsers import Browsers
from tests.pages.desk_people import has_keys, makes_moderator, notice_link, reports
from tests.pages.visitors import Visitor
from tests.people import until
from tests.town import Town

FACTS = "Wrote to thirty people who had asked him to stop."


async def test_measures_are_taken_and_lifted(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, mallory = await town.users("alice@one", "mallory@one")
    await makes_moderator(house, alice)
    reader = await browsers.open(scripts=False)
    page = reader.page
    await reader.signs_in(alice, "/_relay/desk/measures")
    assert await reader.reads("Nothing is blocked")

    async def asks_for(measure: str, target: str, reason: str = "Harassment", facts: str = FACTS) -> None:
        await page.locator("select[name=measure]").select_option(measure)
        await page.locator("input[name=target]:not([type=hidden])").fill(target)
        await page.locator("select[name=reason]").select_option(label=reason)
        if facts:
            await page.get_by_label("Which one").fill("rule 2")
            await page.get_by_label("What happened").fill(facts)
        await reader.presses("Go on …")

    await asks_for("suspend", mallory.id, facts="")
    assert (
        await page.locator("#problem-ground").inner_text() == "Name the rule or the law: without it nobody can object."
    )
    assert await page.locator("input[name=target]:not([type=hidden])").input_value() == mallory.id, (
        "nothing is typed twice"
    )
    await reader.shows("desk-measure-not-whole")
    await asks_for("suspend", mallory.id)
    assert await reader.reads("Suspend?") and await reader.reads("can read, leave rooms") and await reader.reads(FACTS)
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
    await asks_for("shut_room", room)
    assert await reader.reads("Until then the room is blocked")
    await reader.presses("Yes, do it")
    assert await reader.reads("blocked meanwhile") and await reader.reads("Room blocked until its shutting is decided")
    assert await page.get_by_role("link", name="Decide …").count() == 1, "it is not lifted but decided"
    await reader.shows("desk-measures-shutting")
    await reader.presses("Cancel")
    assert not await reader.reads("Room blocked until its shutting is decided"), "and open again"
    await asks_for("suspend", "not a user", "Spam")
    await reader.presses("Yes, do it")
    assert await reader.reads("The target is a user ID"), "a refusal says what to do"
    await reader.goes_to("/_relay/desk/measures")
    await reader.presses(f"Lift: Suspended, {mallory.id}")
    await reader.presses("Yes, take it back")
    await mallory.sends(room)
    await asks_for("warn", mallory.id, "Spam")
    await reader.presses("Yes, do it")
    told = await browsers.open(scripts=False)
    await told.signs_in(mallory, await notice_link(mallory, "appeal"))
    assert (
        await told.reads(FACTS) and await told.reads("Rule of this relay: rule 2") and await told.reads("Object to it")
    )
    await reader.goes_to("/_relay/desk/person?user=mallory")
    assert await reader.reads("Counts until")
    await reader.shows("desk-person")
    await reader.goes_to("/_relay/desk/log")
    for words in ("Suspend", "Took back: suspend", "Block a server", "Cancelled: close the account", "Warn"):
        assert await reader.reads(words), f"the log says: {words}"
    await reader.is_content()


async def test_what_can_not_be_undone_takes_a_second_person(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, carol, mallory = await town.users("alice@one", "carol@one", "mallory@one")
    for person in (alice, carol):
        await makes_moderator(house, person)
    await has_keys(house, carol)
    town.clock.forward(hours=8 * 24)
    await carol.syncs()
    asks, confirms = await browsers.open(scripts=False), await browsers.open(scripts=False)
    await asks.signs_in(alice, "/_relay/desk/measures?target=" + mallory.id)
    await asks.page.locator("select[name=measure]").select_option("deactivate")
    await asks.page.locator("select[name=reason]").select_option(label="Fraud")
    await asks.page.get_by_label("Which one").fill("rule 4")
    await asks.page.get_by_label("What happened").fill("Took money from three people for nothing.")
    await asks.presses("Go on …")
    await asks.presses("Yes, do it")
    assert await asks.reads("when confirmed") and await asks.page.get_by_role("button", name="Confirm").count() == 0
    await confirms.signs_in(carol, "/_relay/desk")
    assert await confirms.reads("Waiting for another moderator's word: 1")
    await confirms.goes_to("/_relay/desk/measures")
    await confirms.presses("Confirm")
    assert await confirms.reads(f"{alice.id} asked for this") and await confirms.reads("can't be undone")
    await confirms.presses("Yes, do it")

    async def is_closed() -> bool:
        await asks.goes_to("/_relay/desk/person?user=mallory")
        return await asks.reads("This account is closed")

    assert await until(is_closed), "the second person's word was enough"


async def test_cases_are_joined_only_after_a_question(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    for _ in range(2):
        await reports(alice, room, await bob.sends(room), "please look")
    first, second = sorted(await mod.queue(), key=lambda one: int(one["number"]))
    visit = Visitor(town, mod.house, mod.person)
    await visit.signs_in()
    page = f"/_relay/desk/case/{second['id']}"
    fields = {"into": "1", "version": str(second["version"])}
    answer, text = await visit.sends(page, fields, to=f"{page}/merge")
    assert answer.status == 200 and "Is no. 2 the same as no. 1?" in text and len(await mod.queue()) == 2
    answer, _ = await visit.sends(page, {**fields, "sure": "yes"}, to=f"{page}/merge")
    assert answer.status == 303 and [one["id"] for one in await mod.queue()] == [first["id"]]
