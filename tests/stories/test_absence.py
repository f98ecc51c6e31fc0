"""Two relays, and one of them is away: cut off, stopped, deaf, or restarted. Nothing is lost and nothing comes twice."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.people import until
from tests.town import Town, Within


async def test_a_message_waits_for_the_other_server(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    town.cut("one", "two")
    sent = await alice.sends(room, txn="are you there?")
    assert await bob.does_not_see(sent), "the wire is cut"
    town.mend("one", "two")
    town.clock.forward(minutes=5)
    assert await bob.sees(sent), "the outbox tries again"


async def test_a_relay_that_was_stopped_catches_up(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    await town.houses["two"].stop()
    sent = [await alice.sends(room) for _ in range(120)]
    await alice.tells_devices(
        "m.room_key_request",
        {bob.id: {"*": {"action": "request_cancellation", "request_id": "1", "requesting_device_id": "A"}}},
    )
    await town.houses["one"].restart()
    more = [await alice.sends(room) for _ in range(5)]
    await town.houses["two"].start()
    town.clock.forward(hours=2)
    assert await bob.sees(more[-1], within=15), "what was said meanwhile arrives, also after a restart of the sender"
    assert await bob.notices(lambda: bool(bob.to_device)), "and so does what was said to her devices"
    assert len(bob.to_device) == 1, "once"
    history = [e["event_id"] for e in await bob.history(room) if e["type"] == "m.room.encrypted"]
    assert list(reversed(history)) == sent + more, "everything, in order, each once"


async def test_after_a_long_absence_the_other_way_round(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    town.cut("one", "two")
    theirs = [await bob.sends(room) for _ in range(60)]
    town.clock.forward(hours=30)
    mine = [await alice.sends(room) for _ in range(60)]
    town.mend("one", "two")
    town.clock.forward(hours=30)
    assert await alice.sees(theirs[-1], within=15) and await bob.sees(mine[-1], within=15), "both sides meet again"
    ids = []
    for person in (alice, bob):
        ids.append([e["event_id"] for e in await person.history(room) if e["type"] == "m.room.encrypted"])
        assert sorted(ids[-1]) == sorted(theirs + mine), f"{person.name} has everything, each once"
    again = await bob.sends(room)
    assert await alice.sees(again), "and the conversation goes on"


async def test_the_last_words_of_somebody_who_left_meanwhile_are_heard(town: Town) -> None:
    """After a long absence she gets his leave alone, and has to ask for the rest where nobody is in the room any more."""
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    town.cut("one", "two")
    theirs = [await bob.sends(room) for _ in range(60)]
    await bob.leaves(room)
    town.clock.forward(hours=30)
    town.mend("one", "two")
    town.clock.forward(hours=30)
    assert await alice.notices(lambda: alice.membership(room, bob) == "leave", within=30), (
        "she does not wait for him for ever"
    )
    history = [e["event_id"] for e in await alice.history(room) if e["type"] == "m.room.encrypted"]
    assert list(reversed(history)) == theirs, "and has all that he said"


async def test_a_relay_restarts_while_people_wait_in_a_sync(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    waiting = asyncio.create_task(bob.syncs(timeout=30000))
    await asyncio.sleep(0.2)
    await town.houses["two"].restart()
    answer = await asyncio.wait_for(waiting, 10)
    assert answer["next_batch"], "a long poll ends with an answer when the relay stops"
    sent = await alice.sends(room)
    town.clock.forward(minutes=1)
    assert await bob.sees(sent), "and goes on after it, with the same token"
    back = await bob.sends(room)
    assert await alice.sees(back)


async def test_a_gap_of_five_hundred_is_filled_where_it_belongs(town: Town) -> None:
    """The one relay hears a hundred events, is deaf for five hundred, and hears the hundred after them."""
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    first = [await alice.sends(room) for _ in range(100)]
    assert await bob.sees(first[-1])
    hear = goes_deaf(town.houses["two"])
    middle = [await alice.sends(room) for _ in range(500)]
    assert await until(lambda: hear.count >= 500, within=20), "the other side believes that everything was taken"
    hear.again()
    last = [await alice.sends(room) for _ in range(100)]
    assert await bob.sees(last[-1], within=15)
    expected = first + middle + last

    async def both_ways() -> bool:
        back = [e["event_id"] for e in await bob.history(room) if e["type"] == "m.room.encrypted"]
        return len(back) == len(expected)

    await until(both_ways, within=20)
    back = [e["event_id"] for e in await bob.history(room) if e["type"] == "m.room.encrypted"]
    assert len(back) == len(set(back)), "no event comes twice"
    assert set(back) == set(expected), "no event is missing"
    assert list(reversed(back)) == expected, "and each stands where it belongs"
    forth = [e["event_id"] for e in await bob.history(room, "f") if e["type"] == "m.room.encrypted"]
    assert forth == expected, "from the other end as well"


async def test_what_was_said_while_she_was_out_of_the_room_is_paged_in_later(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    first = [await alice.sends(room) for _ in range(100)]
    assert await bob.sees(first[-1])
    await bob.leaves(room)
    assert await alice.notices(lambda: alice.membership(room, bob) == "leave")
    middle = [await alice.sends(room) for _ in range(500)]
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    await bob.joins(room)
    last = [await alice.sends(room) for _ in range(100)]
    assert await bob.sees(last[-1])
    expected = first + middle + last
    back = [e["event_id"] for e in await bob.history(room) if e["type"] == "m.room.encrypted"]
    assert len(back) == len(set(back)), "no event comes twice"
    assert list(reversed(back)) == expected, "each stands where it belongs"
    forth = [e["event_id"] for e in await bob.history(room, "f") if e["type"] == "m.room.encrypted"]
    assert forth == expected, "from the other end as well"


class goes_deaf:
    """A relay that answers to transactions and forgets their events."""

    def __init__(self, house: Any) -> None:
        assert isinstance(house, Within) and house.server is not None
        inbound = next(part for part in house.server._parts if type(part).__name__ == "Inbound")
        self._receiver = inbound._receiver
        self._receiver.receive = self._forgets
        self.count = 0

    async def _forgets(self, origin: str, room_id: str, pdus: Any) -> dict[str, None]:
        self.count += len(pdus)
        return {}

    def again(self) -> None:
        del self._receiver.receive
