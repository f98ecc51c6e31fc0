"""The desk's audit log in a browser: who may look, what it says, and that a browser notices a log that is not the old one."""

from __future__ import annotations

from tests.pages.browsers import Browsers
from tests.pages.desk_people import makes_moderator
from tests.town import Town


async def test_a_browser_notices_a_log_that_was_exchanged(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, bob = await town.users("alice@one", "bob@one")
    await makes_moderator(house, alice)
    outsider = await browsers.open()
    await outsider.signs_in(bob, "/_relay/desk/log")
    assert await outsider.reads("for the moderators of this relay"), "others are told so"
    assert not await outsider.reads("Desk"), "and see no way there"
    assert house.server is not None
    log = house.server.moderation.audit_log
    for number in range(3):
        with house.server.db.write() as tx:
            log.record(
                tx, actor=alice.id, action="suspend", target=f"@<b>x{number}</b>:evil.example", reason_code="spam"
            )
        await tx
    reader = await browsers.open()
    await reader.signs_in(alice, "/_relay/desk/log")
    assert await reader.reads("@<b>x2</b>:evil.example"), "what strangers choose is shown as text"
    await reader.page.wait_for_function("localStorage.getItem('relay.log.kept') !== null")
    await reader.shows("desk-log")
    await reader.page.reload()
    assert not await reader.page.locator("#log-warning").is_visible()
    await reader.is_content()
    await reader.page.evaluate(
        "localStorage.setItem('relay.log.kept', JSON.stringify({seq: 2, hash: 'what stood there before a restore'}))"
    )
    await reader.page.reload()
    await reader.page.get_by_text("This audit log is not the one that this browser saw before").wait_for()
