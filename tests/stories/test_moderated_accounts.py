"""Stories of accounts that a moderator locks or suspends, and of who is signed in where."""

from __future__ import annotations

import asyncio

from relay.accounts.moderated import Restrained
from tests.people import Person, path
from tests.town import Town

ADMIN = "/_matrix/client/v1/admin"


async def moderator(town: Town) -> Person:
    mod = await town.user("mod@one")
    await (await town.relay("one")).command("user.admin", user="mod", admin=True)
    return mod


async def suspends(mod: Person, other: Person, suspended: bool = True) -> None:
    answer = await mod.calls("PUT", f"{ADMIN}/suspend/{path(other.id)}", {"suspended": suspended})
    assert answer == {"suspended": suspended}, "the answer says what holds now"


async def locks(mod: Person, other: Person, locked: bool = True) -> None:
    answer = await mod.calls("PUT", f"{ADMIN}/lock/{path(other.id)}", {"locked": locked})
    assert answer == {"locked": locked}, "the answer says what holds now"


async def test_a_suspended_person_reads_leaves_and_takes_back_and_nothing_else(town: Town) -> None:
    mod = await moderator(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room, other, third = [await alice.creates_room(with_=bob) for _ in range(3)]
    mine, hers = await bob.sends(room), await alice.sends(room)
    await alice.sets(
        room,
        "m.room.power_levels",
        {**await alice.reads(room, "m.room.power_levels"), "redact": 0, "state_default": 0, "events": {}, "invite": 0},
    )
    await suspends(mod, bob)
    for doing, what in (
        (bob.sends(room), "send"),
        (bob.sets(room, "m.room.name", {"name": "x"}), "set state"),
        (bob.invites_to(room, mod), "invite"),
        (bob.creates_room(), "make a room"),
        (bob.uploads(b"\x00\x01" * 99), "upload"),
        (bob.redacts(room, hers), "take back what others said"),
        (bob.calls("PUT", path("profile", bob.id, "displayname"), {"displayname": "B"}), "take another name"),
        (bob.joins(await alice.creates_room(preset="public_chat")), "join"),
    ):
        refused = await bob.is_refused(doing)
        assert (refused.status, refused.errcode) == (403, "M_USER_SUSPENDED"), f"a suspended person can't {what}"
    seen = await alice.sends(room)
    assert await bob.sees(seen), "she reads on"
    await bob.redacts(room, mine)
    await bob.leaves(other)
    again = await bob.on_another_device()
    assert (await again.is_refused(again.sends(room))).errcode == "M_USER_SUSPENDED", "a new device does not help"
    await suspends(mod, bob, False)
    await bob.sends(third)
    assert (await mod.calls("GET", f"{ADMIN}/suspend/{path(bob.id)}")) == {"suspended": False}


async def test_a_locked_account_waits_for_its_key(town: Town) -> None:
    mod = await moderator(town)
    bob = await town.user("bob@one")
    await bob.syncs()
    waiting = asyncio.create_task(bob.is_refused(bob.syncs(timeout=60_000)))
    await asyncio.sleep(0.1)
    await locks(mod, bob)
    refused = await asyncio.wait_for(waiting, 10)
    assert (refused.status, refused.errcode) == (401, "M_USER_LOCKED"), "a sync that waits ends at once"
    for doing in (bob.syncs(), bob.creates_room(), bob.calls("GET", "account/whoami"), bob.signs_in()):
        refused = await bob.is_refused(doing)
        assert (refused.status, refused.errcode) == (401, "M_USER_LOCKED"), "nothing goes"
        assert refused.body["soft_logout"] is True, "a client keeps its keys"
    await (await town.relay("one")).restart()
    assert (await bob.is_refused(bob.syncs())).errcode == "M_USER_LOCKED", "nor after a restart"
    await locks(mod, bob, False)
    await bob.syncs()
    await locks(mod, bob)
    await bob.signs_out()
    await locks(mod, bob, False)
    assert (await bob.is_refused(bob.syncs())).errcode == "M_UNKNOWN_TOKEN", "logging out goes while locked, and holds"


async def test_only_administrators_may_and_not_to_each_other(town: Town) -> None:
    mod = await moderator(town)
    alice, bob = await town.users("alice@one", "bob@one")
    for target in (bob.id, "@nobody:elsewhere.example", "@nobody:" + bob.server):
        refused = await alice.is_refused(alice.calls("GET", f"{ADMIN}/lock/{path(target)}"))
        assert (refused.status, refused.errcode) == (403, "M_FORBIDDEN"), "who asks without right learns nothing"
    for target, status, errcode in (
        ("@nobody:elsewhere.example", 400, "M_INVALID_PARAM"),
        ("@nobody:" + bob.server, 404, "M_NOT_FOUND"),
        (mod.id, 403, "M_FORBIDDEN"),
    ):
        refused = await mod.is_refused(mod.calls("PUT", f"{ADMIN}/suspend/{path(target)}", {"suspended": True}))
        assert (refused.status, refused.errcode) == (status, errcode), target
    mine, hers = [(await one.calls("GET", "capabilities"))["capabilities"] for one in (alice, mod)]
    assert "m.account_moderation" not in mine, "who may not is not told of it"
    assert hers["m.account_moderation"] == {"lock": True, "suspend": True}


async def test_who_is_signed_in_where_is_told_without_addresses(town: Town) -> None:
    mod = await moderator(town)
    bob = await town.user("bob@one")
    told = await mod.calls("GET", path("admin", "whois", bob.id))
    assert told["user_id"] == bob.id
    [connection] = told["devices"][bob.device]["sessions"][0]["connections"]
    assert set(connection) == {"last_seen"}, "there is a day, and neither an address nor a user agent"
    assert (await bob.calls("GET", path("admin", "whois", bob.id))) == told, "one may ask about oneself"
    assert (await bob.is_refused(bob.calls("GET", path("admin", "whois", mod.id)))).status == 403


async def test_many_who_come_at_once_ask_the_database_and_all_get_an_answer() -> None:
    """Each of several first askers reads for herself; none may take another's reading for a change and begin again."""
    asked = 0

    class SlowUsers:
        async def restrained(self) -> list[object]:
            nonlocal asked
            asked += 1
            assert asked <= 8, "they go on asking for ever"
            # Each reading takes a few turns of the loop, so that four of them overlap.
            for _ in range(3):
                await asyncio.sleep(0)
            return []

    restrained = Restrained(SlowUsers())  # type: ignore[arg-type]
    answers = await asyncio.gather(*(_a_turn_later(turn, restrained) for turn in range(4)))
    assert answers == [False] * 4, "nobody is suspended, and everybody hears it"


async def _a_turn_later(turns: int, restrained: Restrained) -> bool:
    for _ in range(turns):
        await asyncio.sleep(0)
    return await restrained.suspended("@alice:one")
