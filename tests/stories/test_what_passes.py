"""One relay: typing, receipts, unread counts, account data, tags, filters, profile."""

from __future__ import annotations

import asyncio

from tests.people import path
from tests.town import Town


async def test_typing_is_seen_and_ends(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    waiting = asyncio.create_task(bob.syncs(timeout=20000))
    await asyncio.sleep(0.1)
    await alice.is_typing(room)
    await asyncio.wait_for(waiting, 5)
    assert bob.typing[room] == [alice.id], "typing ends a long poll"
    await alice.is_typing(room, False)
    assert await bob.notices(lambda: bob.typing[room] == []), "stopping is told too"
    await alice.is_typing(room)
    assert await bob.notices(lambda: bob.typing[room] == [alice.id])
    await alice.sends(room)
    refused = await bob.is_refused(bob.calls("PUT", path("rooms", room, "typing", alice.id), {"typing": True}))
    assert refused.status == 403, "nobody types for somebody else"


async def test_a_receipt_is_seen_and_lowers_the_count(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    sent = [await alice.sends(room) for _ in range(3)]
    await bob.syncs()
    assert bob.unread[room]["notification_count"] == 3, "each message of another person counts"
    await bob.has_read(room, sent[1])
    await bob.notices(lambda: bob.unread[room]["notification_count"] != 3)
    assert bob.unread[room]["notification_count"] == 1, "what was read counts no more"
    assert await alice.notices(lambda: alice.receipts[room].get((bob.id, "m.read")) == sent[1]), (
        "the sender sees how far he read"
    )
    await bob.has_read(room, sent[2], kind="m.read.private")
    await bob.notices(lambda: bob.unread[room]["notification_count"] == 0)
    assert bob.unread[room]["notification_count"] == 0, "reading in private counts for himself"
    await alice.syncs()
    assert alice.receipts[room][(bob.id, "m.read")] == sent[1], "and is told to nobody"
    assert (bob.id, "m.read.private") not in alice.receipts[room]


async def test_one_does_not_notify_oneself_and_sending_reads(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await alice.sends(room)
    await bob.syncs()
    assert bob.unread[room]["notification_count"] >= 1
    await bob.sends(room)
    await bob.syncs()
    assert bob.unread[room]["notification_count"] == 0, "who answers has read"
    await alice.calls("PUT", f"pushrules/global/room/{path(room)}", {"actions": []})
    await bob.sends(room)
    await alice.syncs()
    assert alice.unread.get(room, {}).get("notification_count", 0) == 0, "a muted room counts nothing"


async def test_account_data_tags_and_read_markers_reach_her_other_devices(town: Town) -> None:
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    sent = await alice.sends(room)
    phone = await alice.on_another_device()
    await phone.syncs()
    await alice.calls("PUT", path("user", alice.id, "account_data", "com.example.colour"), {"colour": "blue"})
    await alice.calls("PUT", path("user", alice.id, "rooms", room, "tags", "m.favourite"), {"order": 0.5})
    await alice.calls("POST", f"{path('rooms', room)}/read_markers", {"m.fully_read": sent})
    answer = await phone.syncs()
    assert phone.account_data["com.example.colour"] == {"colour": "blue"}
    in_room = {e["type"]: e["content"] for e in answer["rooms"]["join"][room]["account_data"]["events"]}
    assert in_room["m.tag"] == {"tags": {"m.favourite": {"order": 0.5}}}
    assert in_room["m.fully_read"] == {"event_id": sent}
    other = await town.user("bob@one")
    refused = await other.is_refused(other.calls("GET", path("user", alice.id, "account_data", "com.example.colour")))
    assert refused.status == 403, "nobody reads another one's settings"


async def test_a_filter_is_kept_and_obeyed(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await alice.sets(room, "m.room.name", {"name": "Studio"})
    sent = await alice.sends(room)
    filter_id = (
        await bob.calls(
            "POST", path("user", bob.id, "filter"), {"room": {"timeline": {"types": ["m.room.encrypted"], "limit": 5}}}
        )
    )["filter_id"]
    answer = await bob.syncs(filter=filter_id)
    assert [e["event_id"] for e in answer["rooms"]["join"][room]["timeline"]["events"]] == [sent], (
        "only what the filter lets through"
    )
    kept = await bob.calls("GET", path("user", bob.id, "filter", filter_id))
    assert kept["room"]["timeline"]["types"] == ["m.room.encrypted"]


async def test_a_new_name_is_seen_in_the_rooms(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    await alice.calls("PUT", path("profile", alice.id, "displayname"), {"displayname": "Alice A."})
    assert await bob.notices(lambda: bob.name_of(room, alice) == "Alice A.")
    assert (await bob.calls("GET", path("profile", alice.id)))["displayname"] == "Alice A."
    stranger = await town.user("carol@one")
    refused = await stranger.is_refused(stranger.calls("GET", path("profile", alice.id)))
    assert refused.status in (403, 404), "a profile is shown to people who share a room"
