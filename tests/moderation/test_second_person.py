"""Whose word completes what can't be undone: somebody who has been a moderator for a week and was here within the month."""

from __future__ import annotations

from typing import Any

from relay.clock import DAY
from relay.moderation import key_list
from relay.moderation.moderator_secret import ModeratorSecret
from tests.moderation.casehouse import SAFETY, Desk, desk, hears, notices_of
from tests.moderation.test_actions import takes
from tests.people import Person
from tests.town import Town


async def is_listed(mod: Desk, person: Person) -> None:
    """Her key comes onto the list, signed by the one that stands there; it counts a day later."""
    assert mod.house.server is not None
    current = await mod.house.server.moderation.proving.keys.current()
    assert current is not None
    now, public = mod.house.town.clock.now(), ModeratorSecret.make().public
    after = key_list.added(current, person.id, "moderator", public, mod.secret, now)
    await mod.house.command("moderator.change", statement=dict(after.statement))


async def test_a_second_person_has_been_one_for_a_week_and_was_here_within_the_month(town: Town) -> None:
    mod = await desk(town)
    second, bob = await town.users("second@one", "bob@one")
    await mod.house.command("user.admin", user="second", admin=True)
    await is_listed(mod, second)
    changed = "The list of the moderators' keys has changed"
    assert "It counts from a day later on" in await hears(mod.person, changed), "it is announced, to be objected to"

    async def asks() -> dict[str, Any]:
        await second.syncs()
        return await takes(mod.person, "redact_all", bob.id)

    async def is_refused(act: dict[str, Any]) -> bool:
        refused = await second.is_refused(second.calls("POST", f"{SAFETY}/acts/{act['waits']}/confirm", {}))
        return "for 7 days and was here within the last 30" in refused.text

    for days in (0, 2, 5):  # a day until her key counts, then not yet seven
        town.clock.forward(hours=24 * days)
        asked = await asks()
        assert asked["until"] - town.clock.now() > DAY / 2, "nobody else counts yet, so it waits a day"
        assert await is_refused(asked), "and her word is not enough; she can cancel it, though"
        assert "waits for a second person" in await hears(mod.person, "A measure waits"), "every moderator hears of it"
        assert await second.notices(lambda: any("A measure waits" in one for one in notices_of(second)))
        await second.calls("POST", f"{SAFETY}/acts/{asked['waits']}/cancel", {})

    town.clock.forward(hours=2 * 24)
    asked = await asks()
    assert "until" not in asked, "after a week it waits for her"
    town.clock.forward(hours=32 * 24)
    later = await takes(mod.person, "redact_all", bob.id)
    assert "until" in later, "whoever was not here for a month is no second person"
    await second.syncs()
    third = await takes(mod.person, "redact_all", bob.id)
    assert "until" not in third, "until she looks in again"
    await second.calls("POST", f"{SAFETY}/acts/{third['waits']}/confirm", {})
