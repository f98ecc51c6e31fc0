"""A room that moderators have closed: nobody comes into it through us and nobody else is shown it, on any path; who is in it goes on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from relay.clock import DAY
from relay.moderation.moderator_keys import Moderator
from tests.moderation.test_actions import SAFETY, logged, moderators, takes
from tests.people import Person, Refused, path, until
from tests.town import Town

Looks = Callable[[], Awaitable[bool]]


async def works(doing: Awaitable[Any]) -> bool:
    try:
        await doing
    except Refused as no:
        assert no.status in (403, 404), no
        return False
    return True


def ways(
    room: str, alias: str, space: str, us: str, dave: Person, erin: Person, zoe: Person, carol: Person
) -> dict[str, Looks]:
    """Each way in which somebody who is not in the room can find it, look into it or come in; dave, erin and zoe are ours."""

    async def listed(person: Person, **query: Any) -> bool:
        chunk = (await person.calls("GET", "publicRooms", **query))["chunk"]
        return room in [one["room_id"] for one in chunk]

    async def in_the_space(person: Person) -> bool:
        rooms = (await person.calls("GET", f"/_matrix/client/v1/rooms/{path(space)}/hierarchy"))["rooms"]
        return room in [one["room_id"] for one in rooms]

    summary = f"/_matrix/client/v1/room_summary/{path(room)}"

    async def joins(person: Person) -> bool:
        came = await works(person.joins(room, us))
        if came:
            await person.leaves(room)
        return came

    return {
        "our directory": lambda: listed(dave),
        "our directory, over federation": lambda: listed(carol, server=us),
        "its address": lambda: works(dave.calls("GET", f"directory/room/{path(alias)}")),
        "its address, over federation": lambda: works(carol.calls("GET", f"directory/room/{path(alias)}")),
        "its summary": lambda: works(dave.calls("GET", summary)),
        "its summary, for a stranger": lambda: works(dave.calls("GET", summary, token="")),
        "its summary, over federation": lambda: works(carol.calls("GET", summary, via=us)),
        "a space": lambda: in_the_space(dave),
        "a space, over federation": lambda: in_the_space(carol),
        "looking in": lambda: works(zoe.calls("GET", f"{path('rooms', room)}/messages", dir="b")),
        "its state, looking in": lambda: works(zoe.calls("GET", f"{path('rooms', room)}/state")),
        "joining": lambda: joins(dave),
        "joining by its address": lambda: works(dave.calls("POST", f"join/{path(alias)}", {})),
        "joining, over federation": lambda: joins(carol),
        "an address": lambda: works(erin.calls("PUT", f"directory/room/{path(f'#more:{us}')}", {"room_id": room})),
        "an invite": lambda: works(erin.invites_to(room, dave)),
        "an invite to elsewhere": lambda: works(erin.invites_to(room, carol)),
    }


@pytest.mark.parametrize("measure", ["block_room", "shut_room"])
async def test_a_closed_room_is_closed_on_every_path(town: Town, measure: str) -> None:
    """Shutting waits for a second person: until then the room is blocked."""
    house, [mod] = await moderators(town, "mod")
    alice, dave, erin, zoe = await town.users("alice@one", "dave@one", "erin@one", "zoe@one")
    bob, carol = await town.users("bob@two", "carol@three")
    us = house.name
    readable = [
        {"type": "m.room.history_visibility", "state_key": "", "content": {"history_visibility": "world_readable"}}
    ]
    room = await alice.creates_room(
        preset="public_chat", room_alias_name="loud", visibility="public", name="Loud", initial_state=readable
    )
    space = await alice.creates_room(preset="public_chat", creation_content={"type": "m.space"})
    await alice.sets(space, "m.space.child", {"via": [us]}, room)
    for person in (erin, bob):
        await person.joins(room, us)
    await carol.joins(space, us)
    found = ways(room, f"#loud:{us}", space, us, dave, erin, zoe, carol)

    async def are_open(but: set[str]) -> list[str]:
        return [name for name, looks in found.items() if name not in but and not await looks()]

    # Who has come in once cannot be invited or joined by another way again.
    once = {"joining by its address", "an invite", "an invite to elsewhere", "an address"}
    assert await are_open(once) == [], "all this works while nobody has anything against it"
    taken = await takes(mod, measure, room)
    town.clock.forward(minutes=10)  # what others remember of it is over
    still = [name for name, looks in found.items() if await looks()]
    assert still == [], "and none of it when the room is closed"
    sent, answer = await alice.sends(room), await bob.sends(room)
    assert await bob.sees(sent) and await alice.sees(answer), "who is in it goes on: shutting a room is another measure"
    assert await works(bob.leaves(room)), "and may leave"
    if measure == "shut_room":
        await mod.calls("POST", f"{SAFETY}/acts/{taken['waits']}/cancel", {})
    else:
        await takes(mod, measure, room, undo=True)
    town.clock.forward(minutes=10)
    assert await are_open({"joining by its address", "an invite", "an invite to elsewhere"}) == [], (
        "it can be opened again"
    )


async def test_a_room_that_is_to_be_shut_is_blocked_until_that_is_decided(town: Town) -> None:
    house, [mod, other] = await moderators(town, "mod", "other")
    alice, dave = await town.users("alice@one", "dave@one")
    room, known, left = [await alice.creates_room(preset="public_chat") for _ in range(3)]

    async def decides(asked: dict[str, Any], word: str) -> None:
        await other.calls("POST", f"{SAFETY}/acts/{asked['waits']}/{word}", {})

    async def is_open(one: str) -> bool:
        came = await works(dave.joins(one))
        if came:
            await dave.leaves(one)
        return came

    first, second = [await takes(mod, "shut_room", room) for _ in range(2)]
    await house.restart()
    assert not await is_open(room), "also after a restart"
    refused = await mod.is_refused(takes(mod, "block_room", room, undo=True))
    assert refused.status == 409 and "Cancel that" in refused.text, "what stands by the shutting falls with it"
    await decides(first, "cancel")
    assert not await is_open(room), "one of two who asked still waits"
    await decides(second, "cancel")
    assert await is_open(room), "nobody wants it shut any more"

    await takes(mod, "block_room", known)
    await decides(await takes(mod, "shut_room", known), "cancel")
    assert not await is_open(known), "what was blocked by itself stays so"
    asked = await takes(mod, "shut_room", known)
    await takes(mod, "block_room", known, undo=True)
    assert not await is_open(known), "and what is to be shut stays so as well"
    await decides(asked, "cancel")
    assert await is_open(known)
    assert await logged(house) == [
        "asked.shut_room", "block_room", "asked.shut_room", "cancelled.shut_room", "cancelled.shut_room", "undo.block_room",
        "block_room", "asked.shut_room", "cancelled.shut_room",
        "asked.shut_room", "undo.block_room", "cancelled.shut_room", "undo.block_room",
    ], "each time it says what became of the room"  # fmt: skip

    assert house.server is not None
    enrolled = town.clock.now() - 8 * DAY

    async def enrolled_ones() -> list[Moderator]:
        return [Moderator(mod.id, True, enrolled), Moderator(other.id, True, enrolled)]

    house.server.moderation.acting.actions._persons._moderators = enrolled_ones
    await other.syncs()
    asked = await takes(mod, "shut_room", left)
    assert "until" not in asked and not await is_open(left)
    town.clock.forward(hours=8 * 24)
    assert await until(lambda: is_open(left)), "what nobody confirms within a week lapses"
    page = await house.server.moderation.audit_log.page(limit=2)
    assert [(entry.action, entry.actor) for entry in page] == [
        ("undo.block_room", "rule:not-confirmed"), ("cancelled.shut_room", "rule:not-confirmed"),
    ]  # fmt: skip


async def test_a_list_that_is_applied_closes_rooms_as_well(town: Town) -> None:
    house, [mod] = await moderators(town, "mod")
    [keeper] = await town.users("keeper@two")
    alice, carol = await town.users("alice@one", "carol@three")
    room = await alice.creates_room(preset="public_chat", visibility="public")
    lists = await keeper.creates_room(preset="public_chat", creation_content={"type": "m.policy"})
    rule = {"entity": room, "recommendation": "m.ban", "reason": "x"}
    await keeper.sets(lists, "m.policy.rule.room", rule, "rule-1")
    await mod.calls("POST", f"{SAFETY}/lists", {"room_id": lists, "effect": "apply", "via": [keeper.server]})

    async def is_listed() -> bool:
        chunk = (await alice.calls("GET", "publicRooms"))["chunk"]
        return room in [one["room_id"] for one in chunk]

    assert not await is_listed() and not await works(carol.joins(room, house.name))
    await keeper.sets(lists, "m.policy.rule.room", {}, "rule-1")
    assert await until(is_listed) and await works(carol.joins(room, house.name))
