"""Our relay and a real Synapse: invitations turned down or taken back, leaving, kicks, bans, knocks, restricted rooms."""

from __future__ import annotations

import pytest

from tests.interop.street import OURS, THEIRS, Street, becomes, both_sides, other, they_talk
from tests.people import Person


@both_sides
async def test_an_invitation_is_turned_down(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice)
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    told = {event["type"] for event in bob.invites[room]}
    assert {"m.room.create", "m.room.encryption", "m.room.member", "m.room.join_rules"} <= told, (
        "she is told what it is"
    )
    await bob.leaves(room)
    assert await bob.notices(lambda: room not in bob.invites)
    assert await becomes(alice, room, bob, "leave"), "the host learns that it was turned down"
    await street.welcomes(alice, bob, room)
    await they_talk(room, alice, bob)


@both_sides
async def test_an_invitation_is_taken_back(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice)
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    await alice.kicks(room, bob)
    assert await bob.notices(lambda: room not in bob.invites), "an invitation that was taken back disappears"
    refused = await bob.is_refused(bob.joins(room, alice.server))
    assert refused.status == 403


@both_sides
async def test_leaving_and_coming_back(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice, bob)
    await they_talk(room, alice, bob)
    await bob.leaves(room)
    assert await becomes(alice, room, bob, "leave")
    missed = await alice.sends(room)
    assert await bob.does_not_see(missed), "who has left hears nothing"
    await street.welcomes(alice, bob, room)
    await they_talk(room, alice, bob)


@both_sides
async def test_kicks_and_bans(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    carol = await street.user("carol", other(host))
    room = await street.room(alice, bob, carol)
    await alice.kicks(room, bob)
    assert await bob.notices(lambda: room in bob.left), "who is kicked from afar learns it"
    assert await becomes(carol, room, bob, "leave")
    await alice.bans(room, carol)
    assert await carol.notices(lambda: carol.membership(room, carol) == "ban"), "who is banned, too"
    refused = await carol.is_refused(carol.joins(room, alice.server))
    assert refused.status == 403
    await alice.unbans(room, carol)
    await street.welcomes(alice, carol, room)
    await they_talk(room, alice, carol)


@both_sides
async def test_a_moderator_from_the_other_server(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    carol = await street.user("carol", host)
    room = await street.room(alice, bob, carol)
    levels = await alice.reads(room, "m.room.power_levels")
    event_id = await alice.sets(
        room, "m.room.power_levels", {**levels, "users": {**levels.get("users", {}), bob.id: 50}}
    )
    assert await bob.sees(event_id)
    await bob.sets(room, "m.room.name", {"name": "Studio"})
    assert await alice.notices(
        lambda: alice.state[room].get(("m.room.name", ""), {}).get("content") == {"name": "Studio"}
    )
    await bob.kicks(room, carol)
    assert await carol.notices(lambda: room in carol.left), "a moderator elsewhere can put people out"
    refused = await bob.is_refused(bob.kicks(room, alice))
    assert refused.status == 403, "but nobody above her"


@both_sides
@pytest.mark.parametrize("rule", ["knock", "knock_restricted"])
async def test_a_knock_is_answered(street: Street, host: str, rule: str) -> None:
    alice, bob = await street.two(host)
    content = {"join_rule": rule, "allow": []} if rule == "knock_restricted" else {"join_rule": rule}
    room = await street.room(alice, initial_state=[{"type": "m.room.join_rules", "content": content}])
    await bob.knocks_on(room, alice.server)
    assert await bob.notices(lambda: room in bob.knocks), "she knocked, says her server"
    assert await becomes(alice, room, bob, "knock"), "the host hears it"
    await street.welcomes(alice, bob, room)
    await they_talk(room, alice, bob)


async def test_a_knock_is_taken_back(street: Street) -> None:
    # Only from our side: Synapse (1.163) tells no other server that a knock was taken back or turned down.
    alice, bob = await street.two(THEIRS)
    room = await street.room(alice, initial_state=[{"type": "m.room.join_rules", "content": {"join_rule": "knock"}}])
    await bob.knocks_on(room, alice.server)
    assert await becomes(alice, room, bob, "knock")
    await bob.leaves(room)
    assert await becomes(alice, room, bob, "leave"), "the host hears that nobody waits any more"
    await bob.knocks_on(room, alice.server)
    assert await becomes(alice, room, bob, "knock"), "she may knock again"


@both_sides
@pytest.mark.parametrize("version", ["12", "9"])
async def test_a_restricted_room_admits_members_of_the_other_room(street: Street, host: str, version: str) -> None:
    alice, bob = await street.two(host)
    carol = await street.user("carol", other(host))
    club = await street.room(alice, bob, room_version=version)
    rule = {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": club}]}
    room = await street.room(
        alice, room_version=version, initial_state=[{"type": "m.room.join_rules", "content": rule}]
    )
    await bob.joins(room, alice.server)
    assert await bob.notices(lambda: room in bob.rooms)
    member = await bob.reads(room, "m.room.member", bob.id)
    assert member["join_authorised_via_users_server"] == alice.id, "somebody of the host's server let her in"
    await they_talk(room, alice, bob)
    refused = await carol.is_refused(carol.joins(room, alice.server))
    assert refused.status == 403, "who is not in the other room may not come in"


async def test_a_room_that_everybody_of_ours_left_can_be_entered_again(street: Street) -> None:
    alice, bob = await street.two(THEIRS)
    room = await street.room(alice, bob, preset="public_chat")
    await bob.leaves(room)
    assert await becomes(alice, room, bob, "leave")
    meanwhile = [await alice.sends(room) for _ in range(3)]
    await alice.sets(room, "m.room.name", {"name": "Meanwhile"})
    carol: Person = await street.user("carol", OURS)
    await carol.joins(room, alice.server)
    assert await carol.notices(lambda: room in carol.rooms)
    assert await carol.reads(room, "m.room.name") == {"name": "Meanwhile"}, "what changed meanwhile is known"
    await they_talk(room, alice, carol)
    heard = [event["event_id"] for event in await carol.history(room)]
    assert set(meanwhile) <= set(heard), "and what was said meanwhile in this shared history can be read"
