"""Our relay and a real Synapse, and one of the two is away for a while: nothing is lost and nothing comes twice."""

from __future__ import annotations

from tests.interop.street import OURS, THEIRS, Street, hears_at_last, olm, they_talk
from tests.interop.test_history import _said


async def test_synapse_restarts_while_we_send(street: Street) -> None:
    alice, bob = await street.two(OURS)
    room = await street.room(alice, bob)
    await bob.syncs()
    sent = []

    async def meanwhile() -> None:
        sent.extend([await alice.sends(room) for _ in range(30)])
        await alice.tells_devices("m.room.encrypted", {bob.id: {bob.device: olm("bWVhbndoaWxl")}})
        await alice.calls("PUT", f"profile/{alice.id}/displayname", {"displayname": "Alice A."})

    await street.synapse.restarts_after(meanwhile)
    street.town.clock.forward(minutes=10)
    assert await bob.sees(sent[-1], within=20), "the outbox catches up when Synapse is back"
    assert await bob.notices(lambda: bool(bob.to_device)), "so do the messages to devices"
    assert len(bob.to_device) == 1, "once"
    assert await bob.notices(lambda: bob.name_of(room, alice) == "Alice A.")
    assert await _said(bob, room) == sent, "in order, each once"
    await they_talk(room, alice, bob)


async def test_our_relay_restarts_while_synapse_sends(street: Street) -> None:
    alice, bob = await street.two(OURS)
    room = await street.room(alice, bob)
    await alice.syncs()
    relay = await street.relay()
    await relay.stop()
    sent = [await bob.sends(room) for _ in range(30)]
    await bob.tells_devices("m.room.encrypted", {alice.id: {alice.device: olm("bWVhbndoaWxl")}})
    await relay.start()
    mine = await hears_at_last(alice, room, sent[-1])
    for event_id in mine:
        assert await bob.sees(event_id), "our first words after the start cross"
    assert await alice.notices(lambda: bool(alice.to_device), within=20)
    assert len(alice.to_device) == 1
    heard = await _said(alice, room)
    assert [event_id for event_id in heard if event_id not in mine] == sent, "in order, each once"
    await they_talk(room, alice, bob)


async def test_an_invitation_to_a_server_that_is_away_is_refused(street: Street) -> None:
    alice, bob = await street.two(THEIRS)
    room = await street.room(alice)
    relay = await street.relay()
    await relay.stop()
    refused = await alice.is_refused(alice.invites_to(room, bob))
    assert refused.status >= 400
    await relay.start()
    await bob.syncs()
    # Synapse tries again at once when it hears of us.
    await bob.calls("GET", f"profile/{alice.id}")
    await street.welcomes(alice, bob, room)
    await they_talk(room, alice, bob)
