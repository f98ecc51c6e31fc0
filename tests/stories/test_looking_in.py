"""Looking into a room from outside: summaries, events by date, rooms in common; and what the seal learns before a join."""

from __future__ import annotations

from typing import Any

from tests.people import Person, path
from tests.town import Town

V1 = "/_matrix/client/v1"


async def _summary(person: Person, room: str, *via: str, **more: Any) -> Any:
    where = f"{V1}/{path('room_summary', room)}" + "".join(f"{'&' if n else '?'}via={one}" for n, one in enumerate(via))
    return await person.calls("GET", where, **more)


async def _event_at(person: Person, room: str, ts: int, direction: str) -> str:
    where = f"{V1}/{path('rooms', room, 'timestamp_to_event')}"
    return str((await person.calls("GET", where, ts=ts, dir=direction))["event_id"])


async def test_a_summary_says_what_a_stranger_may_know(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@two")
    space = await alice.creates_room(creation_content={"type": "m.space"})
    allow = {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": space}]}
    closed = await alice.creates_room(initial_state=[{"type": "m.room.join_rules", "content": allow}])
    public = await alice.creates_room(preset="public_chat", name="Open", room_alias_name="open")
    told = await _summary(alice, closed)
    assert told["allowed_room_ids"] == [space] and told["join_rule"] == "restricted" and told["membership"] == "join"
    assert (await bob.is_refused(_summary(bob, closed))).status == 404
    told = await _summary(bob, f"#open:{alice.server}")
    assert told["room_id"] == public and told["name"] == "Open" and told["membership"] == "leave"
    assert told["room_version"] == "12" and told["encryption"] == "m.megolm.v1.aes-sha2"
    assert "allowed_room_ids" not in told
    assert "membership" not in await _summary(bob, public, token=""), "a stranger is told of it, too"
    refused = await bob.is_refused(_summary(bob, space, token=""))
    assert refused.status == 404, "but not of a private room"
    told = await _summary(carol, public, alice.server)
    assert told["name"] == "Open" and told["num_joined_members"] == 1, "her relay asks the room's"
    await alice.invites_to(closed, carol)
    assert await carol.notices(lambda: closed in carol.invites)
    told = await _summary(carol, closed)
    assert told["membership"] == "invite" and told["encryption"] == "m.megolm.v1.aes-sha2"
    where = f"/_matrix/client/unstable/im.nheko.summary/{path('rooms', public, 'summary')}"
    old = await bob.calls("GET", where)
    assert old["im.nheko.summary.room_version"] == "12"


async def test_the_event_of_a_moment(town: Town) -> None:
    alice, bob, eve = await town.users("alice@one", "bob@two", "eve@one")
    before = town.clock.now()
    town.clock.forward(minutes=1)
    room = await alice.creates_room(preset="public_chat")
    sent, times = [], []
    for _ in range(3):
        town.clock.forward(minutes=1)
        times.append(town.clock.now())
        sent.append(await alice.sends(room))
        town.clock.forward(minutes=1)
    for number, ts in enumerate(times):
        assert await _event_at(alice, room, ts, "f") == sent[number]
        assert await _event_at(alice, room, ts + 60_000, "b") == sent[number]
    assert (await alice.is_refused(_event_at(alice, room, before, "b"))).status == 404, "nothing was before the room"
    assert (await alice.is_refused(_event_at(alice, room, town.clock.now(), "f"))).status == 404
    assert (await eve.is_refused(_event_at(eve, room, times[0], "f"))).status == 403, "not even where anybody may join"
    refused = await alice.is_refused(_event_at(alice, room, times[0], "x"))
    assert refused.errcode == "M_INVALID_PARAM"
    await bob.joins(room, alice.server)
    assert await _event_at(bob, room, times[1], "f") == sent[1], "what was before him is asked of the others"
    around = await bob.calls("GET", path("rooms", room, "context", sent[1]))
    assert around["event"]["event_id"] == sent[1], "and fetched, so that he can read on from there"
    late = await alice.sends(room)
    assert await bob.sees(late)
    assert await _event_at(bob, room, town.clock.now(), "b") == late, "what came since is known, too"


async def test_history_before_her_time_is_not_found_by_date(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    hidden = {"type": "m.room.history_visibility", "content": {"history_visibility": "joined"}}
    room = await alice.creates_room(initial_state=[hidden])
    ts = town.clock.now()
    hers = await alice.sends(room)
    town.clock.forward(minutes=1)
    await alice.invites_to(room, bob)
    await bob.joins(room)
    assert await _event_at(alice, room, ts, "f") == hers
    found = await bob.event(room, await _event_at(bob, room, ts, "f"))
    assert found["state_key"] == bob.id, "the first that he may see is his invitation"


async def test_rooms_in_common(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@one")
    both, three = await alice.creates_room(with_=bob), await alice.creates_room(with_=[bob, carol])
    await alice.creates_room()

    async def shared(other: str) -> Any:
        return await alice.calls("GET", f"{V1}/mutual_rooms", user_id=other)

    assert await shared(bob.id) == {"joined": sorted([both, three]), "count": 2}
    assert await shared(carol.id) == {"joined": [three], "count": 1}
    assert await shared("@nobody:elsewhere.example") == {"joined": [], "count": 0}
    for nonsense in (alice.id, "nobody"):
        assert (await alice.is_refused(shared(nonsense))).errcode == "M_INVALID_PARAM"


async def test_a_room_in_clear_elsewhere_is_not_even_entered(town: Town) -> None:
    await town.relay("two", "privacy: {seal: open}\n")
    alice, bob = await town.users("alice@one", "bob@two")
    clear = await bob.creates_room(preset="public_chat")
    refused = await alice.is_refused(alice.joins(clear, bob.server))
    assert refused.status == 403 and "not encrypted" in refused.text
    await bob.syncs()
    assert ("m.room.member", alice.id) not in bob.state[clear], (
        "its summary told, so that she did not have to leave again"
    )
    encrypted = {"type": "m.room.encryption", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}
    sealed = await bob.creates_room(preset="public_chat", initial_state=[encrypted])
    assert await alice.joins(sealed, bob.server) == sealed
    space = await bob.creates_room(preset="public_chat", creation_content={"type": "m.space"})
    assert await alice.joins(space, bob.server) == space, "spaces have no messages to read"
