"""What a person's clients are told of rooms that they are not in, or not in any more, and of what is missing in those they are in."""

from __future__ import annotations

import pytest

from tests.people import Person
from tests.town import Town


def _own_leave(answer: object, room: str, who: Person) -> object:
    assert isinstance(answer, dict)
    part = answer.get("rooms", {}).get("leave", {}).get(room, {})
    events = [*part.get("timeline", {}).get("events", []), *part.get("state", {}).get("events", [])]
    return next((e for e in events if e["type"] == "m.room.member" and e["state_key"] == who.id), None)


async def test_turning_an_invite_down_or_having_it_taken_back_is_an_event(town: Town) -> None:
    alice, anna, bob = await town.users("alice@one", "anna@one", "bob@two")
    taken_back, empty, unreachable, kept = [await alice.creates_room() for _ in range(4)]
    await alice.invites_to(kept, anna)
    await anna.joins(kept)
    for room in (taken_back, empty, unreachable):
        await alice.invites_to(room, bob)
    await anna.invites_to(kept, bob)
    for room in (taken_back, empty, unreachable, kept):
        assert await bob.notices(lambda room=room: room in bob.invites), "bob is invited"

    await alice.kicks(kept, bob)
    await alice.kicks(taken_back, bob)
    seen = []

    async def syncs_until_told(room: str) -> object:
        for _ in range(20):
            answer = await bob.syncs(timeout=1000)
            seen.append(answer)
            if (leave := _own_leave(answer, room, bob)) is not None:
                return leave
        return None

    leave = await syncs_until_told(taken_back)
    assert isinstance(leave, dict) and leave["sender"] == alice.id, "who took it back is told"
    assert all(_own_leave(answer, kept, bob) is None for answer in seen), "of nobody but the inviter is it believed"

    await alice.leaves(empty)
    await bob.leaves(empty)
    leave = await syncs_until_told(empty)
    assert isinstance(leave, dict) and leave["content"]["membership"] == "leave", "though nobody is left to tell it to"

    town.cut("one", "two")
    await bob.leaves(unreachable)
    leave = await syncs_until_told(unreachable)
    assert isinstance(leave, dict) and leave["sender"] == bob.id, "though nobody can be told now"


async def test_a_new_invite_after_a_ban_says_what_the_room_is_now(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(preset="public_chat")
    await bob.joins(room, alice.server)
    await alice.bans(room, bob)
    assert await bob.notices(lambda: room in bob.left), "bob is out"
    await alice.unbans(room, bob)
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    mine = [e for e in bob.invites[room] if e["type"] == "m.room.member" and e["state_key"] == bob.id]
    assert [e["content"]["membership"] for e in mine] == ["invite"], "what he is told is the invite, not the ban"


async def test_other_devices_hear_of_a_room_that_was_forgotten_at_once(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await bob.joins(room)
    phone = await bob.on_another_device()
    await phone.syncs()
    await bob.leaves(room)
    await bob.forgets(room)
    answer = await phone.syncs()
    assert _own_leave(answer, room, bob) is not None, "the phone learns that he left"
    assert room not in (await phone.syncs()).get("rooms", {}).get("leave", {}), "once"
    again = await bob.on_another_device()
    filter = '{"room":{"include_leave":true}}'
    assert room not in (await again.syncs(filter=filter)).get("rooms", {}).get("leave", {}), "who comes later does not"
    refused = await bob.is_refused(bob.calls("GET", f"rooms/{room}/messages"))
    assert (refused.status, refused.errcode) == (403, "M_FORBIDDEN"), "and whoever asks is told so before anything else"


async def test_what_could_not_be_fetched_is_a_gap_in_the_timeline(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    # After an absence only the latest event is sent, and little of what lies before it is fetched.
    monkeypatch.setattr("federation.lane.MAX_WAITING_WHILE_DOWN", 3)
    monkeypatch.setattr("federation.catch_up.MAX_PER_ROOM", 3)
    monkeypatch.setattr("relay.rooms.gaps.MAX_ROUNDS", 1)
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(preset="public_chat")
    await bob.joins(room, alice.server)
    before = await alice.sends(room)
    assert await bob.sees(before)
    town.cut("one", "two")
    missed = [await alice.sends(room) for _ in range(40)]
    town.mend("one", "two")
    town.clock.forward(minutes=10)
    bob.limited.clear()
    filter = '{"room":{"timeline":{"limit":500}}}'
    for _ in range(60):
        await bob.syncs(timeout=1000, filter=filter)
        if bob.has(missed[-1]):
            break
        town.clock.forward(minutes=1)
    assert bob.has(missed[-1]), "the latest message is there"
    assert not bob.has(missed[10]), "one from the middle of what he missed is not"
    assert room in bob.limited, "and his client is told that something lies between"
