"""From where a sync begins a client pages back, never from the end: it has to reach what was said before she was there."""

from __future__ import annotations

from tests.people import Person
from tests.town import Town


async def earlier(person: Person, room: str) -> list[str]:
    """The messages before the latest sync of a room, as a client loads them: from its prev_batch, oldest first."""
    pages = await person.history(room, start=person.prev_batch.pop(room), step=3)
    return [event["event_id"] for event in reversed(pages) if event["type"] == "m.room.encrypted"]


async def test_what_was_said_before_somebody_came_and_while_she_was_away_is_paged_in(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room()
    await alice.invites_to(room, bob)
    first = [await alice.sends(room) for _ in range(4)]
    assert await bob.notices(lambda: room in bob.invites)
    await bob.joins(room)
    assert await bob.notices(lambda: room in bob.rooms)
    assert bob.ids(room)[0] not in first, "the sync begins with his coming"
    assert await earlier(bob, room) == first, "a new room's prev_batch leads to the words with which he was invited"
    during = await alice.sends(room)
    assert await bob.sees(during)
    await bob.leaves(room)
    assert await alice.notices(lambda: alice.membership(room, bob) == "leave")
    assert await bob.notices(lambda: room in bob.left)
    bob.prev_batch.pop(room, None)
    middle = [await alice.sends(room) for _ in range(4)]
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    bob.timeline[room].clear()
    await bob.joins(room)
    assert await bob.notices(lambda: room in bob.rooms)
    assert bob.ids(room)[0] == bob.state[room][("m.room.member", bob.id)]["event_id"], "nor does it reach over a gap"
    whole = [*first, during, *middle]
    assert await earlier(bob, room) == whole, "after coming back, to what was said meanwhile, each word once"

    last = await alice.sends(room)
    assert await bob.sees(last)
    answer = await bob.calls("GET", "sync", filter='{"room":{"timeline":{"types":["m.room.encrypted"]}}}')
    told = answer["rooms"]["join"][room]["timeline"]
    assert [event["event_id"] for event in told["events"]] == [last], (
        "nor where a filter leaves out the event after the gap"
    )
    bob.prev_batch[room] = told["prev_batch"]
    assert told["limited"] and await earlier(bob, room) == whole
