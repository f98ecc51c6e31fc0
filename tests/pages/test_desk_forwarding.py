"""A report is handed from one relay's desk to another's in two real browsers; the other side checks the proof and decides."""

from __future__ import annotations

from relay.moderation.disclosure_form import KEY, Item, item_json
from tests.moderation.sessions import Session
from tests.pages.browsers import Browsers, Reader
from tests.pages.desk_people import has_keys, makes_moderator, notice_link, opens_evidence, puts_key_in, reports
from tests.people import Person, until
from tests.town import Town, Within

FORWARDING = "moderation: {forwarding: true}\n"
MESSAGE = "what he wrote across the border"


async def at_the_desk(browsers: Browsers, house: Within, person: Person) -> Reader:
    await makes_moderator(house, person)
    secret = await has_keys(house, person)
    reader = await browsers.open(house.nickname)
    await reader.signs_in(person, "/_relay/desk/keys")
    await puts_key_in(reader, secret)
    return reader


async def test_a_proof_crosses_to_the_other_relays_desk(town: Town, browsers: Browsers) -> None:
    one, two = await town.relay("one", FORWARDING), await town.relay("two", FORWARDING)
    victim, mallory, here, there = await town.users("victim@one", "mallory@two", "here@one", "there@two")
    home, away = await at_the_desk(browsers, one, here), await at_the_desk(browsers, two, there)
    room = await victim.creates_room(with_=mallory)
    session = Session()
    sent = await mallory.sends(room, session.says(room, MESSAGE))
    assert await victim.sees(sent)
    proof = {"v": 1, "alg": "m.megolm.v1.aes-sha2", "category": "harassment", "good_faith": True, "items": [item_json(Item(sent, 0, session.prk(0)))]}  # fmt: skip
    await reports(victim, room, sent, "", **{KEY: proof})

    await home.goes_to("/_relay/desk")
    await home.follows("No. 1")
    case = home.page.url
    await opens_evidence(home)
    assert await home.reads(MESSAGE)
    hand_over = home.page.get_by_role("button", name="Hand this proof to the moderators")
    assert await hand_over.count() == 0, "never without the reporter's consent"
    reporter = await browsers.open("one", scripts=False)
    await reporter.signs_in(victim, await notice_link(victim, "report"))
    assert await reporter.reads("this can show who you are")
    await reporter.presses("I agree")

    await home.goes_to(case)
    await opens_evidence(home)
    await hand_over.click()
    await home.page.get_by_role("button", name="Sure?").click()
    await home.page.get_by_text("Handed over. Their answer").wait_for()

    assert await until(lambda: _has_a_case(away))
    await away.follows("No. 1")
    assert await away.reads("Handed over by another server") and not await away.reads(victim.id)
    await opens_evidence(away)
    async with away.page.expect_navigation():
        await away.page.get_by_role("button", name="Check this proof").click()
    assert await away.reads("Proof: verified"), "its own account sent it"
    await opens_evidence(away)
    await away.page.get_by_text(MESSAGE).first.wait_for()
    await away.page.get_by_text("Checked again in this browser: this text is exactly").wait_for()
    await away.shows("desk-forwarded")

    # She decides there. Here the case says what, and so does the reporter's page.
    await away.page.get_by_label("Suspend").check()
    await away.page.locator("select[name=reason]").select_option("harassment")
    await away.page.get_by_label("Which one").fill("rule 1")
    await away.page.get_by_label("What happened").fill("Unwanted messages to somebody who had asked him to stop.")
    await away.presses("Go on …")
    await away.presses("Yes, decide so")
    assert (await mallory.is_refused(mallory.sends(room))).errcode == "M_USER_SUSPENDED"
    assert await until(lambda: _reads_at(home, case, "The other server's decision"))
    said = await home.text()
    assert "Suspend" in said and "Harassment" in said and two.name in said, "what, why and who"
    assert "Unwanted messages to somebody" not in said, "their words stay with them"
    await home.shows("desk-answered-elsewhere")
    await _hears_of_it(victim)
    await reporter.goes_to(await notice_link(victim, "report"))
    assert await reporter.reads("What the other server decided") and await reporter.reads("Suspend")
    await reporter.shows("report-answered-elsewhere")
    await home.is_content()
    await away.is_content()


async def _reads_at(reader: Reader, where: str, words: str) -> bool:
    await reader.goes_to(where)
    return await reader.reads(words)


async def _hears_of_it(person: Person) -> None:
    def heard() -> bool:
        events = [event for events in person.timeline.values() for event in events]
        return any("have answered what they decided" in event["content"].get("body", "") for event in events)

    assert await person.notices(heard), "whoever reported hears that there is an answer"


async def _has_a_case(reader: Reader) -> bool:
    await reader.goes_to("/_relay/desk")
    return await reader.reads("No. 1")
