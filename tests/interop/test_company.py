"""Our relay and a real Synapse with more people, more servers, odd contents, and an unmodified client with its encryption."""

from __future__ import annotations

import asyncio

import nio
import pytest

from tests.interop.neighbour import encrypted
from tests.interop.street import OURS, THEIRS, Street, becomes, both_sides, other, state_of, they_talk
from tests.nio_people import Nio, good
from tests.people import Person, ciphertext, until


@both_sides
async def test_three_servers_in_one_room(street: Street, host: str) -> None:
    """Two relays of ours and Synapse: whoever makes the room, events reach everybody, directly, and each is believed."""
    alice, bob = await street.two(host)
    carol = await street.town.user("carol@third")
    room = await street.room(alice, bob)
    before = await bob.sends(room)
    await street.welcomes(alice, carol, room)
    await they_talk(room, alice, bob, carol)
    assert await until(lambda: _reads(carol, room, before)), "who came last reads what a third server said before"
    await bob.leaves(room)
    assert await becomes(carol, room, bob, "leave")
    await they_talk(room, alice, carol)
    assert await state_of(alice, room) == await state_of(carol, room)


async def _reads(person: Person, room: str, *event_ids: str) -> bool:
    return set(event_ids) <= {event["event_id"] for event in await person.history(room)}


@both_sides
async def test_a_host_that_left_does_not_matter(street: Street, host: str) -> None:
    """The room's maker leaves; somebody else is asked, and lets a third server in."""
    alice, bob = await street.two(host)
    room = await street.room(alice, bob, preset="public_chat")
    await alice.leaves(room)
    assert await becomes(bob, room, alice, "leave")
    carol = await street.town.user("carol@third")
    await carol.joins(room, bob.server)
    await carol.syncs()
    await they_talk(room, bob, carol)
    await alice.joins(room, bob.server)
    await alice.syncs()
    await they_talk(room, alice, bob, carol)


@both_sides
async def test_several_come_at_once(street: Street, host: str) -> None:
    alice = await street.user("alice", host)
    guests = [await street.user(name, other(host)) for name in ("bob", "carol", "dora", "emma")]
    room = await alice.creates_room(**encrypted(preset="public_chat"))
    await alice.syncs()
    await asyncio.gather(*(guest.joins(room, alice.server) for guest in guests))
    for guest in guests:
        await guest.syncs()
        assert await becomes(alice, room, guest, "join"), f"{guest.id} is seen by the host"
    await they_talk(room, alice, *guests)
    assert await alice.members(room) == await guests[-1].members(room), "everybody is there for everybody"


@both_sides
async def test_both_speak_at_once(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice, bob)
    said = await asyncio.gather(*(person.sends(room) for _ in range(20) for person in (alice, bob)))
    for person in (alice, bob):
        assert await until(lambda person=person: _reads(person, room, *said)), "everything arrives"
        history = [e["event_id"] for e in await person.history(room) if e["type"] == "m.room.encrypted"]
        assert sorted(history) == sorted(said), "each once"
    await they_talk(room, alice, bob)


@both_sides
async def test_an_invitation_where_somebody_of_that_server_is_in_already(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    carol = await street.user("carol", other(host))
    room = await street.room(alice, bob)
    await street.welcomes(alice, carol, room)
    assert await becomes(bob, room, carol, "join")
    dora = await street.user("dora", host)
    levels = await alice.reads(room, "m.room.power_levels")
    await alice.sets(room, "m.room.power_levels", {**levels, "invite": 0})
    assert await bob.notices(lambda: bob.state[room]["m.room.power_levels", ""]["content"].get("invite") == 0)
    await street.welcomes(bob, dora, room)
    await they_talk(room, alice, bob, carol, dora)


@pytest.mark.parametrize("version", ["5", "12"])
async def test_odd_contents_keep_their_hash(street: Street, version: str) -> None:
    """Key order, escapes and numbers, as another implementation writes them: one wrong byte and the content is gone."""
    alice, bob = await street.two(THEIRS)
    room = await street.room(alice, bob, room_version=version)
    odd = {
        "\uffff": 1, "\U0001f600": 2, "é": "\u2028\u2029\x7f\x01\"\\/", "": {}, "10": [], "9": None,
        "most": 2**53 - 1, "least": -(2**53) + 1, "deep": [[[[{"a": [True, False]}]]]],
    }  # fmt: skip
    if int(version) < 6:
        odd |= {"half": 0.5, "tiny": 1e-7, "huge": 1e22}
    content = ciphertext(**{"org.example.odd": odd})
    sent = await alice.sends(room, content)
    seen = await bob.sees(sent)
    assert seen is not None and seen["content"] == content, "it arrives as it was sent"
    await they_talk(room, bob, alice)


@both_sides
async def test_a_large_message_crosses(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice, bob)
    content = ciphertext(size=44_000)
    sent = await alice.sends(room, content)
    seen = await bob.sees(sent)
    assert seen is not None and seen["content"] == content
    refused = await alice.is_refused(alice.sends(room, ciphertext(size=50_000)))
    assert (refused.status, refused.errcode) == (413, "M_TOO_LARGE")


async def test_an_unmodified_client_on_each_side(street: Street) -> None:
    """matrix-nio and its encryption: a conversation, a second device, and a file, between a relay and Synapse."""
    people = await street.two(OURS)
    folder = street.town.folder / "nio"
    alice, bob = (Nio(person, folder / person.name, f"{person.name.upper()}LAPTOP") for person in people)
    phone = Nio(people[1], folder / "phone", "PHONE")
    try:
        for device in (alice, bob):
            await device.signs_in()
        for host, guest in ((alice, bob), (bob, alice)):
            room = await street.room(host.person)
            assert await host.notices(lambda host=host, room=room: host.room(room) is not None)
            good(await host.client.room_invite(room, guest.id), nio.RoomInviteResponse)
            assert await guest.notices(lambda guest=guest, room=room: room in guest.client.invited_rooms)
            good(await guest.client.join(room), nio.JoinResponse)
            assert await host.notices(lambda host=host, guest=guest, room=room: guest.id in host.room(room).users)
            assert await guest.notices(lambda guest=guest, room=room: room in guest.client.rooms)
            await host.says(room, f"welcome to {room}")
            assert await guest.hears(f"welcome to {room}"), "what one writes the other reads"
            await guest.says(room, f"glad to be in {room}")
            assert await host.hears(f"glad to be in {room}"), "both ways"
        await phone.signs_in()
        assert await alice.notices(lambda: alice.knows_device(bob.id, "PHONE")), "a new device becomes known elsewhere"
        await alice.says(room, "to all your devices")
        assert await phone.hears("to all your devices") and await bob.hears("to all your devices")
        await phone.says(room, "from my phone")
        assert await alice.hears("from my phone")
        assert not alice.undecrypted and not bob.undecrypted, "nothing remained unreadable"
    finally:
        for device in (alice, bob, phone):
            await device.closes()
