"""Our relay and a real Synapse look into each other's rooms: spaces, summaries, events by date; and a room is upgraded."""

from __future__ import annotations

from typing import Any

from tests.interop.street import Street, both_sides
from tests.people import Person, path, until

V1 = "/_matrix/client/v1"
OPEN_TO_ALL = {"type": "m.room.history_visibility", "content": {"history_visibility": "world_readable"}}


async def _tree(person: Person, space: str) -> list[Any]:
    found: list[Any] = (await person.calls("GET", f"{V1}/{path('rooms', space, 'hierarchy')}"))["rooms"]
    return found


@both_sides
async def test_a_space_with_a_branch_over_there(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    space = {"preset": "public_chat", "creation_content": {"type": "m.space"}, "initial_state": [OPEN_TO_ALL]}
    root, theirs = await alice.creates_room(name="Root", **space), await bob.creates_room(name="Branch", **space)
    leaf = await bob.creates_room(preset="public_chat", name="Leaf")
    secret = await bob.creates_room(name="Secret")
    await alice.sets(root, "m.space.child", {"via": [bob.server]}, theirs)
    for child in (leaf, secret):
        await bob.sets(theirs, "m.space.child", {"via": [bob.server]}, child)
    told = await _tree(alice, root)
    assert [one["room_id"] for one in told] == [root, theirs, leaf], "what is private stays unseen"
    assert [one.get("name") for one in told] == ["Root", "Branch", "Leaf"]


@both_sides
async def test_a_summary_from_over_there(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await alice.creates_room(preset="public_chat", name="Open")
    where = f"/_matrix/client/unstable/im.nheko.summary/{path('summary', room)}?via={alice.server}"
    told = await bob.calls("GET", where)
    assert told["room_id"] == room and told["name"] == "Open" and told["num_joined_members"] == 1


@both_sides
async def test_the_event_of_a_moment_over_there(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice, preset="public_chat")
    sent = [await alice.sends(room) for _ in range(3)]
    ts = (await alice.event(room, sent[1]))["origin_server_ts"]
    await bob.joins(room, alice.server)
    where = f"{V1}/{path('rooms', room, 'timestamp_to_event')}"
    found = await bob.calls("GET", where, ts=ts, dir="f")
    assert found["event_id"] in sent[:2], "those of one millisecond may come in any order"
    assert (await bob.event(room, found["event_id"]))["type"] == "m.room.encrypted", (
        "and it is there to be read on from"
    )


@both_sides
async def test_a_room_is_upgraded(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    old = await street.room(alice, bob, room_version="10", preset="public_chat")
    answer = await alice.calls("POST", path("rooms", old, "upgrade"), {"new_version": "12"})
    new = answer["replacement_room"]
    assert await bob.notices(lambda: ("m.room.tombstone", "") in bob.state[old]), "the other side is told where to go"
    assert bob.state[old]["m.room.tombstone", ""]["content"]["replacement_room"] == new
    assert await until(lambda: bob.joins(new, alice.server)) and await bob.notices(lambda: new in bob.rooms)
    said = await bob.sends(new)
    assert await alice.sees(said), "and they talk on"
