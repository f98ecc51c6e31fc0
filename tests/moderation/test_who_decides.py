"""Nobody judges her own report, nor her own decision, where somebody else is there; a server that takes no decisions says so;
and what a moderator does in a room in which she has the power reaches everybody."""

from __future__ import annotations

from typing import Any

import pytest

from relay.errors import ApiError
from relay.moderation.peer_routes import PeerRoutes
from tests.moderation.casehouse import FACTS, SAFETY, casework, desk, hears, reports
from tests.moderation.test_actions import logged, moderators, takes
from tests.people import Person, until
from tests.town import Town

SUSPEND = {"measure": "suspend"}
AGAIN = {"verdict": "upheld", "reason_code": "threat", "ground": "terms:1", "facts": FACTS}


async def test_nobody_judges_her_own_report_nor_her_own_decision(town: Town) -> None:
    mod = await desk(town)
    second, alice, bob = await town.users("second@one", "alice@one", "bob@one")
    await mod.house.command("user.admin", user="second", admin=True)
    room = await alice.creates_room(with_=[bob, mod.person])

    async def decides(who: Person, case_id: str) -> Any:
        body = {"measures": [SUSPEND], "reason_code": "threat", "tos_clause": "1", "facts": FACTS}
        return await who.calls("POST", f"{SAFETY}/reports/{case_id}/decision", body)

    async def answers(who: Person, case_id: str) -> Any:
        return await who.calls("POST", f"{SAFETY}/reports/{case_id}/appeal", AGAIN)

    async def newest() -> str:
        return str(max(await mod.queue(), key=lambda one: one["number"])["id"])

    said = await bob.sends(room)
    await reports(mod.person, room, said)
    hers = await newest()
    assert "reported this yourself" in (await mod.person.is_refused(decides(mod.person, hers))).text
    await decides(second, hers)
    work = casework(mod.house)
    await work.appeals.file(hers, bob.id, "please look again")
    assert "reported this yourself" in (await mod.person.is_refused(answers(mod.person, hers))).text
    await answers(second, hers)
    history = [one["action"] for one in (await mod.asks("GET", f"reports/{hers}"))["history"]]
    assert "appeal.same_person" in history, "nobody else could, and the log says so"

    await reports(alice, room, said)
    other = await newest()
    await decides(second, other)
    await work.appeals.file(other, bob.id, "please look again")
    assert "made this decision" in (await second.is_refused(answers(second, other))).text
    await answers(mod.person, other)
    history = [one["action"] for one in (await mod.asks("GET", f"reports/{other}"))["history"]]
    assert "appeal.upheld" in history and "appeal.same_person" not in history
    await hears(alice, "was looked at again, and it stays as it is")


async def test_after_half_a_year_nobody_objects_any_more(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await reports(alice, room, await bob.sends(room), **{"org.relay.category": "minor"})  # kept for a year
    [case] = await mod.queue()
    await mod.decides(case["id"], SUSPEND)
    work = casework(mod.house)
    town.clock.forward(hours=182 * 24)
    await work.appeals.file(case["id"], bob.id, "please look again")
    town.clock.forward(hours=2 * 24)
    with pytest.raises(ApiError, match="time for objecting to this decision is over"):
        await work.appeals.file(case["id"], alice.id, "too mild")


async def test_the_password_of_a_closed_account_is_kept_for_objecting_and_no_longer(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await reports(alice, room, await bob.sends(room))
    [case] = await mod.queue()
    await mod.decides(case["id"], {"measure": "deactivate"})
    town.clock.forward(hours=25)

    async def is_closed() -> bool:
        assert mod.house.server is not None
        town.clock.forward(minutes=2)
        users = mod.house.server.db
        return bool(
            await users.read(lambda query: query.value("SELECT deactivated FROM users WHERE user_id = $1", bob.id))
        )

    assert await until(is_closed), "nobody else is there, so it is carried out a day later"
    assert (await bob.is_refused(bob.signs_in())).status == 403
    appeals = casework(mod.house).appeals
    assert await appeals.may_appeal(bob.id, bob.password), "it opens the objection, and nothing else"
    town.clock.forward(hours=184 * 24)
    assert not await appeals.may_appeal(bob.id, bob.password)

    async def is_forgotten() -> bool:
        assert mod.house.server is not None
        town.clock.forward(minutes=2)
        count = await mod.house.server.db.read(lambda query: query.value("SELECT count(*) FROM appeal_passwords"))
        return bool(count == 0)

    assert await until(is_forgotten), "and is nowhere any more when the time for it is over"


async def test_a_server_that_knows_nothing_of_decisions(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    mod = await desk(town)
    with monkeypatch.context() as there:
        there.setattr(PeerRoutes, "routes", lambda _: [])  # as every other server answers: no such endpoint
        await town.relay("two")
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    said = await bob.sends(room)
    assert await alice.sees(said)
    await reports(alice, room, said)
    [case] = await mod.queue()
    await mod.decides(case["id"], {"measure": "block_room", "target": room})

    async def is_told() -> bool:
        [decision] = (await mod.asks("GET", f"reports/{case['id']}"))["decisions"]
        return bool(decision["told_other_server"] == "refused")

    assert await until(is_told), "the case says that his server takes no such notice"


async def test_where_a_moderator_has_the_power_kicks_and_bans_reach_across(town: Town) -> None:
    house, [mod] = await moderators(town, "mod")
    bob, carol = await town.users("bob@one", "carol@two")
    room = await mod.creates_room(with_=[bob, carol])

    async def is_there(person: Person, membership: str) -> bool:
        return await mod.notices(lambda: mod.membership(room, person) == membership)

    for person in (bob, carol):
        await person.syncs()
        await takes(mod, "kick", person.id, room_id=room)
        assert await person.notices(lambda person=person: room in person.left), "put out, here and elsewhere"
        assert await is_there(person, "leave")
        refused = await mod.is_refused(takes(mod, "kick", person.id, room_id=room))
        assert "is not in this room" in refused.text
        await mod.invites_to(room, person)
        assert await until(lambda person=person: person.is_invited_to(room)), "a kick is no ban"
        await takes(mod, "ban", person.id, room_id=room)
        assert await is_there(person, "ban")
        assert (await person.is_refused(person.joins(room, mod.server))).status == 403
        await takes(mod, "ban", person.id, room_id=room, undo=True)
        assert await is_there(person, "leave")
        await mod.invites_to(room, person)
        assert await until(lambda person=person: person.is_invited_to(room))
        await person.joins(room, mod.server)
    assert await carol.sees(await bob.sends(room))
    assert await logged(house) == ["kick", "ban", "undo.ban"] * 2, "and each of them stands in the log, once"
