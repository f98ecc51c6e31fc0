"""A relay was away for 10,000 events: the latest of each room comes first, the rest when somebody looks for it, nothing twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import orjson

from federation.catch_up import MAX_PER_ROOM
from federation.exchange import Reply
from tests.people import Person
from tests.town import Town, Within

BUSY, QUIET = 8_000, 100
QUIET_ROOMS = 20
NAMED_EVERY = 400


async def test_who_was_away_for_ten_thousand_events_catches_up_in_order_of_need(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    busy, *quiet = [await alice.creates_room(with_=bob) for _ in range(1 + QUIET_ROOMS)]
    await bob.syncs()
    two = await town.relay("two")
    await two.stop()
    said, *others = await asyncio.gather(_talks(alice, busy, BUSY), *(_talks(alice, room, QUIET) for room in quiet))
    assert len(said) + sum(len(one) for one in others) == BUSY + QUIET * QUIET_ROOMS == 10_000
    one = await town.relay("one")
    _, given = _listens(one)
    await two.start()
    asked, _ = _listens(two)
    town.clock.forward(hours=2)
    latest = {room: ids[-1] for room, ids in zip((busy, *quiet), (said, *others), strict=True)}
    for room, event_id in latest.items():
        assert await bob.sees(event_id, within=60), f"the latest of {room} is there without anybody asking for it"
    assert max(given.values()) <= MAX_PER_ROOM, f"of a room with more, the others are not sent unasked: {given}"
    at_first = Counter(asked)
    assert at_first.total() <= 12 * len(latest), f"each room costs few questions: {at_first}"
    name = (await alice.reads(busy, "m.room.name"))["name"]
    assert (await bob.reads(busy, "m.room.name"))["name"] == name, "what the busy room is called now"
    shown = [e["event_id"] for e in await bob.history(busy, step=50, most=50) if e["type"] == "m.room.encrypted"]
    assert shown == said[::-1][: len(shown)] and shown, "the near end of what she missed lies before her at once"
    asked.clear()
    everything = [
        e["event_id"] for e in await bob.history(busy, step=100, most=20_000) if e["type"] == "m.room.encrypted"
    ]
    assert everything == said[::-1], "who pages back is given all of it, in order, each once"
    assert asked.total() <= 3 * BUSY // 100, f"a page costs two questions, and one more for each name: {asked}"
    for room, ids in zip(quiet, others, strict=True):
        there = [e["event_id"] for e in await bob.history(room, step=100) if e["type"] == "m.room.encrypted"]
        assert there == ids[::-1], "so it is in every other room"
    again = await bob.sends(busy)
    assert await alice.sees(again), "and the conversation goes on"


async def _talks(person: Person, room: str, count: int) -> list[str]:
    """Messages, and now and then another name for the room."""
    said = []
    for number in range(count):
        said.append(await person.sends(room))
        if number % NAMED_EVERY == NAMED_EVERY // 2:
            await person.sets(room, "m.room.name", {"name": f"{number}"})
    return said


def _listens(house: Within) -> tuple[Counter[str], Counter[str]]:
    """What this relay asks of others from now on, by endpoint, and the events it sends unasked, by room."""
    asked: Counter[str] = Counter()
    given: Counter[str] = Counter()
    assert house.server is not None
    outward = house.server.outbox._connections._outward
    request = outward.request

    async def counting(method: str, url: Any, **rest: Any) -> Reply:
        endpoint = url.path.split("/")[4] if url.path.startswith("/_matrix/federation/") else url.path
        if endpoint == "send":
            given.update(event["room_id"] for event in orjson.loads(rest["body"])["pdus"])
        else:
            asked[endpoint] += 1
        return await request(method, url, **rest)

    outward.request = counting  # type: ignore[method-assign]
    return asked, given
