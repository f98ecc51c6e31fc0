"""A room that moderators have closed: nobody comes into it through us and nobody else is shown it, on any path; who is in it goes on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tests.moderation.test_actions import SAFETY, moderators, takes
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


async def test_a_closed_room_is_closed_on_every_path(town: Town) -> None:
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
    await takes(mod, "block_room", room)
    town.clock.forward(minutes=10)  # what others remember of it is over
    still = [name for name, looks in found.items() if await looks()]
    assert still == [], "and none of it when the room is closed"
    sent, answer = await alice.sends(room), await bob.sends(room)
    assert await bob.sees(sent) and await alice.sees(answer), "who is in it goes on: shutting a room is another measure"
    assert await works(bob.leaves(room)), "and may leave"
    await takes(mod, "block_room", room, undo=True)
    town.clock.forward(minutes=10)
    assert await are_open({"joining by its address", "an invite", "an invite to elsewhere"}) == [], (
        "it can be opened again"
    )


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
