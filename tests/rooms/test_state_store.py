"""States as chains of differences: what is written is what is read, memory stays in its bounds, resolution reads little."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from relay.bell import Bell
from relay.db import Database, Query
from relay.rooms import state
from relay.rooms.state import MAX_STEPS, Known, StateMap, States
from relay.rooms.store import INSERT_EVENT, SCHEMA
from tests.rooms.village import Village

ROOM = 1


class Chest:
    """States without rooms: events are numbers with a key."""

    def __init__(self, db: Database) -> None:
        self.db = db

    async def event(self, key: str) -> tuple[str, int]:
        with self.db.write() as tx:
            nid = tx.pos()
            tx.run(
                INSERT_EVENT, nid, f"${nid}", ROOM, None, 1, "t", "@a:b", key, None, 0, None, None, None, b"{}"
            )  # fmt: skip
        await tx
        return f"${nid}", nid

    async def derive(self, after: StateMap, *near: Known) -> Known:
        with self.db.write() as tx:
            known = state.derive(tx, ROOM, after, near)
        await tx
        return known

    async def load(self, nid: int) -> Known:
        return await self.db.read(state.load, nid)

    async def delta(self, nid: int) -> int:
        return len(await self.db.read(lambda query: query.value("SELECT delta FROM states WHERE nid = $1", nid))) // 8


@pytest.fixture
async def chest(tmp_path: Path):  # type: ignore[no-untyped-def]
    db = Database(tmp_path / "relay.db", Bell())
    await db.open([SCHEMA], "one.example")
    yield Chest(db)
    await db.close()


async def test_what_was_written_is_what_is_read(chest: Chest) -> None:
    chance = random.Random(3)
    states: list[Known] = []
    entries: StateMap = {}
    for _ in range(3 * MAX_STEPS):
        key = str(chance.randrange(20))
        base = chance.choice(states[-8:]) if states else None
        entries = dict(base.entries) if base is not None else {}
        entries[("t", key)] = await chest.event(key)
        if chance.random() < 0.1 and len(entries) > 2:
            entries.pop(chance.choice(list(entries)))
        states.append(await chest.derive(entries, *states[-5:]))
    for known in states:
        found = await chest.load(known.nid)
        assert found.entries == known.entries, "each state is whole when it is read"
        assert found.steps == known.steps < MAX_STEPS, "after a bounded number of steps"


async def test_a_state_like_one_nearby_is_that_one(chest: Chest) -> None:
    first = await chest.derive({("t", "a"): await chest.event("a"), ("t", "b"): await chest.event("b")})
    again = await chest.derive(dict(first.entries), first)
    assert again.nid == first.nid, "the same state is written once"
    more = await chest.derive({**first.entries, ("t", "c"): await chest.event("c")}, first)
    assert await chest.delta(more.nid) == 1, "one more event is a difference of one"
    less = await chest.derive({("t", "a"): first.entries[("t", "a")]}, first, more)
    assert (await chest.load(less.nid)).entries == less.entries, "a key that went is gone"
    nearest = await chest.derive({**more.entries, ("t", "a"): await chest.event("a")}, first, more)
    assert await chest.delta(nearest.nid) == 1, "the nearest of several is taken"


async def test_memory_stays_in_its_bounds(chest: Chest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_REMEMBERED_ENTRIES", 50)
    states = States(chest.db)
    made = [await chest.derive({("t", str(n)): (f"${n}", n) for n in range(10)}) for _ in range(30)]
    for _ in range(3):
        for known in made:
            states.remember(known)
            states.remember(known)
    assert len(states._remembered._kept) == 5, "as many states as the bound has room for, however often they come"
    assert states._remembered._entries == 50


async def test_resolution_reads_only_what_it_looks_at(village: Village, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = await village.home("one.example"), await village.home("two.example")
    room_id = await one.creates("anna", power_level_content_override={"events": {"m.room.topic": 0}})
    await two.joins("anna", room_id, "one.example")
    room = await one.room(room_id)
    at = await room.state_events(list(room.entries))
    with one.db.write(chain=room_id) as tx:
        for number in range(300):
            who = one.user(f"m{number}")
            event = one.sender.build(
                room, at, sender=who, type="m.room.member", content={"membership": "join"}, state_key=who
            )
            one.appender.append(tx, room, event)
    await tx
    start = list(room.extremities)
    read: list[int] = []
    resolve = state.resolve

    def counting(version: object, plain: object, events: object, *more: object) -> object:
        result = resolve(version, plain, events, *more)  # type: ignore[arg-type]
        read.append(len(events))  # type: ignore[arg-type]
        return result

    monkeypatch.setattr(state, "resolve", counting)
    await one.sets("anna", room_id, "m.room.topic", {"topic": "a"})
    theirs = await two.forges("anna", room_id, type="m.room.topic", content={"topic": "b"}, state_key="", after=start)
    await one.receives("two.example", room_id, theirs)
    assert read and max(read) < 20, f"a quarrel about the topic is settled without everybody's member event: {read}"


async def test_many_conflicts_are_resolved_whoever_comes_first(village: Village) -> None:
    one = await village.home("one.example")
    room_id = await one.creates("anna")
    room = await one.room(room_id)
    at = await room.state_events(list(room.entries))
    before = dict(room.entries)
    sides: list[StateMap] = []
    for side in range(2):
        entries = dict(before)
        built = []
        for number in range(1_000):
            who = one.user(f"m{number}")
            content = {"membership": "join", "displayname": f"{side}"}
            built.append(one.sender.build(room, at, sender=who, type="m.room.member", content=content, state_key=who))
        with one.db.write() as tx:
            for event in built:
                assert event.key is not None
                entries[event.key] = (event.id, one.appender.outlier(tx, room, event))
        await tx
        sides.append(entries)
    merged = await one.rooms.states.merged(room.version, sides)
    other_way = await one.rooms.states.merged(room.version, sides[::-1])
    assert merged == other_way, "whoever comes first"
    assert len(merged) == len(before) + 1_000, "nobody is lost"
    numbers = await one.db.read(_numbers, [event_id for event_id, _ in merged.values()])
    assert numbers == dict(merged.values()), "each with the number of its row"


def _numbers(query: Query, event_ids: list[str]) -> dict[str, int]:
    return {e: query.value("SELECT nid FROM events WHERE event_id = $1", e) for e in event_ids}


async def test_a_person_whose_membership_was_resolved_away_is_told(village: Village) -> None:
    one, two = await village.home("one.example"), await village.home("two.example")
    room_id = await one.creates("anna")
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all()
    room = await one.room(room_id)
    heard: list[tuple[str, str | None, str]] = []
    one.rooms.on_membership.append(lambda room, user, before, now, pos: heard.append((user, before, now)))
    for who in (one.user("anna"), two.user("ben")):
        gone = {key: entry for key, entry in room.entries.items() if key != ("m.room.member", who)}
        with one.db.write(chain=room_id) as tx:
            one.appender.replace_state(tx, room, gone, {})
        await tx
        assert heard.pop() == (who, "join", "leave"), "the parts hear that they are not there"
        assert who not in room.members and who not in room.local_joined
        log = "SELECT count(*) FROM membership_log WHERE user_id = $1 AND before = 'join' AND after = 'leave'"
        assert await one.count(log, who) == 1, "it is in the log, once"
    assert one.rooms.membership(room_id, one.user("anna")) == "leave"
    assert room.servers == set()
    await one.agrees_with_its_disk(room_id)
