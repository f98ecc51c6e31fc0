"""What was taken back at once is proved all the same: the page behind the link shows it as ciphertext, the proof tool opens it on
the reporter's own machine, the page takes the code."""

from __future__ import annotations

import json
from pathlib import Path

from nio.crypto.key_export import encrypt_and_save

from scripts.proof_page import PAGE
from tests.moderation.sessions import Session
from tests.pages.browsers import Browsers
from tests.pages.desk_people import has_keys, makes_moderator, notice_link
from tests.people import Person, path
from tests.town import Town

WORD = "gone as soon as you had read it"


def exported(folder: Path, session: Session, room: str) -> Path:
    """The reporter's keys, as her app exports them."""
    file = folder / "element-keys.txt"
    key = session.inbound.export_at(0).to_base64()
    row = {"algorithm": "m.megolm.v1.aes-sha2", "room_id": room, "session_id": session.id, "session_key": key}
    encrypt_and_save(json.dumps([row]).encode(), str(file), "pass", count=1000)
    return file


async def a_message_taken_back(town: Town, victim: Person, mallory: Person) -> tuple[str, str, Session]:
    room = await victim.creates_room(with_=mallory)
    session = Session()
    sent = await mallory.sends(room, session.says(room, WORD))
    await mallory.redacts(room, sent)
    return room, sent, session


async def test_from_the_page_to_the_tool_and_back(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, victim, mallory = await town.users("alice@one", "victim@one", "mallory@one")
    await makes_moderator(house, alice)
    await has_keys(house, alice)
    room, sent, session = await a_message_taken_back(town, victim, mallory)
    await victim.calls("POST", path("rooms", room, "report"), {"reason": ""})
    at_home = await browsers.open()
    await at_home.signs_in(victim, await notice_link(victim, "report"))
    await at_home.page.get_by_text("Messages that were taken back, and can still be proved (1)").click()
    await at_home.page.get_by_text(f"{mallory.id}, ").click()
    card = await at_home.page.locator("#card-1").inner_text()
    assert json.loads(card)["event_id"] == sent and WORD not in card
    await at_home.shows("report-taken-back")

    tool = await at_home.context.new_page()
    await tool.goto(PAGE.as_uri())
    await tool.set_input_files("#keys", str(exported(town.folder, session, room)))
    await tool.fill("#passphrase", "pass")
    await tool.fill("#events", card)
    await tool.click("#make")
    await tool.get_by_text("Look at what you disclose").wait_for()
    assert await tool.locator(".message pre").inner_text() == WORD, "her own keys open it, on her own machine"
    code = await tool.input_value("#code")

    await at_home.page.get_by_label("Proof code").fill(code)
    await at_home.page.get_by_text("I report this in good faith").click()
    await at_home.presses("Hand in the proof")
    assert await at_home.reads("The proof holds")
    await at_home.is_content()
