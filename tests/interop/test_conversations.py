"""Our relay and a real Synapse: each side makes a room, the other comes by invitation or by address, and they talk."""

from __future__ import annotations

import pytest

from tests.interop.neighbour import encrypted
from tests.interop.street import OURS, Street, becomes, both_sides, they_talk
from tests.people import ciphertext

both_versions = pytest.mark.parametrize("version", ["12", "10"])


@both_sides
@both_versions
async def test_an_encrypted_conversation_by_invitation(street: Street, host: str, version: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice, bob, room_version=version)
    assert await bob.reads(room, "m.room.encryption") == {"algorithm": "m.megolm.v1.aes-sha2"}
    assert (await bob.reads(room, "m.room.create"))["room_version"] == version
    assert await alice.members(room) == await bob.members(room), "both sides know the same members"
    content = ciphertext()
    sent = await alice.sends(room, content)
    seen = await bob.sees(sent)
    assert seen is not None, "a message crosses"
    assert (seen["sender"], seen["content"]) == (alice.id, content), "as it was sent"
    content = ciphertext()
    sent = await bob.sends(room, content)
    seen = await alice.sees(sent)
    assert seen is not None, "and an answer comes back"
    assert (seen["sender"], seen["content"]) == (bob.id, content), "as it was sent"


@both_sides
@both_versions
async def test_an_address_leads_into_the_room(street: Street, host: str, version: str) -> None:
    alice, bob = await street.two(host)
    alias = f"studio-{alice.name}-{version}"
    room = await alice.creates_room(**encrypted(preset="public_chat", room_alias_name=alias, room_version=version))
    found = await bob.calls("GET", f"directory/room/%23{alias}:{alice.server}")
    assert (found["room_id"], found["servers"]) == (room, [alice.server]), "the address is looked up where it is"
    assert await bob.joins(f"#{alias}:{alice.server}") == room
    await bob.syncs()
    await they_talk(room, alice, bob)


@both_sides
@both_versions
async def test_redactions_cross(street: Street, host: str, version: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice, bob, room_version=version)
    for author, listener in ((alice, bob), (bob, alice)):
        sent = await author.sends(room)
        assert await listener.sees(sent)
        redaction = await author.redacts(room, sent)
        seen = await listener.sees(redaction)
        assert seen is not None, f"{author.id} takes back what she said, and the other side learns it"
        assert (seen.get("redacts"), seen["content"].get("redacts", sent)) == (sent, sent)
        event = await listener.event(room, sent)
        assert event["content"] == {}, "the ciphertext is gone there, too"
        assert event["unsigned"]["redacted_because"]["event_id"] == redaction
    sent = await bob.sends(room)
    redaction = await alice.redacts(room, sent)
    assert await bob.sees(redaction), "a moderator's redaction crosses"
    assert (await bob.event(room, sent))["content"] == {}


@both_sides
async def test_typing_and_receipts_cross(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice, bob)
    for one, two in ((alice, bob), (bob, alice)):
        await one.is_typing(room)
        assert await two.notices(lambda one=one, two=two: two.typing.get(room) == [one.id]), (
            "that someone types is seen"
        )
        await one.is_typing(room, False)
        assert await two.notices(lambda two=two: two.typing.get(room) == []), "that she stopped, too"
        sent = await one.sends(room)
        assert await two.sees(sent)
        await two.has_read(room, sent)
        seen = await one.notices(lambda one=one, two=two, sent=sent: one.receipts[room].get((two.id, "m.read")) == sent)
        assert seen, "and that it was read"
        await two.has_read(room, await two.sends(room), kind="m.read.private")
        assert await one.sees(await two.sends(room))
        assert (two.id, "m.read.private") not in one.receipts[room], "what is read in private stays there"


@both_sides
async def test_relations_and_threads_are_counted_alike(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice, bob)
    root = await alice.sends(room)
    assert await bob.sees(root)
    relates = {"rel_type": "m.thread", "event_id": root, "is_falling_back": True, "m.in_reply_to": {"event_id": root}}
    reply = await bob.sends(room, ciphertext(**{"m.relates_to": relates}))
    assert await alice.sees(reply)
    for person in (alice, bob):
        thread = (await person.event(room, root))["unsigned"]["m.relations"]["m.thread"]
        assert (thread["count"], thread["latest_event"]["event_id"]) == (1, reply)


@pytest.mark.parametrize("version", ["3", "4", "5", "6", "7", "8", "9", "10", "11", "12"])
async def test_every_room_version_both_ways(street: Street, version: str) -> None:
    alice, bob = await street.two(OURS)
    for host, guest in ((alice, bob), (bob, alice)):
        room = await street.room(host, guest, room_version=version)
        await they_talk(room, host, guest)
        await host.sets(room, "m.room.power_levels", {**await host.reads(room, "m.room.power_levels"), "invite": 1})
        sent = await guest.sends(room)
        await host.redacts(room, sent)
        await guest.leaves(room)
        assert await becomes(host, room, guest, "leave"), f"leaving crosses in version {version}"
