"""Who can object, and how: a locked account, a closed one, somebody without an account; and who is kept out of a case."""

from __future__ import annotations

from relay.clock import DAY
from relay.moderation.statements import Chosen, Statement
from tests.pages.browsers import Browsers
from tests.pages.desk_people import has_keys, makes_moderator, reports
from tests.people import Person, until
from tests.town import Town, Within

FACTS = "Repeated threats in a private room, as the proof shows."


async def decides(house: Within, moderator: Person, measure: str, about: Person) -> str:
    """Through the casework itself; the desk's own way is another story. Returns the case."""
    assert house.server is not None
    casework = house.server.moderation.casework
    [case], _ = await casework.cases.queue()
    statement = Statement("threat", "terms:rule 1", FACTS, (Chosen(measure, about.id),))
    await casework.decisions.decide(case.case_id, moderator.id, case.version, statement)
    return str(case.case_id)


async def test_who_is_locked_or_closed_can_still_object(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, victim, mallory, eve = await town.users("alice@one", "victim@one", "mallory@one", "eve@one")
    await makes_moderator(house, alice)
    await has_keys(house, alice)
    for person, measure in ((mallory, "lock"), (eve, "deactivate")):
        room = await victim.creates_room(with_=person)
        sent = await person.sends(room)
        await reports(victim, room, sent, "please look")
        await decides(house, alice, measure, person)
    # Nobody else can confirm it, so the closing waits a day.
    town.clock.forward(hours=25)
    assert await until(lambda: _is_closed(eve)), "then the account is closed"
    for person in (mallory, eve):
        reader = await browsers.open(scripts=False)
        await reader.signs_in(person, "/_relay/contact")
        assert reader.page.url.endswith("/_relay/appeal"), f"{person.name} gets no further"
        assert await reader.reads(FACTS) and not await reader.reads("Contact")
        await reader.goes_to("/_relay/")
        assert await reader.reads("With the user name and password"), "nothing else opens"
        await reader.goes_to("/_relay/appeal")
        await reader.page.get_by_text("Object to it").click()
        await reader.page.get_by_label("Why is it wrong?").fill("That was not me at all.")
        await reader.presses("Object")
        assert await reader.reads("has reached the moderators")
    wrong = await browsers.open(scripts=False)
    eve.password = "not her password"
    await wrong.signs_in(eve, "/_relay/appeal")
    assert await wrong.reads("The user name or the password is wrong")


async def test_a_receipt_does_the_same_and_the_named_person_sees_nothing(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, boss = await town.users("alice@one", "boss@one")
    for person in (alice, boss):
        await makes_moderator(house, person)
    stranger = await browsers.open(scripts=False)
    await stranger.goes_to("/_relay/notice")
    assert await stranger.reads("it has no moderator keys")
    await stranger.page.locator("select[name=category]").select_option("fraud")
    await stranger.page.locator("textarea[name=where]").fill(boss.id)
    await stranger.page.locator("textarea[name=why]").fill("Took my money and vanished.")
    await stranger.page.get_by_text("To the best of my knowledge").click()
    await stranger.presses("Send the notice")
    assert await stranger.reads("Your own words were not kept")
    receipt = await stranger.page.locator("#receipt").inner_text()
    await has_keys(house, alice)
    await stranger.goes_to(f"/_relay/report/{receipt}")
    assert await stranger.reads("They have one now: write them again below")
    await stranger.page.get_by_label("To the moderators").fill("Took my money and vanished.")
    await stranger.presses("Send")

    named = await browsers.open(scripts=False)
    await named.signs_in(boss, "/_relay/desk")
    assert await named.reads("Nothing waits"), "a case about her does not exist for her"
    case_id = await _only_case(house)
    assert await named.goes_to(f"/_relay/desk/case/{case_id}") == 404
    fair = await browsers.open(scripts=False)
    await fair.signs_in(alice, "/_relay/desk")
    await fair.follows("No. 1")
    await fair.page.locator("input[value=none]").check()
    await fair.page.locator("select[name=reason]").select_option("fraud")
    await fair.page.get_by_label("Which one").fill("rule 4")
    await fair.page.get_by_label("What happened").fill("There is nothing here that we could look into.")
    await fair.presses("Go on …")
    await fair.presses("Yes, decide so")
    await stranger.goes_to(f"/_relay/report/{receipt}")
    assert await stranger.reads("There is nothing here that we could look into")
    await stranger.page.get_by_label("Why", exact=True).fill("You can look at the transfers.")
    await stranger.presses("Object")
    assert await stranger.reads("has reached the moderators")
    await fair.page.reload()
    assert await fair.reads("Whoever reported objects to the decision")


async def test_an_appeal_puts_a_shorter_time_in_the_place_of_a_longer_one(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, victim, mallory = await town.users("alice@one", "victim@one", "mallory@one")
    await makes_moderator(house, alice)
    await has_keys(house, alice)
    assert house.server is not None
    casework, restrictions = house.server.moderation.casework, house.server._keeping.restrictions
    room = await victim.creates_room(with_=mallory)
    await reports(victim, room, await mallory.sends(room), "please look")
    [case], _ = await casework.cases.queue()
    month = Statement("threat", "terms:rule 1", FACTS, (Chosen("suspend", mallory.id, lasts_ms=30 * DAY),))
    await casework.decisions.decide(case.case_id, alice.id, case.version, month)
    await casework.appeals.file(case.case_id, mallory.id, "It happened once.")

    reader = await browsers.open(scripts=False)
    page = reader.page
    await reader.signs_in(alice, f"/_relay/desk/case/{case.case_id}")
    suspend = page.get_by_label("Suspend")
    assert not await suspend.is_visible(), "nothing to tick where the decision stands"
    await page.get_by_label("is changed").check()
    await page.get_by_label("Why").fill("Once is not often: three days are enough for it.")
    await page.get_by_label("Which one").fill("rule 1")
    await reader.presses("Go on …")
    assert await page.locator("#problem-measure").is_visible(), "something has to take its place"
    await suspend.check()
    await page.get_by_label("How long").select_option("3d")
    await reader.shows("desk-appeal-changed")
    await reader.presses("Go on …")
    assert await reader.reads("Put this in its place?") and await reader.reads("for 3 days")
    await reader.presses("Yes, decide so")
    assert await reader.reads("Appeal answered")
    ends = restrictions.find("suspend", mallory.id)
    assert ends is not None and ends.until_ts is not None and ends.until_ts <= town.clock.now() + 3 * DAY
    assert (await mallory.is_refused(mallory.sends(room))).errcode == "M_USER_SUSPENDED"
    accused = await browsers.open(scripts=False)
    await accused.signs_in(mallory, "/_relay/appeal")
    assert await accused.reads("for 3 days") and await accused.reads("three days are enough")
    await accused.shows("appeal-changed")


async def _only_case(house: Within) -> str:
    assert house.server is not None
    [case], _ = await house.server.moderation.casework.cases.queue()
    return str(case.case_id)


async def _is_closed(person: Person) -> bool:
    from tests.people import Refused

    try:
        await person.calls("GET", "account/whoami")
    except Refused as refused:
        return refused.status == 401
    return False
