"""One relay: the filters of sliding sync's lists, and what comes beside the rooms: keys, messages for devices, receipts."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.people import Json, Person, path, until
from tests.sync.connection import Connection, a_list, a_subscription, encryption, room_list
from tests.town import Town

CANCEL = {"action": "request_cancellation", "requesting_device_id": "D"}


async def _listed(person: Person, **filters: Any) -> set[str]:
    connection = Connection(person, "probe")
    connection.lists = {"list": a_list(0, 99, required=[], **filters)}
    return set((await connection.syncs())["rooms"])


async def _tags(person: Person, room: str, tag: str) -> None:
    await person.calls("PUT", path("user", person.id, "rooms", room, "tags", tag), {})


async def _means_direct(person: Person, other: Person, *rooms: str) -> None:
    await person.calls("PUT", path("user", person.id, "account_data", "m.direct"), {other.id: list(rooms)})


async def test_a_list_holds_what_its_filters_let_through(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    direct, tagged, both = [await alice.creates_room(with_=bob) for _ in range(3)]
    space = await alice.creates_room(with_=bob, creation_content={"type": "m.space"})
    invited = await alice.creates_room()
    await alice.invites_to(invited, bob)
    await _means_direct(bob, alice, direct, both)
    await _tags(bob, tagged, "m.favourite")
    await _tags(bob, both, "m.favourite")
    await _tags(bob, both, "m.lowpriority")
    await alice.sets(space, "m.space.child", {"via": [alice.server]}, tagged)
    await alice.sets(space, "m.space.child", {"via": [alice.server]}, both)
    everything = {direct, tagged, both, space, invited}
    assert await _listed(bob) == everything
    assert await _listed(bob, is_dm=True) == {direct, both}
    assert await _listed(bob, is_dm=False) == {tagged, space, invited}
    assert await _listed(bob, is_invite=True) == {invited}
    assert await _listed(bob, is_invite=False) == everything - {invited}
    assert await _listed(bob, room_types=["m.space"]) == {space}
    assert await _listed(bob, room_types=[None]) == everything - {space}, "null is a room without a type"
    assert await _listed(bob, not_room_types=["m.space"]) == everything - {space}
    assert await _listed(bob, room_types=["m.space"], not_room_types=["m.space"]) == set(), "what is excluded wins"
    assert await _listed(bob, tags=["m.favourite"]) == {tagged, both}
    assert await _listed(bob, tags=["m.favourite"], not_tags=["m.lowpriority"]) == {tagged}
    assert await _listed(bob, spaces=[space]) == {tagged, both}
    assert await _listed(bob, spaces=[invited]) == set(), "a space that she has not joined tells nothing"
    assert await _listed(bob, is_encrypted=False) == {space} | await _listed(bob, is_encrypted=False)
    assert {direct, tagged, both, invited} <= await _listed(bob, is_encrypted=True)
    await alice.sets(space, "m.space.child", {}, tagged)
    assert await _listed(bob, spaces=[space]) == {both}, "a child that was taken out is out"


async def test_lists_follow_what_changes(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    one, two = [await alice.creates_room(with_=bob) for _ in range(2)]
    space = await alice.creates_room(with_=bob, creation_content={"type": "m.space"})
    connection = Connection(bob, "lists")
    connection.lists = {
        "people": a_list(0, 99, required=[], is_dm=True),
        "favourites": a_list(0, 99, required=[], tags=["m.favourite"]),
        "space": a_list(0, 99, required=[], spaces=[space]),
        "invites": a_list(0, 99, required=[], is_invite=True),
    }
    await connection.syncs()
    assert connection.counts == {"people": 0, "favourites": 0, "space": 0, "invites": 0}
    await _means_direct(bob, alice, one)
    answer = await connection.syncs(timeout=5000)
    assert answer["rooms"][one]["is_dm"] is True and connection.counts["people"] == 1
    await _tags(bob, two, "m.favourite")
    answer = await connection.syncs(timeout=5000)
    assert set(answer["rooms"]) == {two} and connection.counts["favourites"] == 1
    await alice.sets(space, "m.space.child", {"via": [alice.server]}, two)
    await connection.syncs(timeout=5000)
    assert connection.counts["space"] == 1
    await _means_direct(bob, alice)
    await connection.syncs(timeout=5000)
    assert connection.counts["people"] == 0, "a room that passes no more is out of the list"
    invited = await alice.creates_room()
    await alice.invites_to(invited, bob)
    await connection.syncs(timeout=5000)
    assert connection.counts["invites"] == 1 and invited in connection.rooms
    await bob.joins(invited)
    await connection.syncs(timeout=5000)
    assert connection.counts["invites"] == 0


async def test_a_room_that_becomes_a_conversation_of_two_says_so(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    connection = room_list(bob)
    assert "is_dm" not in (await connection.syncs())["rooms"][room]
    await _means_direct(bob, alice, room)
    answer = await connection.syncs(timeout=5000)
    assert answer["rooms"][room]["is_dm"] is True and ("", "m.direct") in connection.account_data
    await _means_direct(bob, alice)
    assert (await connection.syncs(timeout=5000))["rooms"][room]["is_dm"] is False


async def test_messages_for_devices_wait_until_they_are_acknowledged(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    connection = encryption(bob)
    await connection.syncs()
    assert not connection.messages

    async def tells(number: int) -> None:
        content = {**CANCEL, "request_id": str(number)}
        await alice.tells_devices("m.room_key_request", {bob.id: {bob.device: content}})

    def ids(answer: Json) -> list[str]:
        return [event["content"]["request_id"] for event in answer["extensions"]["to_device"]["events"]]

    waiting = asyncio.create_task(connection.asks(timeout=30000))
    await asyncio.sleep(0.1)
    await tells(1)
    assert ids(await asyncio.wait_for(waiting, 5)) == ["1"], "a message ends the wait"
    assert ids(await connection.asks()) == ["1"], "it stays until the client says that it has it"
    for number in (2, 3, 4):
        await tells(number)
    connection.extensions["to_device"]["limit"] = 2
    answer = await connection.syncs()
    assert ids(answer) == ["1", "2"] and answer["extensions"]["to_device"]["events"][0]["sender"] == alice.id
    assert ids(await connection.syncs()) == ["3", "4"], "then the next ones, in order, each once"
    assert ids(await connection.syncs()) == []
    late = encryption(bob)

    async def nothing_waits() -> bool:
        return ids(await late.asks()) == []

    assert await until(nothing_waits), "what was acknowledged is gone for good"
    late.to_device_since = "yesterday"
    refused = await bob.is_refused(late.asks())
    assert refused.status == 400


async def test_keys_that_change_are_told_on_the_connection_for_keys(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    await alice.creates_room(with_=bob)
    connection = encryption(bob)
    answer = await connection.syncs()
    assert answer["extensions"]["e2ee"]["device_unused_fallback_key_types"] == []
    waiting = asyncio.create_task(connection.syncs(timeout=30000))
    await asyncio.sleep(0.1)
    keys = {f"curve25519:{alice.device}": "A" * 43, f"ed25519:{alice.device}": "B" * 43}
    await alice.calls(
        "POST",
        "keys/upload",
        {
            "device_keys": {
                "user_id": alice.id,
                "device_id": alice.device,
                "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
                "keys": keys,
                "signatures": {alice.id: {f"ed25519:{alice.device}": "C" * 86}},
            }
        },
    )
    await asyncio.wait_for(waiting, 5)
    assert connection.changed == {alice.id}, "whoever shares an encrypted room hears of new keys"
    quiet = await connection.syncs()
    assert "device_lists" not in quiet["extensions"]["e2ee"]
    carol = await town.user("carol@one")
    room = await carol.creates_room()
    await carol.invites_to(room, bob)
    await bob.joins(room)
    await connection.syncs()
    assert carol.id in connection.changed, "and of whom she newly shares one with"


async def test_typing_and_receipts_come_for_the_rooms_that_are_looked_at(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    looked_at, other = [await alice.creates_room(with_=bob) for _ in range(2)]
    sent = await bob.sends(looked_at)
    connection = room_list(bob, last=0)
    await connection.syncs()
    waiting = asyncio.create_task(connection.syncs(timeout=30000))
    await asyncio.sleep(0.1)
    await alice.is_typing(other)
    await alice.is_typing(looked_at)
    await asyncio.wait_for(waiting, 5)
    assert connection.typing == {looked_at: [alice.id]}, "who types elsewhere wakes nobody"
    await alice.is_typing(looked_at, False)
    await connection.syncs(timeout=5000)
    assert connection.typing[looked_at] == []
    await alice.has_read(looked_at, sent)
    await connection.syncs(timeout=5000)
    assert connection.receipts[looked_at][alice.id, "m.read"] == sent
    connection.extensions["typing"] = {"enabled": True, "lists": [], "rooms": []}
    await alice.is_typing(looked_at)
    await connection.syncs()
    assert connection.typing[looked_at] == [], "who asks for no room's notices gets none"
    fresh = room_list(bob, last=0)
    await fresh.syncs()
    assert fresh.typing == {looked_at: [alice.id]} and fresh.receipts[looked_at] == {(alice.id, "m.read"): sent}, (
        "a new one gets what holds now"
    )


async def test_what_she_notes_about_a_room_comes_with_the_room(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    one, two = [await alice.creates_room(with_=bob) for _ in range(2)]
    await _tags(bob, one, "m.favourite")
    connection = room_list(bob, last=0)
    await connection.syncs()
    assert (one, "m.tag") not in connection.account_data, "the room is not in the window"
    await alice.sends(one)
    await connection.syncs()
    assert connection.account_data[one, "m.tag"] == {"tags": {"m.favourite": {}}}, "when it comes, its tags come along"
    await _tags(bob, two, "m.lowpriority")
    answer = await connection.syncs(timeout=5000)
    assert connection.account_data[two, "m.tag"]["tags"] == {"m.lowpriority": {}}, (
        "of a room that she knows, wherever it stands"
    )
    assert set(answer["extensions"]["account_data"]["rooms"]) == {two}
    await bob.calls("PUT", path("user", bob.id, "account_data", "com.example.colour"), {"is": "blue"})
    await connection.syncs(timeout=5000)
    assert connection.account_data["", "com.example.colour"] == {"is": "blue"}


async def test_an_opened_room_shows_who_read_its_older_messages(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    old = await bob.sends(room)
    await alice.has_read(room, old)
    await bob.sends(room)
    connection = room_list(bob)
    await connection.syncs()
    assert not connection.receipts[room], "the only message that is shown was not read yet"
    connection.subscriptions = {room: a_subscription()}
    await connection.syncs()
    assert connection.receipts[room][alice.id, "m.read"] == old, "with the older messages come their receipts"


async def test_extensions_that_hold_nothing_are_answered(town: Town) -> None:
    bob = await town.user("bob@one")
    connection = Connection(bob, "odd")
    connection.extensions = {
        "io.element.msc4308.thread_subscriptions": {"enabled": True, "limit": 10},
        "com.example.new": {"enabled": True},
    }
    answer = await connection.syncs()
    assert answer["extensions"] == {"io.element.msc4308.thread_subscriptions": {}}, "what is not known is passed over"
    for body in (
        {"lists": []},
        {"lists": {"a": {"timeline_limit": "x"}}},
        {"extensions": {"e2ee": 5}},
        {"lists": {"a": a_list(3, 1)}},
    ):
        refused = await bob.is_refused(bob.calls("POST", connection.path, body))
        assert refused.status == 400 and refused.text, "a request that is none is refused with a reason"
