"""A real Synapse sends in clear what our relay must never show and never write. Each kind of it carries a canary."""

from __future__ import annotations

import pytest

from tests.canaries import Canaries
from tests.interop.neighbour import NOTE, encrypted
from tests.interop.street import OURS, THEIRS, Street, becomes, they_talk
from tests.people import ciphertext, path


async def test_what_synapse_sends_in_clear_is_never_shown_and_never_written(street: Street) -> None:
    alice, bob = await street.two(THEIRS)
    canary = Canaries()
    room = await alice.creates_room(**encrypted())
    clear = [await alice.sends(room, {"msgtype": "m.text", "body": canary("history")}, type="m.room.message")]
    await alice.sets(room, NOTE, {"text": canary("unknown state")}, "x")
    sealed = [await alice.sends(room)]
    await street.welcomes(alice, bob, room)
    for content, type in (
        ({"msgtype": "m.text", "body": canary("a message")}, "m.room.message"),
        (
            {"msgtype": "m.file", "body": canary("a file's body"), "filename": canary("its name"), "url": "mxc://x/y"},
            "m.room.message",
        ),
        (
            {"m.relates_to": {"rel_type": "m.annotation", "event_id": sealed[0], "key": canary("a reaction")}},
            "m.reaction",
        ),
        ({"text": canary("an unknown type")}, NOTE),
        ({**ciphertext(), "ciphertext": canary("a ciphertext that is none")}, "m.room.encrypted"),
        ({"algorithm": "m.megolm.v1.aes-sha2", "body": canary("no ciphertext at all")}, "m.room.encrypted"),
    ):
        clear.append(await alice.sends(room, content, type=type))
        sealed.append(await alice.sends(room))
    await alice.sets(room, NOTE, {"text": canary("more unknown state")}, "y")
    await alice.redacts(room, await alice.sends(room), reason=canary("a redaction"))
    await alice.tells_devices("m.room_key", {bob.id: {"*": {"session_key": canary("a room key to a device")}}})
    await alice.tells_devices(NOTE, {bob.id: {"*": {"text": canary("an unknown type to a device")}}})
    picture = await alice.uploads(canary("a text file").encode() * 20, "text/plain", filename=canary("a file name"))
    await bob.is_refused(
        bob.calls("GET", f"/_matrix/client/v1/media/thumbnail/{picture.removeprefix('mxc://')}?width=9&height=9")
    )
    _, whole = await bob.downloads(picture)
    assert whole, "a readable file is streamed through"
    sealed.append(await alice.sends(room))
    assert await bob.sees(sealed[-1]), "what is encrypted arrives over all that is not"
    shown = {event["event_id"] for event in [*await bob.history(room), *bob.timeline[room]]}
    assert set(sealed) <= shown, "every encrypted message is there"
    assert not set(clear) & shown, "and nothing else"
    for event_id in clear:
        assert (await bob.is_refused(bob.event(room, event_id))).status == 404
    assert not bob.to_device, "nothing readable reached her devices"
    await they_talk(room, alice, bob)
    relay = await street.relay()
    running = canary.found_in(relay.files())
    assert not running, "while it runs nothing readable is on the disk:\n" + "\n".join(running)
    await relay.stop()
    stopped = canary.found_in(relay.files())
    assert not stopped, "nor after it stopped:\n" + "\n".join(stopped)
    assert any(file.name == "relay.db" for file in relay.files()), "the search looked at the database"
    await relay.start()
    await they_talk(room, bob, alice)


@pytest.mark.parametrize("version", ["12", "10"])
async def test_what_invited_and_knocking_people_are_told_is_sealed_too(street: Street, version: str) -> None:
    alice, bob = await street.two(THEIRS)
    canary = Canaries()
    rules = {"type": "m.room.join_rules", "content": {"join_rule": "knock"}}
    note = {"type": NOTE, "content": {"text": canary("what Synapse tells of the room")}}
    invited, knocked = [await street.room(alice, room_version=version, initial_state=[rules, note]) for _ in range(2)]
    await alice.invites_to(invited, bob)
    await bob.knocks_on(knocked, alice.server)
    assert await bob.notices(lambda: invited in bob.invites and knocked in bob.knocks)
    for told in (bob.invites[invited], bob.knocks[knocked]):
        types = {event["type"] for event in told}
        assert {"m.room.create", "m.room.encryption", "m.room.join_rules"} <= types, "she is told what the room is"
        assert NOTE not in types, "and nothing that may not lie on the disk"
        # The create event also says which and how old it is: apps look for that.
        stripped = {"type", "state_key", "content", "sender"}
        more = {"m.room.create": {"event_id", "origin_server_ts"}}
        assert all(event.keys() <= stripped | more.get(event["type"], set()) for event in told), "in stripped form"
    found = canary.found_in((await street.relay()).files())
    assert not found, "\n".join(found)
    for room in (invited, knocked):
        await bob.leaves(room)
        assert await becomes(alice, room, bob, "leave"), "the host hears that she does not come"


async def test_synapse_can_carry_on_from_us_where_a_message_in_clear_lies_between(street: Street) -> None:
    """What we keep as a stub is given on redacted; Synapse takes it as such and gets the rest."""
    alice, bob = await street.two(THEIRS)
    room = await street.room(alice, bob, preset="public_chat")
    clear = await alice.sends(room, {"msgtype": "m.text", "body": "in clear"}, type="m.room.message")
    sealed = await alice.sends(room)
    assert await bob.sees(sealed)
    back = await bob.sends(room)
    assert await alice.sees(back), "an event that follows the stub is accepted"
    around = await alice.calls("GET", path("rooms", room, "context", back))
    assert clear in {event["event_id"] for event in around["events_before"]}, "for Synapse's own people nothing changes"


async def test_a_room_without_encryption_is_not_entered(street: Street) -> None:
    alice, bob = await street.two(THEIRS)
    room = await alice.creates_room(preset="public_chat")
    refused = await bob.is_refused(bob.joins(room, alice.server))
    assert (refused.status, refused.errcode) == (403, "M_FORBIDDEN")
    assert "not encrypted" in refused.text
    await alice.syncs()
    assert await alice.notices(lambda: alice.membership(room, bob) in (None, "leave")), (
        "she is not left behind in there"
    )
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    assert (await bob.is_refused(bob.joins(room))).status == 403, "an invitation does not change that"
    await alice.sets(room, "m.room.encryption", {"algorithm": "m.megolm.v1.aes-sha2"})
    await bob.leaves(room)
    await street.welcomes(alice, bob, room)
    await they_talk(room, alice, bob)


async def test_what_our_people_try_in_clear_does_not_reach_synapse(street: Street) -> None:
    alice, bob = await street.two(OURS)
    room = await street.room(alice, bob)
    refused = await alice.is_refused(alice.sends(room, {"msgtype": "m.text", "body": "hello"}, type="m.room.message"))
    assert refused.status == 403
    sent = await alice.sends(room, {**ciphertext(), "body": "beside it"})
    seen = await bob.sees(sent)
    assert seen is not None and "body" not in seen["content"], "what stands beside a ciphertext is left out"
