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
    await away.shows("desk-forwarded")
    await home.is_content()
    await away.is_content()


async def _has_a_case(reader: Reader) -> bool:
    await reader.goes_to("/_relay/desk")
    return await reader.reads("No. 1")
