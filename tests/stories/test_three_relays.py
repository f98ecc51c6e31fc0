"""Three relays: what one says reaches both others, partitions heal, and moderators' acts hold everywhere."""

from __future__ import annotations

from typing import Any

import pytest

from federation.client import Client, JoinAnswer
from relay.protocol.event import Event
from tests.people import Refused, until
from tests.town import Town


async def test_everybody_hears_everybody(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@three")
    room = await alice.creates_room(with_=[bob, carol])
    for speaker in (alice, bob, carol):
        sent = await speaker.sends(room)
        for listener in (alice, bob, carol):
            assert await listener.sees(sent), f"{listener.name} hears {speaker.name}"
    assert (await alice.members(room)) == (await bob.members(room)) == (await carol.members(room))


async def test_somebody_joins_by_a_server_that_did_not_make_the_room(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@three")
    room = await alice.creates_room(preset="public_chat")
    await bob.joins(room, alice.server)
    await carol.joins(room, bob.server)
    for speaker in (alice, bob, carol):
        sent = await speaker.sends(room)
        for listener in (alice, bob, carol):
            assert await listener.sees(sent), f"{listener.name} hears {speaker.name}"


async def test_what_is_said_while_somebody_joins_reaches_her(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, bob, carol, dave = await town.users("alice@one", "bob@two", "carol@three", "dave@four")
    room = await alice.creates_room(preset="public_chat")
    await bob.joins(room, alice.server)
    town.cut("one", "two")
    await carol.joins(room, bob.server)
    beside = await alice.sends(room)
    town.mend("one", "two")
    town.clock.forward(minutes=5)
    assert await carol.sees(beside), "whose server did not know of hers, and nobody has said anything since"

    send_join = Client.send_join
    between: list[str] = []

    async def slow(client: Client, server: str, event: Event, **how: Any) -> JoinAnswer:
        between.append(await alice.sends(event.room_id))
        return await send_join(client, server, event, **how)

    monkeypatch.setattr(Client, "send_join", slow)
    await dave.joins(room, alice.server)
    assert await dave.sees(between[0]), "after the template was made, and before the join came"

    visibility = {"type": "m.room.history_visibility", "state_key": "", "content": {"history_visibility": "joined"}}
    closed = await alice.creates_room(preset="public_chat", initial_state=[visibility])
    await dave.joins(closed, alice.server)
    four = town.houses["four"].server
    assert four is not None and await until(lambda: four.rooms.event(between[1]))
    unseen = await four.rooms.event(between[1])
    assert unseen is not None and unseen.event.content == {}, (
        "what only those who were there may read comes without a word"
    )


async def test_two_that_can_not_reach_each_other_meet_over_the_third(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@three")
    room = await alice.creates_room(with_=[bob, carol])
    assert await bob.notices(lambda: bob.membership(room, carol) == "join")
    town.cut("two", "three")
    lost = await bob.sends(room)
    assert await alice.sees(lost)
    assert await carol.does_not_see(lost), "the wire is cut"
    bridge = await alice.sends(room)
    assert await carol.sees(bridge), "what builds on it comes over another way"
    assert await carol.sees(lost), "and what is missing is asked for there"
    answer = await carol.sends(room)
    assert await alice.sees(answer)
    assert await bob.does_not_see(answer)
    assert await bob.sees(await alice.sends(room)) and await bob.sees(answer)


async def test_a_ban_holds_against_what_the_banned_one_said_meanwhile(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@three")
    room = await alice.creates_room(with_=[bob, carol])
    for person in (alice, carol):
        assert await person.notices(lambda person=person: person.membership(room, bob) == "join")
        assert await person.notices(lambda person=person: person.membership(room, carol) == "join")
    town.cut("one", "two")
    town.cut("two", "three")
    await alice.bans(room, bob)
    assert await carol.notices(lambda: carol.membership(room, bob) == "ban")
    defiant = [await bob.sends(room) for _ in range(3)]
    town.mend("one", "two")
    town.mend("two", "three")
    town.clock.forward(minutes=10)
    assert await bob.notices(lambda: room in bob.left, within=15), "the ban reaches him in the end"
    for person in (alice, carol):
        for event_id in defiant:
            assert await person.does_not_see(event_id), f"{person.name} is spared what he said after the ban"
    refused = await bob.is_refused(bob.sends(room))
    assert refused.status == 403
    sent = await alice.sends(room)
    assert await carol.sees(sent)


async def test_a_server_that_is_shut_out_is_heard_no_more(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@three")
    room = await alice.creates_room(with_=[bob, carol])
    assert await bob.notices(lambda: bob.membership(room, carol) == "join")
    # The rule looks at host names, and here all have one: so everybody but oneself is shut out.
    await alice.sets(room, "m.room.server_acl", {"allow": ["nobody.example"], "deny": [], "allow_ip_literals": True})
    assert await bob.notices(lambda: ("m.room.server_acl", "") in bob.state[room])
    said = await bob.sends(room)
    assert await alice.does_not_see(said), "the room's list of servers does not admit him"
    assert await carol.does_not_see(said)


async def test_opposing_moderators_end_in_the_same_state_everywhere(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@three")
    powers = {"users": {alice.id: 100, bob.id: 50, carol.id: 50}}
    room = await alice.creates_room(with_=[bob, carol], room_version="11", power_level_content_override=powers)
    everybody = (alice, bob, carol)
    for person in everybody:
        for other in (bob, carol):
            assert await person.notices(lambda person=person, other=other: person.membership(room, other) == "join")
    for pair in (("one", "two"), ("two", "three"), ("one", "three")):
        town.cut(*pair)
    await bob.sets(room, "m.room.name", {"name": "Bob's"})
    await carol.sets(room, "m.room.name", {"name": "Carol's"})
    await carol.sets(room, "m.room.join_rules", {"join_rule": "public"})
    # Alice takes Carol's power while Carol uses it.
    await alice.sets(
        room,
        "m.room.power_levels",
        {**(await alice.reads(room, "m.room.power_levels")), "users": {alice.id: 100, bob.id: 50}},
    )
    for pair in (("one", "two"), ("two", "three"), ("one", "three")):
        town.mend(*pair)
    town.clock.forward(minutes=30)
    for speaker in everybody:
        sent = await speaker.sends(room)
        for listener in everybody:
            assert await listener.sees(sent, within=15), f"{listener.name} hears {speaker.name} again"

    async def agree() -> bool:
        views = [
            {
                (e["type"], e["state_key"]): e["event_id"]
                for e in (await person.calls("GET", f"rooms/{room.replace('!', '%21')}/state"))
            }
            for person in everybody
        ]
        return views[0] == views[1] == views[2]

    assert await until(agree), "all three servers hold the same state"
    assert (await alice.reads(room, "m.room.power_levels"))["users"].get(carol.id) is None
    try:
        await carol.sets(room, "m.room.name", {"name": "Carol again"})
        raise AssertionError("whose power was taken has it no more")
    except Refused as refused:
        assert refused.status == 403


async def test_a_kick_is_believed_although_much_was_missed_before_it(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@three")
    powers = {"users": {alice.id: 100, bob.id: 50}}
    room = await alice.creates_room(
        with_=[bob, carol], preset="public_chat", room_version="11", power_level_content_override=powers
    )
    for person in (alice, bob):
        assert await person.notices(lambda person=person: person.membership(room, carol) == "join")
    town.cut("one", "three")
    for _ in range(5):
        assert await bob.sees(await alice.sends(room))
    town.cut("two", "three")
    # Messages that were still for her server wait before the kick, and are asked about after it.
    for _ in range(3):
        await bob.sends(room)
    await bob.kicks(room, carol)
    assert await alice.notices(lambda: alice.membership(room, carol) == "leave")
    town.mend("two", "three")
    town.clock.forward(minutes=5)
    assert await carol.notices(lambda: room in carol.left), "her server is told what it needs to judge the kick"
    town.mend("one", "three")
    town.clock.forward(minutes=5)
    await carol.joins(room, alice.server)
    sent = await carol.sends(room)
    assert await alice.sees(sent) and await bob.sees(sent), "so she can come back, instead of talking to nobody"
