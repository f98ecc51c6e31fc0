"""Sliding sync over a bad line: whatever gets lost, in whatever order rooms come and go, in the end the client has it all."""

from __future__ import annotations

import random

import pytest

from tests.sync.connection import Connection, a_list, a_subscription, room_list
from tests.town import Town

REQUIRED = [["m.room.name", ""], ["m.room.member", "*"]]


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_nothing_is_lost_and_nothing_comes_twice(town: Town, seed: int) -> None:
    chance = random.Random(seed)
    alice, bob = await town.users("alice@one", "bob@one")
    rooms = [await alice.creates_room(with_=bob) for _ in range(4)]
    connection = Connection(bob, "shaky")
    connection.lists = {"top": a_list(0, 1, limit=200, required=REQUIRED)}
    connection.extensions = {"account_data": {"enabled": True}}
    out: set[str] = set()
    for step in range(90):
        room = chance.choice(rooms)
        what = chance.random()
        if what < 0.4:
            await (alice if room in out else chance.choice([alice, bob])).sends(room)
        elif what < 0.5:
            await alice.sets(room, "m.room.name", {"name": f"Name {step}"})
        elif what < 0.55 and room not in out:
            await bob.leaves(room)
            out.add(room)
        elif what < 0.6 and room in out:
            await alice.invites_to(room, bob)
            await bob.joins(room)
            out.discard(room)
        elif what < 0.7:
            connection.subscriptions = {
                one: a_subscription(200, REQUIRED) for one in chance.sample(rooms, chance.randrange(3))
            }
        elif what < 0.75:
            connection.lists["top"] = a_list(0, chance.randrange(4), limit=200, required=REQUIRED)
        elif what < 0.85:
            await connection.asks()  # and the answer is lost
        else:
            await connection.syncs()
    connection.lists["top"] = a_list(0, 9, limit=200, required=REQUIRED)
    await connection.syncs()
    for room in set(rooms) - out:
        truth = [event["event_id"] for event in await bob.history(room, "f")]
        seen = connection.ids(room)
        assert len(seen) == len(set(seen)), "no event comes twice"
        assert seen == truth[-len(seen) :] and len(seen) == len(truth), "every event came, in order"
        name = connection.state[room].get(("m.room.name", ""))
        held = next((e for e in await bob.history(room) if e["type"] == "m.room.name"), None)
        assert (name or {}).get("event_id") == (held or {}).get("event_id"), "and the state is the room's"
        assert {u: connection.membership(room, u) for u in (alice.id, bob.id)} == {alice.id: "join", bob.id: "join"}
    for room in out & set(connection.rooms):
        assert connection.membership(room, bob.id) == "leave", "what she left she knows to have left"
    assert not (await connection.syncs())["rooms"]


async def test_an_invitation_from_another_server_is_in_the_list(town: Town) -> None:
    alice, bob = await town.user("alice@one"), await town.user("bob@two")
    connection = room_list(bob)
    connection.lists["invites"] = a_list(0, 16, is_invite=True, is_encrypted=True)
    await connection.syncs()
    room = await alice.creates_room(name="Studio")
    await alice.sends(room)
    await alice.invites_to(room, bob)
    assert await connection.notices(lambda: room in connection.rooms), "the invitation arrives by itself"
    stripped = {(e["type"], e["state_key"]): e["content"] for e in connection.rooms[room]["invite_state"]}
    assert stripped["m.room.member", bob.id]["membership"] == "invite" and connection.rooms[room]["name"] == "Studio"
    assert connection.counts["invites"] == 1, "filters look at what the invitation tells"
    await bob.joins(room, alice.server)
    assert await connection.notices(lambda: connection.membership(room, bob.id) == "join"), "the join makes it a room"
    assert connection.rooms[room]["initial"] and ("m.room.create", "") in connection.state[room]
    new = await alice.sends(room)
    assert await connection.notices(lambda: new in connection.ids(room)), "and then its messages come"
    second = await alice.creates_room()
    await alice.invites_to(second, bob)
    assert await connection.notices(lambda: second in connection.rooms)
    await bob.leaves(second)
    assert await connection.notices(lambda: connection.membership(second, bob.id) == "leave"), "turned down, it is over"
    assert connection.counts["invites"] == 0
